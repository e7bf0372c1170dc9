"""Reading and writing the units of weights, each followed by its checksum.

in place   | whole blocks of a unit | rest, crc32c |         one unit that begins at a block of the file, where memory
             to the caller's memory   to a buffer, copied    is aligned: every page of a matrix

through    | unit | crc32c | unit | crc32c | ...             everything else
             all to a buffer, copied

gathered   ... | unit | crc32c | ... | unit | crc32c | ...   single units, as many as the buffer takes in one call
             their blocks to the buffer, copied
"""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.store.access import OpenFile
from flexflow_engine.store.blocks import fetch, fetch_nbytes, read_into, write_from
from flexflow_engine.store.checksums import checksums_of, take, verify
from flexflow_engine.store.checksums import load_kernels as load_checking
from flexflow_engine.store.shard import BLOCK_NBYTES, CHECKSUM_NBYTES, ShardFile, round_up

_UNITS_PER_CALL = 512
"""A unit is written from two pieces of memory, and Linux takes 1024 of them in one call (IOV_MAX)."""


def read_units(shard: ShardFile, file: OpenFile, first: int, count: int, out: HostBytes) -> None:
    """Read units [first, first + count) into `out`, uint8 [count * unit_nbytes], and verify each.

    Raises CorruptDataError naming the first damaged unit, StorageError on an I/O error.
    """
    units = shard.as_units(first, count, out)
    aligned = out.ctypes.data % file.mode.memory_alignment == 0
    if count == 1 and aligned and first * shard.stride % BLOCK_NBYTES == 0:
        _read_in_place(shard, file, first, units[0])
    elif shard.stride <= fetch_nbytes(file):
        _read_through(shard, file, first, units)
    else:
        for position in range(count):
            _read_in_pieces(shard, file, first + position, units[position])


def gather_units(shard: ShardFile, file: OpenFile, units: NDArray[np.int64], out: HostBytes) -> None:
    """Read single units, int64 [n], into `out`, uint8 [n, unit_nbytes], and verify each. Raises like `read_units`."""
    step = BLOCK_NBYTES + round_up(shard.stride)  # however a unit lies in its blocks
    at_once = len(file.buffer) // step
    if not at_once:
        for unit, into in zip(units.tolist(), out, strict=True):
            read_units(shard, file, unit, 1, into)
        return
    for start in range(0, len(units), at_once):
        _gather_blocks(shard, file, units[start : start + at_once], out[start : start + at_once], step)


def load_kernels() -> None:
    """Load or compile what is called here: half a second that should be no part of a run."""
    from flexflow_engine.cpu.pieces import read_pieces  # noqa: PLC0415  # as below

    load_checking()
    nothing = np.empty(0, np.int64)
    read_pieces(-1, nothing, nothing, 0, 0)


def write_units(shard: ShardFile, descriptor: int, data: HostBytes) -> None:
    """Write `data`, uint8 [num_slots * unit_nbytes], as all units of the file, with their checksums.

    descriptor: opened without direct I/O. The index is not touched. Raises StorageError when the disk is full or fails.
    """
    units = shard.as_units(0, shard.num_slots, data)
    checksums = checksums_of(units).view(np.uint8).reshape(len(units), CHECKSUM_NBYTES)
    for start in range(0, len(units), _UNITS_PER_CALL):
        stop = start + _UNITS_PER_CALL
        pairs = zip(units[start:stop], checksums[start:stop], strict=True)
        write_from(shard, descriptor, start * shard.stride, [part for pair in pairs for part in pair])


def _read_in_place(shard: ShardFile, file: OpenFile, unit: int, out: HostBytes) -> None:
    whole = len(out) // BLOCK_NBYTES * BLOCK_NBYTES
    rest = len(out) - whole
    behind = file.buffer[: round_up(rest + CHECKSUM_NBYTES)]
    read_into(shard, file, unit * shard.stride, [out[:whole], behind], shard.stride)
    out[whole:] = behind[:rest]
    verify(shard, [unit], out[None], _stored(behind[None, rest:]))


def _gather_blocks(shard: ShardFile, file: OpenFile, units: NDArray[np.int64], out: HostBytes, step: int) -> None:
    """As many units as there are places of `step` bytes, whole blocks, in the buffer."""
    from flexflow_engine.cpu.pieces import read_pieces  # noqa: PLC0415  # Numba, and stores are listed without it

    skipped = units * shard.stride % BLOCK_NBYTES
    offsets = units * shard.stride - skipped
    nbytes = -(-(skipped + shard.stride) // BLOCK_NBYTES) * BLOCK_NBYTES
    places = file.buffer[: len(units) * step].reshape(len(units), step)
    done = 0
    while done < len(units):
        address = places[done:].ctypes.data
        with file.reading:
            done += read_pieces(file.descriptor, offsets[done:], nbytes[done:], address, step)
        if done < len(units):  # the file may end within the block of its last unit
            needed = int(skipped[done]) + shard.stride
            read_into(shard, file, int(offsets[done]), [places[done, : nbytes[done]]], needed)
            done += 1
    take(shard, units.tolist(), places, skipped, out)


def _read_through(shard: ShardFile, file: OpenFile, first: int, units: HostBytes) -> None:
    most = fetch_nbytes(file) // shard.stride
    step = max(1, ceil(len(units) / max(1, ceil(len(units) / most))))  # no small request behind large ones
    for start in range(0, len(units), step):
        some = units[start : start + step]
        found = fetch(shard, file, (first + start) * shard.stride, len(some) * shard.stride)
        numbers = range(first + start, first + start + len(some))
        take(shard, numbers, found.reshape(len(some), shard.stride), np.zeros(len(some), np.int64), some)


def _read_in_pieces(shard: ShardFile, file: OpenFile, unit: int, out: HostBytes) -> None:
    """A unit that is larger than the buffer, into `out`, uint8 [unit_nbytes]."""
    checksum = np.empty(CHECKSUM_NBYTES, np.uint8)
    for start in range(0, shard.stride, fetch_nbytes(file)):
        piece = fetch(shard, file, unit * shard.stride + start, min(fetch_nbytes(file), shard.stride - start))
        own = max(0, min(len(piece), shard.unit_nbytes - start))
        out[start : start + own] = piece[:own]
        behind = start + own - shard.unit_nbytes  # where the piece goes on in the checksum, if it does
        checksum[max(0, behind) : max(0, behind) + len(piece) - own] = piece[own:]
    verify(shard, [unit], out[None], _stored(checksum[None]))


def _stored(behind: HostBytes) -> NDArray[np.uint32]:
    """The checksums at the start of what lies behind each unit, uint8 [count, n]: uint32 [count]."""
    return np.ascontiguousarray(behind[:, :CHECKSUM_NBYTES]).view("<u4").reshape(-1)
