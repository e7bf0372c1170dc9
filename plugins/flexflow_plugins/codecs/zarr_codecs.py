"""The group codecs as Zarr v3 array-to-bytes codecs, so that stock zarr-python reads a weight store as plain numbers.

Zarr finds them by the entry points of the group `zarr.codecs`. In zarr.json:

    {"name": "flexflow_engine.group-int4", "configuration": {"version": 2, "group_size": 64}}

The array is float32: a chunk, whole and in C order, is one encoded tensor. Writing through Zarr encodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer

from flexflow_engine.abc.codec import ZARR_PREFIX
from flexflow_engine.errors import CorruptDataError
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt8Codec, GroupQuantCodec


class GroupQuantZarrCodec(ArrayBytesCodec):
    """Zarr's side of a group codec."""

    is_fixed_size = True
    codec_class: ClassVar[type[GroupQuantCodec]]

    def __init__(self, codec: GroupQuantCodec | None = None) -> None:
        self._codec = codec or self.codec_class()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupQuantZarrCodec) and self._codec == other._codec

    def __hash__(self) -> int:
        return hash(self._codec)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises CorruptDataError for a configuration that this version can't read."""
        configuration = dict(data.get("configuration", {}))
        version, group_size = configuration.pop("version", None), configuration.pop("group_size", None)
        if not isinstance(version, int) or not isinstance(group_size, int) or configuration:
            raise CorruptDataError(f"the codec's configuration {data} is not one of {cls.codec_class.name}")
        return cls(cls.codec_class.of_version(version, group_size))

    def to_dict(self) -> dict[str, Any]:
        settings = dict(self._codec.configuration())
        return {"name": ZARR_PREFIX + settings.pop("name"), "configuration": settings}

    def validate(self, *, shape: Any, dtype: Any, chunk_grid: Any) -> None:
        """Called when an array's metadata are read or made. Raises CorruptDataError for another type than float32."""
        if dtype.to_native_dtype() != np.dtype("float32"):
            raise CorruptDataError(
                f"an array of {dtype.to_native_dtype()} can't hold {self._codec.name}", fix="its data type is float32"
            )

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        return self._codec.encoded_nbytes(tuple(chunk_spec.shape), "float32")

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        encoded = torch.from_numpy(np.array(chunk_data.as_numpy_array(), np.uint8).reshape(1, -1))
        values = torch.empty((1, *chunk_spec.shape))
        self._codec.decode(encoded, values)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(values[0].numpy())

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        values = torch.from_numpy(np.array(chunk_data.as_numpy_array(), "float32", order="C"))[None]
        nbytes = self._codec.encoded_nbytes(tuple(chunk_spec.shape), "float32")
        encoded = torch.empty((1, nbytes), dtype=torch.uint8)
        self._codec.encode(values, encoded)
        return chunk_spec.prototype.buffer.from_bytes(encoded.numpy().tobytes())


class GroupInt4ZarrCodec(GroupQuantZarrCodec):
    """`flexflow_engine.group-int4`."""

    codec_class = GroupInt4Codec


class GroupInt8ZarrCodec(GroupQuantZarrCodec):
    """`flexflow_engine.group-int8`."""

    codec_class = GroupInt8Codec
