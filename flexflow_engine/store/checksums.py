"""CRC-32C of units (RFC 3720, appendix B.4), by the processor's own instruction."""

from __future__ import annotations

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.store.shard import ShardFile


def checksums_of(units: HostBytes) -> NDArray[np.uint32]:
    """The checksum of each unit: little-endian uint32 [count], of uint8 [count, unit_nbytes]."""
    return np.fromiter(map(google_crc32c.value, units), "<u4", len(units))


def verify(shard: ShardFile, first: int, units: HostBytes, stored: NDArray[np.uint32]) -> None:
    """Raise CorruptDataError when units [first, first + count) of `shard` are not what was stored.

    units: uint8 [count, unit_nbytes]; stored: uint32 [count], their checksums then.
    """
    damaged = np.flatnonzero(checksums_of(units) != stored)
    if len(damaged):
        raise shard.corrupt(f"unit {first + int(damaged[0])} of {shard.name} does not match its checksum")
