"""Moving bytes to and from a tier the way a lane does it, in one call: for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from flexflow_engine.abc.tier import HostBytes, LaneContext, Region, Tier


@contextmanager
def lane(tier: Tier) -> Iterator[LaneContext]:
    """The calling thread as a lane of `tier`."""
    context = tier.lane_context()
    try:
        with context:
            yield context
    finally:
        context.close()


def read_units(tier: Tier, region: Region, first: int, count: int) -> HostBytes:
    """uint8 [count * unit_nbytes], arrived."""
    out = np.full(count * region.spec.unit_nbytes, 0xA5, dtype=np.uint8)
    with lane(tier) as context:
        tier.read(region, first, count, out)
        context.record().wait()
    return out


def write_units(tier: Tier, region: Region, first: int, data: HostBytes) -> None:
    """`data`, a whole number of units, arrived."""
    with lane(tier) as context:
        tier.write(region, first, data.size // region.spec.unit_nbytes, data)
        context.record().wait()


def random_bytes(nbytes: int, *, seed: int = 0) -> HostBytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
