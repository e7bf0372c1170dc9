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
from flexflow_engine.errors import CorruptDataError
from flexflow_engine.store.shard import CHECKSUM_NBYTES, ShardFile


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
    """The address of `uint32_t crc32c_extend(uint32_t, const uint8_t *, size_t)` in google-crc32c's library."""
    if google_crc32c.implementation != "c":
        return None
    from google_crc32c import _crc32c  # noqa: PLC0415  # only there where the library is

    try:
        return ctypes.cast(ctypes.CDLL(_crc32c.__file__).crc32c_extend, ctypes.c_void_p).value
    except (OSError, AttributeError):  # a build that keeps its symbols to itself
        return None


def verify(shard: ShardFile, numbers: Sequence[int], units: HostBytes, stored: NDArray[np.uint32]) -> None:
    """Raise CorruptDataError when the units of `shard` with these numbers are not what was stored.

    units: uint8 [count, unit_nbytes]; stored: uint32 [count], their checksums then.
    """
    damaged = np.flatnonzero(checksums_of(units) != stored)
    if len(damaged):
        raise _corrupt(shard, numbers[int(damaged[0])])


def take(
    shard: ShardFile, numbers: Sequence[int], places: HostBytes, starts: NDArray[np.int64], out: HostBytes
) -> None:
    """Copy units out of where they were read to, and raise CorruptDataError when one is not what was stored.

    places: uint8 [count, n]; unit i of these numbers begins at byte starts[i] of row i, and its checksum follows it.
    out: uint8 [count, unit_nbytes].
    """
    function = _library_function()
    if function is None:
        stored = np.empty((len(out), CHECKSUM_NBYTES), np.uint8)
        for place, start, into, checksum in zip(places, starts.tolist(), out, stored, strict=True):
            into[:], checksum[:] = np.split(place[start : start + shard.stride], [shard.unit_nbytes])
        verify(shard, numbers, out, stored.view("<u4").reshape(-1))
        return
    from flexflow_engine.cpu.pieces import take_units  # noqa: PLC0415  # as above

    assert len(places) == len(starts) == len(out), (places.shape, starts.shape, out.shape)
    assert out.shape[1] == shard.unit_nbytes, (out.shape, shard.unit_nbytes)
    assert places.strides[1] == 1, places.strides
    assert out.flags.c_contiguous
    assert ((starts >= 0) & (starts + shard.stride <= places.shape[1])).all(), (starts, places.shape)
    matching = take_units(function, places.ctypes.data, places.strides[0], starts, out)
    if matching < len(out):
        raise _corrupt(shard, numbers[matching])


def load_kernels() -> None:
    """Load or compile what is called here."""
    checksums_of(np.zeros((1, 1), np.uint8))
    if (function := _library_function()) is not None:
        from flexflow_engine.cpu.pieces import take_units  # noqa: PLC0415  # as above

        take_units(function, 0, 0, np.empty(0, np.int64), np.empty((0, 1), np.uint8))


def _corrupt(shard: ShardFile, number: int) -> CorruptDataError:
    return shard.corrupt(f"unit {number} of {shard.name} does not match its checksum")
