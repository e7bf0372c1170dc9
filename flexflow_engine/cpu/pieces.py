"""Many small pieces in one call without Python's lock: rows in memory copied, pieces of a file read, checksums.

Lanes share that lock. Whoever gives it up for each of a hundred rows waits as often for it, milliseconds where the
others are busy; whoever keeps it while a page's checksum is computed lets all others wait.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.cpu.jit import kernel
from flexflow_engine.cpu.pointers import LINE_NBYTES, call_checksum, pointer, prefetch

_CHECKED_NBYTES, _AHEAD_NBYTES = 1024, 4096
"""Of a checksum that are computed at a time, and how far ahead of them others are asked for: what a disk has delivered
is in no near cache, and the checksum's function asks for nothing.
"""
_pread: Any = types.ExternalFunction("pread", types.int64(types.int32, types.uintp, types.uintp, types.int64))


@kernel
def copy_rows(source: HostBytes, which: NDArray[np.int64], target: HostBytes, places: NDArray[np.int64]) -> None:
    """Rows `which` [n] of `source` into rows `places` [n] of `target`: uint8, equally wide. Nothing is checked."""
    for i in range(len(which)):
        row, place = source[which[i]], target[places[i]]
        for j in range(len(row)):
            place[j] = row[j]


@kernel
def read_pieces(descriptor: int, offsets: NDArray[np.int64], nbytes: NDArray[np.int64], address: int, step: int) -> int:
    """Piece i of a file, nbytes[i] from offsets[i] on, to the memory at address + i * step; how many of the first ones
    came whole. The next one came in part, or not at all: read it again to learn why.
    """
    for i in range(len(offsets)):
        if _pread(descriptor, address + i * step, nbytes[i], offsets[i]) != nbytes[i]:
            return i
    return len(offsets)


@kernel
def checksums(function: int, address: int, step: int, nbytes: int, out: NDArray[np.uint32]) -> None:
    """Of len(out) pieces of `nbytes` each, one every `step` bytes. function: address of a C function, uint32 f(uint32
    checksum, const uint8 *data, size_t nbytes), that goes on with a checksum.
    """
    for i in range(len(out)):
        out[i] = _checksum(function, address + i * step, nbytes)


@kernel
def _checksum(function: int, address: int, nbytes: int) -> Any:
    checksum = np.uint32(0)
    for first in range(0, nbytes, _CHECKED_NBYTES):
        count = min(_CHECKED_NBYTES, nbytes - first)
        _ask_for(address + first + _AHEAD_NBYTES, count)
        checksum = call_checksum(function, checksum, address + first, count)
    return checksum


@kernel
def _ask_for(address: int, nbytes: int) -> None:
    for line in range(0, nbytes, LINE_NBYTES):
        prefetch(address + line)


@kernel
def take_units(function: int, address: int, step: int, starts: NDArray[np.int64], out: HostBytes) -> int:
    """Units, each followed by its checksum, into the rows of `out`, uint8 [n, nbytes]: unit i from address + i * step +
    starts[i]. How many of the first ones match their checksum; the next one does not. function: as of `checksums`.
    """
    nbytes = out.shape[1]
    for i in range(len(out)):
        place, target, checksum = address + i * step + starts[i], out[i].ctypes.data, np.uint32(0)
        for first in range(0, nbytes, _CHECKED_NBYTES):
            count = min(_CHECKED_NBYTES, nbytes - first)
            _ask_for(place + first + _AHEAD_NBYTES, count)
            copy_bytes(pointer(place + first, out), pointer(target + first, out), count)
            checksum = call_checksum(function, checksum, target + first, count)
        unit, stored = pointer(place + nbytes, out), np.uint32(0)
        for j in range(4):
            stored |= np.uint32(unit[j]) << np.uint32(8 * j)
        if checksum != stored:
            return i
    return len(out)


@kernel
def copy_bytes(source: Any, target: Any, nbytes: int) -> None:
    """By pointers: where an index might be negative, bytes are copied one by one."""
    for j in range(nbytes):
        target[j] = source[j]
