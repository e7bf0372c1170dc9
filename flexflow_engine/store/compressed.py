"""Page files whose units are compressed: as long as their data make them, one behind another, found by the index.

    | unit 0, compressed | crc32c | unit 1, compressed | crc32c | ... | index | crc32c |

The checksum is of the compressed bytes. A file's *bounds* are where its units begin and the last one ends, int64
[num_slots + 1]; the shard's stride means nothing here.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from flexflow_engine.abc.compressor import Compressor
from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.errors import CorruptDataError
from flexflow_engine.files import reporting
from flexflow_engine.store.access import OpenFile
from flexflow_engine.store.blocks import fetch, fetch_nbytes, write_from
from flexflow_engine.store.checksums import checksums_of
from flexflow_engine.store.index import fetch_index
from flexflow_engine.store.shard import BLOCK_NBYTES, CHECKSUM_NBYTES, ShardFile, index_entries, pack_index, round_up

Bounds = NDArray[np.int64]


def write_compressed(shard: ShardFile, descriptor: int, data: HostBytes, compressor: Compressor) -> None:
    """Write a whole file: `data`, uint8 [num_slots * unit_nbytes], and the index. Raises StorageError."""
    pieces: list[HostBytes] = []
    for unit in shard.as_units(0, shard.num_slots, data):
        compressed = compressor.compress(unit)
        pieces += [compressed, _checksum(compressed)]
    lengths = [len(unit) + CHECKSUM_NBYTES for unit in pieces[::2]]
    pieces.append(_index(shard, np.cumsum([0, *lengths])))
    write_from(shard, descriptor, 0, [np.concatenate(pieces)])


def read_bounds(shard: ShardFile, file: OpenFile, compressor: Compressor) -> Bounds:
    """The bounds that the file's index tells.

    Raises CorruptDataError when the file is cut short, or its index is damaged or of another layout.
    """
    end = _index_offset(shard, file.descriptor)
    found = fetch_index(shard, file, end)
    lengths = index_entries(found)[: shard.num_slots, 1].astype(np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    whole = bounds[-1] == end and np.array_equal(found, _index(shard, bounds))
    if not whole or lengths.min() <= CHECKSUM_NBYTES or lengths.max() > _max_length(shard, compressor):
        raise shard.corrupt(f"the index of a page of {shard.name} is damaged, or the page is cut short")
    return bounds


def read_compressed(
    shard: ShardFile, file: OpenFile, bounds: Bounds, first: int, out: HostBytes, *, compressor: Compressor
) -> None:
    """Fill `out`, uint8 [n * unit_nbytes], with the n units from `first` on, each verified and decompressed.

    The file's buffer has `buffer_nbytes` at least. Raises CorruptDataError naming the first damaged unit, StorageError
    on an I/O error.
    """
    units = shard.as_units(first, len(out) // shard.unit_nbytes, out)
    stop = first + len(units)
    start = first
    while start < stop:
        end = min(stop, int(np.searchsorted(bounds, bounds[start] + fetch_nbytes(file), side="right")) - 1)
        assert end > start, "the buffer is smaller than a unit"
        found = fetch(shard, file, int(bounds[start]), int(bounds[end] - bounds[start]))
        for unit in range(start, end):
            place = found[bounds[unit] - bounds[start] : bounds[unit + 1] - bounds[start]]
            _decompress(shard, unit, place, units[unit - first], compressor)
        start = end


def buffer_nbytes(unit_nbytes: int, compressor: Compressor) -> int:
    """What a buffer must have so that any unit of `unit_nbytes` can be read through it."""
    return round_up(compressor.max_nbytes(unit_nbytes) + CHECKSUM_NBYTES) + BLOCK_NBYTES


def units_nbytes(shard: ShardFile) -> int:
    """Bytes that a file's units take where they lie one behind another, checksums not counted, by the file's size.

    Raises StorageError.
    """
    with reporting(shard.path):
        size = shard.path.stat().st_size
    return size - shard.index_nbytes - CHECKSUM_NBYTES * shard.num_slots


def _index_offset(shard: ShardFile, descriptor: int) -> int:
    """Where the index of an open file begins. Raises CorruptDataError when the file is too short to have one."""
    with reporting(shard.path):
        offset = os.fstat(descriptor).st_size - shard.index_nbytes
    if offset < 0:
        raise shard.corrupt(f"a page of {shard.name} is cut short")
    return offset


def _decompress(shard: ShardFile, unit: int, place: HostBytes, out: HostBytes, compressor: Compressor) -> None:
    """place: compressed bytes and their checksum."""
    data = place[:-CHECKSUM_NBYTES]
    if not np.array_equal(_checksum(data), place[-CHECKSUM_NBYTES:]):
        raise shard.corrupt(f"unit {unit} of {shard.name} does not match its checksum")
    try:
        compressor.decompress(data, out)
    except CorruptDataError as error:
        raise shard.corrupt(f"unit {unit} of {shard.name} can't be decompressed: {error.what}") from error


def _index(shard: ShardFile, bounds: Bounds) -> HostBytes:
    return pack_index(bounds[:-1], np.diff(bounds), num_units=shard.num_units)


def _max_length(shard: ShardFile, compressor: Compressor) -> int:
    return compressor.max_nbytes(shard.unit_nbytes) + CHECKSUM_NBYTES


def _checksum(data: HostBytes) -> HostBytes:
    return checksums_of(data[None]).view(np.uint8)
