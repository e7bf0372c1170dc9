"""numcodecs' side of a compressor, and what the formats say of sizes.

numcodecs decompresses into the caller's memory without Python's lock. It does not mind memory that is larger than what
it fills, so the size that the data declare is compared first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from flexflow_engine.abc.compressor import Compressor
from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.errors import CorruptDataError

_HEADER_NBYTES = 18
"""The longest header: zstd's magic number, descriptor, window, dictionary and size."""
_ZSTD_SMALL = 2**17
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class NumcodecsCodec(Protocol):
    """What is used of `numcodecs.abc.Codec`."""

    def encode(self, buf: Any) -> Any: ...

    def decode(self, buf: Any, out: Any = None) -> Any: ...


class NumcodecsCompressor(Compressor):
    """One codec of numcodecs with its settings."""

    def __init__(
        self,
        zarr_name: str,
        configuration: Mapping[str, Any],
        codec: NumcodecsCodec,
        *,
        bound: Callable[[int], int],
        size: Callable[[bytes, int], int | None],
    ) -> None:
        """zarr_name, configuration: Zarr's words for `codec`. bound: the most that so many bytes take. size: of what
        was compressed, from the first bytes of the result and its length; None if they don't tell it.
        """
        self._zarr = {"name": zarr_name, "configuration": dict(configuration)}
        self._codec, self._bound, self._size = codec, bound, size

    def zarr_codec(self) -> Mapping[str, Any]:
        return self._zarr

    def max_nbytes(self, nbytes: int) -> int:
        return self._bound(nbytes)

    def compress(self, data: HostBytes) -> HostBytes:
        return np.frombuffer(self._codec.encode(data), np.uint8)

    def decompress(self, data: HostBytes, out: HostBytes) -> None:
        declared = self._size(data[:_HEADER_NBYTES].tobytes(), len(data))
        if declared != len(out):
            what = "what they make is not declared" if declared is None else f"they declare {declared} bytes"
            raise CorruptDataError(f"{what}, and {len(out)} are expected")
        try:
            self._codec.decode(data, out)
        except (RuntimeError, ValueError) as error:
            raise CorruptDataError(str(error)) from error


def zstd_bound(nbytes: int) -> int:
    """ZSTD_COMPRESSBOUND of zstd.h."""
    return nbytes + (nbytes >> 8) + (max(0, _ZSTD_SMALL - nbytes) >> 11)


def zstd_size(header: bytes, length: int) -> int | None:
    """Frame_Content_Size of RFC 8878, section 3.1.1.1."""
    if len(header) < 5 or not header.startswith(_ZSTD_MAGIC):
        return None
    descriptor = header[4]
    single_segment = descriptor >> 5 & 1
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    if width == 0 or len(header) < start + width:
        return None
    return int.from_bytes(header[start : start + width], "little") + (256 if width == 2 else 0)


def blosc_bound(nbytes: int) -> int:
    """BLOSC_MAX_OVERHEAD of blosc.h: a header, and the bytes as they were."""
    return nbytes + 16


def blosc_size(header: bytes, length: int) -> int | None:
    """`nbytes` of Blosc's header, behind versions, flags and type size; `cbytes` is the length that Blosc reads."""
    cbytes = int.from_bytes(header[12:16], "little")
    return int.from_bytes(header[4:8], "little") if len(header) >= 16 and cbytes == length else None


def lz4_bound(nbytes: int) -> int:
    """LZ4_COMPRESSBOUND of lz4.h, and the size that numcodecs puts in front."""
    return nbytes + nbytes // 255 + 16 + 4


def lz4_size(header: bytes, length: int) -> int | None:
    """What numcodecs puts in front."""
    return int.from_bytes(header[:4], "little") if len(header) >= 4 else None
