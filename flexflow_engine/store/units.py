"""Reading and writing units of a shard file, each with its checksum.

in place   | whole blocks of a unit | rest, crc32c, padding | whole blocks of the next | ...
to the caller's memory   to a buffer, copied     where they begin at blocks in the file, and aligned in memory

through    | unit | crc32c | unit | crc32c | ...
all to a buffer, copied                          everywhere else
"""

from __future__ import annotations

import google_crc32c
import numpy as np

from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.store.access import OpenFile
from flexflow_engine.store.blocks import fetch, fetch_nbytes, read_into, write_from
from flexflow_engine.store.shard import BLOCK_NBYTES, CHECKSUM_NBYTES, ShardFile, round_up

_UNITS_PER_CALL = 512
"""A unit in place is two pieces of memory, and Linux takes 1024 of them in one call (IOV_MAX)."""


def read_units(shard: ShardFile, file: OpenFile, first: int, count: int, out: HostBytes) -> None:
    """Read units [first, first + count) into `out`, uint8 [count * unit_nbytes], and verify each.

    Several threads may read and write units of one file, as long as the units differ. Raises CorruptDataError naming
    the first damaged unit, StorageError on an I/O error.
    """
    units = shard.as_units(first, count, out)
    if shard.begin_at_blocks(first, count) and _is_aligned(units, file):
        _read_in_place(shard, file, first, units)
    elif shard.stride <= fetch_nbytes(file):
        _read_through(shard, file, first, units)
    else:
        for position in range(count):
            _read_in_pieces(shard, file, first + position, units[position])


def write_units(shard: ShardFile, file: OpenFile, first: int, count: int, data: HostBytes) -> None:
    """Write `data`, uint8 [count * unit_nbytes], as units [first, first + count), with their checksums.

    The index is not touched. Raises StorageError when the disk is full or the write fails.
    """
    assert shard.begin_at_blocks(first, count) or file.mode.memory_alignment == 1, "direct I/O writes whole blocks"
    units = shard.as_units(first, count, data)
    values = np.fromiter(map(google_crc32c.value, units), "<u4", count)
    checksums = values.view(np.uint8).reshape(count, CHECKSUM_NBYTES)
    if _is_aligned(units, file):
        _write_in_place(shard, file, first, units, checksums)
    elif shard.stride <= len(file.buffer):
        _write_through(shard, file, first, units, checksums)
    else:
        for position in range(count):
            _write_in_pieces(shard, file, first + position, units[position], checksums[position])


def _is_aligned(units: HostBytes, file: OpenFile) -> bool:
    """Whether direct I/O takes the memory of units [count, unit_nbytes] as it is."""
    alignment = file.mode.memory_alignment
    return units.ctypes.data % alignment == 0 and (len(units) == 1 or units.shape[1] % alignment == 0)


