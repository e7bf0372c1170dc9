"""One shard file of Zarr's `sharding_indexed` codec, with every unit at a fixed place.

    offset  0                 S                 2 S             slots * S
            | unit 0 | crc32c | unit 1 | crc32c |  ...          | index                    | crc32c |
            S = unit_nbytes + 4                                   (offset, nbytes) per unit

All integers are little-endian: checksums are uint32, the index uint64, and a unit that was never written has
2^64 - 1 for both of its numbers (Zarr v3, sharding codec, "binary shard format", index at the end).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.errors import CorruptDataError
from flexflow_engine.store.failures import reporting

CHECKSUM_NBYTES = 4
_ENTRY_NBYTES = 16
_MISSING = np.uint64(2**64 - 1)
_UNITS_PER_CALL = 512
"""A unit and its checksum are two buffers, and Linux takes 1024 of them in one call (IOV_MAX)."""

_Move = Callable[[int, Sequence[Any], int], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """Where the units of one file lie. Opens nothing by itself: callers pass a descriptor of `path`.

    Reads and writes may run in several threads on one descriptor, as long as their units differ.
    """

    path: Path
    name: str
    """The tensor or region, for messages."""
    num_units: int
    """Units that the index speaks of."""
    num_slots: int
    """Units that have a place; fewer than `num_units` in the last page of an array."""
    unit_nbytes: int
    fix: str
    """What would mend a damaged file, for messages."""

    @property
    def stride(self) -> int:
        """Bytes from one unit to the next."""
        return self.unit_nbytes + CHECKSUM_NBYTES

    @property
    def index_nbytes(self) -> int:
        return _ENTRY_NBYTES * self.num_units + CHECKSUM_NBYTES

    @property
    def nbytes(self) -> int:
        """Size of the file once its index is written."""
        return self.num_slots * self.stride + self.index_nbytes

    def open_complete(self) -> int:
        """Open a finished file for reading; size and index are checked. The caller closes the descriptor.

        Raises StorageError when it can't be opened, CorruptDataError when it is not a whole shard of this layout.
        """
        with reporting(self.path):
            descriptor = os.open(self.path, os.O_RDONLY)
        try:
            self._check_complete(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def read_units(self, descriptor: int, first: int, count: int, out: HostBytes) -> None:
        """Read units [first, first + count) into `out`, uint8 [count * unit_nbytes], and verify each.

        Raises CorruptDataError naming the first damaged unit, StorageError on an I/O error.
        """
        units = self._as_units(first, count, out)
        checksums = np.empty((count, CHECKSUM_NBYTES), np.uint8)
        self._move_units(os.preadv, descriptor, first, units, checksums)
        stored = checksums.view("<u4").reshape(count)
        for position in range(count):
            if google_crc32c.value(units[position]) != stored[position]:
                raise self._corrupt(f"unit {first + position} of {self.name} does not match its checksum")

    def write_units(self, descriptor: int, first: int, count: int, data: HostBytes) -> None:
        """Write `data`, uint8 [count * unit_nbytes], as units [first, first + count), with their checksums.

        The index is not touched. Raises StorageError when the disk is full or the write fails.
        """
        units = self._as_units(first, count, data)
        values = np.fromiter((google_crc32c.value(unit) for unit in units), "<u4", count)
        checksums = values.view(np.uint8).reshape(count, CHECKSUM_NBYTES)
        self._move_units(os.pwritev, descriptor, first, units, checksums)

    def write_index(self, descriptor: int, written: NDArray[np.bool_]) -> None:
        """Write the index behind the last slot; written: bool [num_slots], which units hold data."""
        self._move(os.pwritev, descriptor, [self._index(written)], self.num_slots * self.stride)

    def read_index(self, descriptor: int) -> NDArray[np.bool_]:
        """Which units hold data, bool [num_slots]. Raises CorruptDataError when the index is not one of ours."""
        found = np.empty(self.index_nbytes, np.uint8)
        self._move(os.preadv, descriptor, [found], self.num_slots * self.stride)
        entries = found[:-CHECKSUM_NBYTES].view("<u8").reshape(self.num_units, 2)
        written: NDArray[np.bool_] = entries[: self.num_slots, 0] != _MISSING
        if not np.array_equal(found, self._index(written)):
            raise self._corrupt(f"the index of {self.name} is damaged, or of another layout")
        return written

    def _check_complete(self, descriptor: int) -> None:
        with reporting(self.path):
            found = os.fstat(descriptor).st_size
        if found != self.nbytes:
            raise self._corrupt(f"a page of {self.name} has {found} bytes instead of {self.nbytes}")
        if not self.read_index(descriptor).all():
            raise self._corrupt(f"a page of {self.name} lacks some of its units")

    def _index(self, written: NDArray[np.bool_]) -> HostBytes:
        entries = np.full((self.num_units, 2), _MISSING, "<u8")
        places = np.flatnonzero(written)
        entries[places, 0] = places * self.stride
        entries[places, 1] = self.stride
        checksum = np.array([google_crc32c.value(entries.view(np.uint8).reshape(-1))], "<u4")
        return np.concatenate([entries.view(np.uint8).reshape(-1), checksum.view(np.uint8)])

    def _as_units(self, first: int, count: int, flat: HostBytes) -> HostBytes:
        """`flat` as [count, unit_nbytes], sharing its memory."""
        assert flat.flags.c_contiguous
        assert flat.shape == (count * self.unit_nbytes,), (flat.shape, count, self.unit_nbytes)
        assert 0 <= first <= first + count <= self.num_slots, (first, count, self.num_slots)
        return flat.reshape(count, self.unit_nbytes)

    def _move_units(self, move: _Move, descriptor: int, first: int, units: HostBytes, checksums: HostBytes) -> None:
        """Scatter or gather units [count, unit_nbytes] and checksums [count, 4], which alternate in the file."""
        for start in range(0, len(units), _UNITS_PER_CALL):
            stop = min(start + _UNITS_PER_CALL, len(units))
            buffers = [part for i in range(start, stop) for part in (units[i], checksums[i])]
            self._move(move, descriptor, buffers, (first + start) * self.stride)

    def _move(self, move: _Move, descriptor: int, buffers: list[HostBytes], offset: int) -> None:
        """Move every byte of `buffers`, in as many calls as the system takes."""
        while buffers:
            with reporting(self.path):
                moved = move(descriptor, buffers, offset)
            if moved == 0:
                raise self._corrupt(f"a page of {self.name} ends at byte {offset}, before its last unit")
            offset += moved
            buffers = _behind(buffers, moved)

    def _corrupt(self, what: str) -> CorruptDataError:
        return CorruptDataError(what, where=str(self.path), fix=self.fix)


def _behind(buffers: list[HostBytes], moved: int) -> list[HostBytes]:
    """What is left of `buffers` after their first `moved` bytes."""
    for position, buffer in enumerate(buffers):
        if moved < len(buffer):
            return [buffer[moved:], *buffers[position + 1 :]]
        moved -= len(buffer)
    return []
