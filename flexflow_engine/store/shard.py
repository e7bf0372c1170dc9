"""One shard file of Zarr's `sharding_indexed` codec, with every unit at a fixed place.

    offset  0                 S                 2 S             slots * S
            | unit 0 | crc32c | unit 1 | crc32c |  ...          | index                    | crc32c |
            S = unit_nbytes + 4                                   (offset, nbytes) per unit

    offset  0        S        2 S           at a block
            | unit 0 | unit 1 |  ...        | index ...           bare: S = unit_nbytes, and whoever wrote the units
                                                                  has their checksums

All integers are little-endian: checksums are uint32, the index uint64, and a unit that was never written has
2^64 - 1 for both of its numbers (Zarr v3, sharding codec, "binary shard format", index at the end).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.errors import CorruptDataError

BLOCK_NBYTES = 4096
"""Direct I/O begins and ends at multiples of this in a file: the largest block of the disks of today."""
CHECKSUM_NBYTES = 4
_ENTRY_NBYTES = 16
_MISSING = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """Where the units of one file lie, and what its index says. Plain data: `units.py` and `index.py` do the I/O."""

    path: Path
    name: str
    """The tensor or region, for messages."""
    num_units: int
    """Units that the index speaks of."""
    num_slots: int
    """Units that have a place; fewer than `num_units` in the last page of an array."""
    unit_nbytes: int
    bare: bool
    """Whether units follow each other without checksums."""
    fix: str
    """What would mend a damaged file, for messages."""

    @property
    def stride(self) -> int:
        """Bytes from one unit to the next."""
        return self.unit_nbytes if self.bare else self.unit_nbytes + CHECKSUM_NBYTES

    @property
    def index_nbytes(self) -> int:
        return _ENTRY_NBYTES * self.num_units + CHECKSUM_NBYTES

    @property
    def index_offset(self) -> int:
        end = self.num_slots * self.stride
        return round_up(end) if self.bare else end

    @property
    def nbytes(self) -> int:
        """Size of the file once its index is written."""
        return self.index_offset + self.index_nbytes

    def index(self, written: NDArray[np.bool_]) -> HostBytes:
        """The index with its checksum, uint8 [index_nbytes]; written: bool [num_slots], which units hold data."""
        entries = np.full((self.num_units, 2), _MISSING, "<u8")
        places = np.flatnonzero(written)
        entries[places, 0] = places * self.stride
        entries[places, 1] = self.stride
        return _checksummed(entries)

    def parse_index(self, found: HostBytes) -> NDArray[np.bool_]:
        """Which units hold data, bool [num_slots]. Raises CorruptDataError when the index is not one of ours."""
        written: NDArray[np.bool_] = index_entries(found)[: self.num_slots, 0] != _MISSING
        if not np.array_equal(found, self.index(written)):
            raise self.corrupt(f"the index of {self.name} is damaged, or of another layout")
        return written

    def as_units(self, first: int, count: int, flat: HostBytes) -> HostBytes:
        """`flat` as [count, unit_nbytes], sharing its memory."""
        assert flat.flags.c_contiguous
        assert flat.shape == (count * self.unit_nbytes,), (flat.shape, count, self.unit_nbytes)
        assert 0 <= first <= first + count <= self.num_slots, (first, count, self.num_slots)
        return flat.reshape(count, self.unit_nbytes)

    def corrupt(self, what: str) -> CorruptDataError:
        return CorruptDataError(what, where=str(self.path), fix=self.fix)


def pack_index(offsets: NDArray[np.int64], nbytes: NDArray[np.int64], *, num_units: int) -> HostBytes:
    """The index of a file whose first units lie at these offsets, with these lengths, and that has no others."""
    entries = np.full((num_units, 2), _MISSING, "<u8")
    entries[: len(offsets)] = np.stack([offsets, nbytes], axis=1).astype("<u8")
    return _checksummed(entries)


def index_entries(index: HostBytes) -> NDArray[np.uint64]:
    """(offset, nbytes) of each unit, uint64 [num_units, 2], as an index says it; its checksum is not looked at."""
    return index[:-CHECKSUM_NBYTES].view("<u8").reshape(-1, 2)


def round_up(nbytes: int) -> int:
    """The next multiple of a block."""
    return nbytes + -nbytes % BLOCK_NBYTES


def _checksummed(entries: NDArray[np.uint64]) -> HostBytes:
    data = entries.view(np.uint8).reshape(-1)
    return np.concatenate([data, np.array([google_crc32c.value(data)], "<u4").view(np.uint8)])