def _read_in_place(shard: ShardFile, file: OpenFile, first: int, units: HostBytes) -> None:
    whole = _whole_blocks_nbytes(shard)
    rest = shard.unit_nbytes - whole
    tail_nbytes = round_up(shard.stride) - whole  # of a file's only unit, with the index behind it
    step = min(_UNITS_PER_CALL, len(file.buffer) // tail_nbytes)
    for start in range(0, len(units), step):
        some = units[start : start + step]
        tails = file.buffer[: len(some) * tail_nbytes].reshape(len(some), tail_nbytes)
        needed = (len(some) - 1) * shard.stride + shard.unit_nbytes + CHECKSUM_NBYTES
        read_into(shard, file, (first + start) * shard.stride, _alternating(some[:, :whole], tails), needed)
        some[:, whole:] = tails[:, :rest]
        _verify(shard, first + start, some, tails[:, rest : rest + CHECKSUM_NBYTES])


def _read_through(shard: ShardFile, file: OpenFile, first: int, units: HostBytes) -> None:
    step = fetch_nbytes(file) // shard.stride
    for start in range(0, len(units), step):
        some = units[start : start + step]
        found = fetch(shard, file, (first + start) * shard.stride, len(some) * shard.stride)
        found = found.reshape(len(some), shard.stride)
        np.copyto(some, found[:, : shard.unit_nbytes])
        _verify(shard, first + start, some, found[:, shard.unit_nbytes :][:, :CHECKSUM_NBYTES])


def _read_in_pieces(shard: ShardFile, file: OpenFile, unit: int, out: HostBytes) -> None:
    """A unit that is larger than the buffer, into `out`, uint8 [unit_nbytes]."""
    checksum = np.empty(CHECKSUM_NBYTES, np.uint8)
    end = shard.unit_nbytes + CHECKSUM_NBYTES
    for start in range(0, end, fetch_nbytes(file)):
        piece = fetch(shard, file, unit * shard.stride + start, min(fetch_nbytes(file), end - start))
        own = max(0, min(len(piece), shard.unit_nbytes - start))
        out[start : start + own] = piece[:own]
        behind = start + own - shard.unit_nbytes  # where the piece goes on in the checksum, if it does
        checksum[max(0, behind) : max(0, behind) + len(piece) - own] = piece[own:]
    _verify(shard, unit, out[None], checksum[None])


def _verify(shard: ShardFile, first: int, units: HostBytes, checksums: HostBytes) -> None:
    """units [count, unit_nbytes], checksums [count, 4]: as they were stored."""
    stored = np.ascontiguousarray(checksums).view("<u4").reshape(len(units)).tolist()
    found = list(map(google_crc32c.value, units))
    if found != stored:
        position = next(i for i, pair in enumerate(zip(found, stored, strict=True)) if pair[0] != pair[1])
        raise shard.corrupt(f"unit {first + position} of {shard.name} does not match its checksum")


def _write_in_place(shard: ShardFile, file: OpenFile, first: int, units: HostBytes, checksums: HostBytes) -> None:
    whole = _whole_blocks_nbytes(shard)
    step = min(_UNITS_PER_CALL, len(file.buffer) // (shard.stride - whole))
    for start in range(0, len(units), step):
        some = units[start : start + step]
        tails = _packed(shard, file, some[:, whole:], checksums[start : start + step])
        write_from(shard, file.descriptor, (first + start) * shard.stride, _alternating(some[:, :whole], tails))


def _write_through(shard: ShardFile, file: OpenFile, first: int, units: HostBytes, checksums: HostBytes) -> None:
    step = len(file.buffer) // shard.stride
    for start in range(0, len(units), step):
        packed = _packed(shard, file, units[start : start + step], checksums[start : start + step])
        write_from(shard, file.descriptor, (first + start) * shard.stride, [packed.reshape(-1)])


def _write_in_pieces(shard: ShardFile, file: OpenFile, unit: int, data: HostBytes, checksum: HostBytes) -> None:
    """A unit that is larger than the buffer: uint8 [unit_nbytes]."""
    whole, offset = _whole_blocks_nbytes(shard), unit * shard.stride
    for start in range(0, whole, len(file.buffer)):
        part = data[start : min(start + len(file.buffer), whole)]
        file.buffer[: len(part)] = part
        write_from(shard, file.descriptor, offset + start, [file.buffer[: len(part)]])
    write_from(shard, file.descriptor, offset + whole, [_packed(shard, file, data[None, whole:], checksum[None])[0]])


def _packed(shard: ShardFile, file: OpenFile, ends: HostBytes, checksums: HostBytes) -> HostBytes:
    """The ends of units [count, n] as the file has them, with checksum and padding, in the buffer."""
    count, nbytes = ends.shape
    width = nbytes + shard.stride - shard.unit_nbytes
    packed = file.buffer[: count * width].reshape(count, width)
    packed[:, :nbytes] = ends
    packed[:, nbytes : nbytes + CHECKSUM_NBYTES] = checksums
    packed[:, nbytes + CHECKSUM_NBYTES :] = 0
    return packed


def _whole_blocks_nbytes(shard: ShardFile) -> int:
    """Bytes of a unit that fill blocks of the file, where the unit begins at a block."""
    return shard.unit_nbytes // BLOCK_NBYTES * BLOCK_NBYTES


def _alternating(units: HostBytes, tails: HostBytes) -> list[HostBytes]:
    """The pieces of memory in the order of the file; both [count, bytes]."""
    return [part for pair in zip(units, tails, strict=True) for part in pair]
