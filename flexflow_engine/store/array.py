"""One Zarr v3 array: how it is cut into shard files along its first axis, and the zarr.json that says so."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod
from pathlib import Path
from typing import Any

from flexflow_engine.abc.codec import ZARR_PREFIX
from flexflow_engine.abc.dtypes import DType
from flexflow_engine.errors import CorruptDataError
from flexflow_engine.files import make_folder, replacing, reporting
from flexflow_engine.store.encoding import UNIT_NBYTES, Compression, Encoding
from flexflow_engine.store.shard import ShardFile

METADATA = "zarr.json"
_ITEM_NBYTES = {"uint8": 1, "uint16": 2, "float16": 2, "float32": 4}
_DATA_TYPES: dict[DType, str] = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayLayout:
    """Shape and cut of an array; pages and units are whole in every axis but the first."""

    shape: tuple[int, ...]
    data_type: str
    """Zarr's name."""
    page_shape: tuple[int, ...]
    unit_shape: tuple[int, ...]
    attributes: tuple[tuple[str, str | int], ...] = ()
    encoding: Encoding | None = None
    bare: bool = False
    """Whether units are stored without checksums."""
    compression: Compression | None = None
    """Where there is one, sizes of units and of page files below are those before it."""

    @classmethod
    def plain(cls, shape: tuple[int, ...], dtype: DType, *, page_rows: int, unit_rows: int) -> ArrayLayout:
        """Numbers as they are. A vector is one page of one unit, whatever the rows."""
        matrix = len(shape) > 1
        return cls(
            shape=shape,
            data_type=_DATA_TYPES[dtype],
            page_shape=(page_rows, *shape[1:]) if matrix else shape,
            unit_shape=(unit_rows, *shape[1:]) if matrix else shape,
            attributes=(("dtype", "bfloat16"),) if dtype == "bfloat16" else (),
        )

    @classmethod
    def encoded(
        cls, shape: tuple[int, ...], dtype: DType, *, page_rows: int, unit_rows: int, encoding: Encoding
    ) -> ArrayLayout:
        """Numbers that a codec made smaller: float32 to Zarr, `dtype` before they were encoded."""
        numbers = cls.plain(shape, "float32", page_rows=page_rows, unit_rows=unit_rows)
        attributes = (("dtype", dtype), (UNIT_NBYTES, encoding.unit_nbytes))
        return replace(numbers, attributes=attributes, encoding=encoding)

    @classmethod
    def opaque(cls, *, num_units: int, unit_nbytes: int, units_per_page: int) -> ArrayLayout:
        """Bytes that mean nothing to Zarr: uint8 [num_units, unit_nbytes], bare; whoever writes them checks them."""
        return cls(
            shape=(num_units, unit_nbytes),
            data_type="uint8",
            page_shape=(units_per_page, unit_nbytes),
            unit_shape=(1, unit_nbytes),
            bare=True,
        )

    @property
    def num_units(self) -> int:
        return ceil(self.shape[0] / self.unit_shape[0])

    @property
    def units_per_page(self) -> int:
        return self.page_shape[0] // self.unit_shape[0]

    @property
    def num_pages(self) -> int:
        return ceil(self.shape[0] / self.page_shape[0])

    @property
    def unit_nbytes(self) -> int:
        if self.encoding is not None:
            return self.encoding.unit_nbytes
        return prod(self.unit_shape) * _ITEM_NBYTES[self.data_type]

    @property
    def nbytes(self) -> int:
        """Bytes of all units, padding included, checksums and indices not."""
        return self.num_units * self.unit_nbytes

    def page_path(self, folder: Path, page: int) -> Path:
        """The shard file of `page` of the array at `folder` (Zarr's default chunk keys)."""
        return folder.joinpath("c", str(page), *("0" for _ in self.shape[1:]))

    def page_file(self, folder: Path, page: int, *, name: str, fix: str) -> ShardFile:
        """The shard file of `page`; its last units have no place where the array ends before them."""
        return ShardFile(
            path=self.page_path(folder, page),
            name=name,
            num_units=self.units_per_page,
            num_slots=min(self.units_per_page, self.num_units - page * self.units_per_page),
            unit_nbytes=self.unit_nbytes,
            bare=self.bare,
            fix=fix,
        )


def create_array(folder: Path, layout: ArrayLayout) -> None:
    """Make an array without pages at `folder`. Raises StorageError when that can't be written."""
    make_folder(folder)
    write_metadata(folder, _array_metadata(layout))


def write_metadata(folder: Path, content: bytes) -> None:
    """Write zarr.json in one step: readers see the old one or the new one."""
    with replacing(folder / METADATA) as partial:
        partial.write_bytes(content)


