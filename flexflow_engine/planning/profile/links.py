"""A tier's link, both directions: alone, and what others leave of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from statistics import median

import numpy as np

from flexflow_engine.abc.hardware import Beside, Direction, Link
from flexflow_engine.abc.tier import HOST, RegionSpec, Tier
from flexflow_engine.planning.profile.load import Load, rate, rates
from flexflow_engine.planning.profile.sizes import Sizes
from flexflow_engine.runtime.memory import Place, transfer_in, transfer_out

SMALL_CALLS = 15
"""Small transfers of which the median counts."""
DIRECTIONS: tuple[Direction, ...] = ("read", "write")


class Probe:
    """Transfers between a far tier and the near one: where the model computes, or host memory where bytes are staged.

    Owns regions on both and a lane context; the tiers stay their opener's.
    """

    def __init__(self, far: Tier, near: Tier, sizes: Sizes) -> None:
        """Raises TierError or StorageError where there is no room."""
        self.far, self.near, self.sizes = far, near, sizes
        owner = far if far.memory not in {None, HOST} else near
        self._context = owner.lane_context()
        self._workers = max(far.read_concurrency, far.write_concurrency)
        name = f"profile.{far.label}"
        self._far = far.allocate(RegionSpec(name=name, num_units=sizes.pages, unit_nbytes=sizes.page_nbytes))
        self._near = near.allocate(RegionSpec(name=name, num_units=self._workers, unit_nbytes=sizes.page_nbytes))
        self._far_small = far.allocate(RegionSpec(name=f"{name}.s", num_units=1, unit_nbytes=sizes.small_nbytes))
        self._near_small = near.allocate(RegionSpec(name=f"{name}.s", num_units=1, unit_nbytes=sizes.small_nbytes))
        self._fill()

    def close(self) -> None:
        for region in (self._near_small, self._near):
            self.near.free(region)
        for region in (self._far_small, self._far):
            self.far.free(region)
        self._context.close()

    def load(self, direction: Direction) -> Load:
        """Pages carried without end, as many at once as the lane is wide, in bytes."""
        workers = self.far.read_concurrency if direction == "read" else self.far.write_concurrency
        turns = [cycle(range(worker, self.sizes.pages, workers)) for worker in range(workers)]

        def work(worker: int) -> None:
            far = Place(self.far, self._far, next(turns[worker]), 1)
            self._carry(direction, far, Place(self.near, self._near, worker, 1))

        return Load(work, float(self.sizes.page_nbytes), workers)

    def latency(self, direction: Direction, bytes_per_s: float) -> float:
        """Seconds that a small transfer takes beyond what its bytes take."""
        far, near = Place(self.far, self._far_small, 0, 1), Place(self.near, self._near_small, 0, 1)
        self._carry(direction, far, near)
        seconds = median(_elapsed(lambda: self._carry(direction, far, near)) for _ in range(SMALL_CALLS))
        return max(0.0, seconds - self.sizes.small_nbytes / bytes_per_s)

    def _carry(self, direction: Direction, far: Place, near: Place) -> None:
        with self._context:
            (transfer_in if direction == "read" else transfer_out)(far=far, near=near)
            self._context.record().wait()

    def _fill(self) -> None:
        """Write everything once: bytes that were never written may cost nothing to read."""
        numbers = np.random.default_rng(0).integers(0, 256, self.sizes.page_nbytes, dtype=np.uint8)
        with self._context:
            self.near.write(self._near, 0, 1, numbers)
            self.near.write(self._near_small, 0, 1, numbers[: self.sizes.small_nbytes])
            self._context.record().wait()
        for page in range(self.sizes.pages):
            self._carry("write", Place(self.far, self._far, page, 1), Place(self.near, self._near, 0, 1))
        small = Place(self.far, self._far_small, 0, 1), Place(self.near, self._near_small, 0, 1)
        self._carry("write", *small)


def measure_link(probe: Probe, direction: Direction, others: Sequence[Probe], compute: Load) -> Link:
    """others: the probes of all other tiers. compute: what the processor does meanwhile."""
    seconds, load = probe.sizes.link_seconds, probe.load(direction)
    reverse = probe.load("write" if direction == "read" else "read")
    alone = rate(load, seconds)

    def left(*busy: Load) -> float:
        return min(1.0, rates([load, *busy], seconds)[0] / alone)

    beside_processor, processor = rates([load, compute], seconds)
    return Link(
        bytes_per_s=alone,
        latency_s=probe.latency(direction, alone),
        beside=Beside(
            reverse=left(reverse),
            links=left(*(other.load("read") for other in others)) if others else 1.0,
            processors=min(1.0, beside_processor / alone),
        ),
        leaves_processors=min(1.0, processor / rate(compute, seconds)),
    )


def _elapsed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
