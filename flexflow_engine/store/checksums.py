"""CRC-32C of units (RFC 3720, appendix B.4), by the processor's own instruction: google-crc32c's function, called for
all units at once and without Python's lock where its C library is there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.store.shard import ShardFile


def checksums_of(units: HostBytes) -> NDArray[np.uint32]:
    """The checksum of each unit: little-endian uint32 [count], of uint8 [count, unit_nbytes]."""
    function = _library_function()
    if function is None:
        return np.fromiter(map(google_crc32c.value, units), "<u4", len(units))
    from flexflow_engine.cpu.pieces import checksums  # noqa: PLC0415  # Numba, and stores are listed without it

    assert units.strides[1] == 1 or units.shape[1] < 2, units.strides
    out = np.empty(len(units), "<u4")
    checksums(function, units.ctypes.data, units.strides[0], units.shape[1], out)
    return out


@cache
def _library_function() -> int | None:
    """The address of `uint32_t crc32c_value(const uint8_t*, size_t)`, of the library that google-crc32c comes with."""
    if google_crc32c.implementation != "c":
        return None
    from google_crc32c import _crc32c  # noqa: PLC0415  # only there where the library is

    try:
        return ctypes.cast(ctypes.CDLL(_crc32c.__file__).crc32c_value, ctypes.c_void_p).value
    except (OSError, AttributeError):  # a build that keeps its symbols to itself
        return None


def verify(shard: ShardFile, numbers: Sequence[int], units: HostBytes, stored: NDArray[np.uint32]) -> None:
    """Raise CorruptDataError when the units of `shard` with these numbers are not what was stored.

    units: uint8 [count, unit_nbytes]; stored: uint32 [count], their checksums then.
    """
    damaged = np.flatnonzero(checksums_of(units) != stored)
    if len(damaged):
        raise shard.corrupt(f"unit {numbers[int(damaged[0])]} of {shard.name} does not match its checksum")