def sync_file(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on the disk."""
    with reporting(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_layout(folder: Path) -> ArrayLayout:
    """The layout of the array at `folder`, from its zarr.json.

    Raises StorageError when there is none, CorruptDataError when it is not an array in this package's layout.
    """
    metadata = read_metadata(folder)
    try:
        layout = _parse(metadata)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _foreign(folder) from error
    if layout is None:
        raise _foreign(folder)
    return layout


def read_metadata(folder: Path) -> dict[str, Any]:
    """The content of zarr.json at `folder`. Raises StorageError or CorruptDataError like `read_layout`."""
    path = folder / METADATA
    with reporting(path):
        content = path.read_bytes()
    try:
        metadata = json.loads(content)
    except ValueError as error:
        raise CorruptDataError("not readable as JSON", where=str(path)) from error
    if not isinstance(metadata, dict):
        raise CorruptDataError("not the metadata of a Zarr node", where=str(path))
    return metadata


def _parse(metadata: dict[str, Any]) -> ArrayLayout | None:
    """The layout that `metadata` describes; None, or an error of the lookup, when it is not one of ours."""
    (sharding,) = metadata["codecs"]
    inner = sharding["configuration"]
    serializer, *compressions, checksum = inner["codecs"]
    attributes = metadata.get("attributes", {})
    layout = ArrayLayout(
        shape=tuple(metadata["shape"]),
        data_type=metadata["data_type"],
        page_shape=tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]),
        unit_shape=tuple(inner["chunk_shape"]),
        attributes=tuple(attributes.items()),
        encoding=Encoding.parse(serializer, attributes),
        compression=Compression.parse(compressions[0]) if compressions else None,
    )
    ours = (
        metadata["zarr_format"] == 3
        and sharding["name"] == "sharding_indexed"
        and inner.get("index_location", "end") == "end"
        and len(compressions) <= 1
        and _is_checksummed([serializer, checksum])
        and _is_checksummed(inner["index_codecs"])
        and metadata["chunk_key_encoding"]["name"] == "default"
        and layout.data_type in _ITEM_NBYTES
        and layout.shape[1:] == layout.page_shape[1:] == layout.unit_shape[1:]
        and layout.page_shape[0] % layout.unit_shape[0] == 0
    )
    return layout if ours else None


def _is_checksummed(codecs: list[dict[str, Any]]) -> bool:
    serializer, checksum = codecs
    if checksum["name"] != "crc32c":
        return False
    endian = serializer.get("configuration", {}).get("endian", "little")  # bytes of one byte have no order
    name: str = serializer["name"]
    return name.startswith(ZARR_PREFIX) or (name, endian) == ("bytes", "little")


def _foreign(folder: Path) -> CorruptDataError:
    return CorruptDataError(
        "this Zarr array is not cut the way the engine reads it",
        where=str(folder),
        fix="only arrays that the engine wrote itself can be read; import the checkpoint to another folder",
    )


@lru_cache(maxsize=256)  # zarr-python takes 3 ms for what hundreds of equal regions share
def _array_metadata(layout: ArrayLayout) -> bytes:
    """zarr.json as zarr-python writes it.

    Entries of an encoding and a compression are put in afterwards: making the array then needs no codec that is
    registered with Zarr.
    """
    import zarr  # noqa: PLC0415  # 0.6 s, and plugins are listed without it
    from zarr.codecs import BytesCodec, Crc32cCodec  # noqa: PLC0415
    from zarr.core.buffer import Buffer  # noqa: PLC0415
    from zarr.storage import MemoryStore  # noqa: PLC0415

    files: dict[str, Buffer] = {}
    zarr.create_array(
        MemoryStore(files),
        shape=layout.shape,
        dtype=layout.data_type,
        shards=layout.page_shape,
        chunks=layout.unit_shape,
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=None if layout.bare else [Crc32cCodec()],
        fill_value=0,
        attributes=dict(layout.attributes),
    )
    return _with_codecs(files[METADATA].to_bytes(), layout)


def _with_codecs(content: bytes, layout: ArrayLayout) -> bytes:
    """zarr.json of an array of plain numbers with the codecs of `layout` put in."""
    metadata = json.loads(content)
    codecs: list[dict[str, Any]] = metadata["codecs"][0]["configuration"]["codecs"]
    if layout.encoding is not None:
        codecs[0] = layout.encoding.metadata
    if layout.compression is not None:
        codecs.insert(1, layout.compression.metadata)
    return json.dumps(metadata, indent=2).encode()
