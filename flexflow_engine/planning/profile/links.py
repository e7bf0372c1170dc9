"""A tier's link, both directions: alone, and what others leave of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from statistics import median

import numpy as np

from flexflow_engine.abc.hardware import Beside, Direction, Link
from flexflow_engine.abc.tier import HOST, Completion, Region, RegionSpec, StoredTensor, Tier
from flexflow_engine.errors import CorruptDataError, StorageError
from flexflow_engine.planning.profile.extent import Extent
from flexflow_engine.planning.profile.load import Load, rate, rates
from flexflow_engine.planning.profile.stored import cut_alike, cut_most, stored_tensors
from flexflow_engine.runtime.memory import Place, transfer_in, transfer_out

SMALL_CALLS = 15
"""Small transfers of which the median counts."""
GATHERS = 5
"""Calls for single units of which the median counts."""
IN_FLIGHT = 3
"""Pages that a device has been given when the oldest is waited for."""


@dataclass(frozen=True, slots=True)
class _Pages:
    """Pages of a far tier, alike, and a near region with room for one for each worker."""

    spans: tuple[tuple[Region, int, int], ...]
    """Region, first unit, number of units."""
    near: Region
    units: int
    """A page's, but for the last one of a region."""

    @property
    def nbytes(self) -> float:
        """Of a page, on average."""
        return sum(count * region.spec.unit_nbytes for region, _, count in self.spans) / len(self.spans)


class Probe:
    """Transfers between a far tier and the near one: where the model computes, or host memory where bytes are staged.

    A disk reads imported weights, if there are any: what it has just written it may have somewhere else yet. And it
    writes where nothing was written before, for as long as that lasts. Owns regions on both tiers and a lane context;
    the tiers stay their opener's.
    """

    def __init__(self, far: Tier, near: Tier, extent: Extent) -> None:
        """Raises TierError or StorageError where there is no room."""
        self.far, self.near, self.extent = far, near, extent
        owner = far if far.memory not in {None, HOST} else near
        self._context = owner.lane_context()
        self._workers = max(far.read_concurrency, far.write_concurrency)
        self._near: list[Region] = []
        num_pages = extent.pages if far.memory else extent.written_pages
        self._far = self._allocate_far("", num_pages, extent.page_nbytes)
        self._written = self._pages([(self._far, page, 1) for page in range(num_pages)], "")
        self._far_small = self._allocate_far(".s", extent.small_units, extent.small_nbytes)
        self._small = self._pages([(self._far_small, 0, extent.small_units)], ".s")
        self._places = cycle(self._written.spans)
        self._fill()
        root = far.store_root(far.options)
        stored = stored_tensors(root) if root else ()
        attached, table = _attached(far, cut_alike(stored)), cut_most(stored)
        tables = _attached(far, [table] if table else ())
        self._attached = [region for _, region in (*attached, *tables)]
        self._singles = tables[0][1] if tables else self._far_small
        pages = [_pages_of(region, tensor) for tensor, region in attached]
        spans = [span for some in pages for span in some]
        self._read = self._pages(spans, ".w") if spans else replace(self._written, spans=self._filled)

    def close(self) -> None:
        self._context.close()  # waits for what is in flight
        for region in reversed(self._near):
            self.near.free(region)
        for region in (*self._attached, self._far_small, self._far):
            self.far.free(region)

    def load(self, direction: Direction) -> Load:
        """Pages carried without end, as many at once as the lane is wide, in bytes. A device is given the next page
        before the last one is there, as by a lane.
        """
        pages = self._read if direction == "read" else self._written
        workers = self.far.read_concurrency if direction == "read" else self.far.write_concurrency
        places = cycle(pages.spans) if direction == "read" else self._places
        flying: list[deque[Completion]] = [deque() for _ in range(workers)]

        def work(worker: int) -> None:
            region, first, count = next(places)
            near = Place(self.near, pages.near, worker * pages.units, count)
            flying[worker].append(self._issue(direction, Place(self.far, region, first, count), near))
            if len(flying[worker]) == IN_FLIGHT:
                flying[worker].popleft().wait()

        return Load(work, pages.nbytes, workers)

    def latency(self, direction: Direction, bytes_per_s: float) -> float:
        """Seconds that a small transfer takes beyond what its bytes take."""
        far, near = Place(self.far, self._far_small, 0, 1), Place(self.near, self._small.near, 0, 1)
        self._carry(direction, far, near)
        seconds = median(_elapsed(lambda: self._carry(direction, far, near)) for _ in range(SMALL_CALLS))
        return max(0.0, seconds - self.extent.small_nbytes / bytes_per_s)

    def unit_s(self, bytes_per_s: float) -> float | None:
        """Seconds beyond its bytes of a unit among many that storage gathers in one call. Other units each time, as far
        as there are enough: a disk may remember what it has just read. None where nothing is gathered.
        """
        if self.far.memory is not None:
            return None
        spec, count = self._singles.spec, min(self.extent.small_units, self._singles.spec.num_units)
        shuffled = np.random.default_rng(0).permutation(spec.num_units)
        out = np.empty(count * spec.unit_nbytes, np.uint8)

        def call(number: int) -> None:
            units = np.take(shuffled, range(number * count, (number + 1) * count), mode="wrap")
            self.far.gather(self._singles, np.sort(units), out)

        call(0)
        seconds = median(_elapsed(partial(call, number)) for number in range(1, GATHERS + 1))
        return max(0.0, seconds / count - spec.unit_nbytes / bytes_per_s)

    @property
    def _filled(self) -> tuple[tuple[Region, int, int], ...]:
        return self._written.spans[: self.extent.pages]

    def _carry(self, direction: Direction, far: Place, near: Place) -> None:
        self._issue(direction, far, near).wait()

    def _issue(self, direction: Direction, far: Place, near: Place) -> Completion:
        with self._context:
            (transfer_in if direction == "read" else transfer_out)(far=far, near=near)
            return self._context.record()

    def _fill(self) -> None:
        """Write what is read, once: bytes that were never written may cost nothing to read."""
        numbers = np.random.default_rng(0).integers(0, 256, self.extent.page_nbytes, dtype=np.uint8)
        with self._context:
            self.near.write(self._written.near, 0, 1, numbers)
            for unit in range(self.extent.small_units):
                self.near.write(self._small.near, unit, 1, numbers[: self.extent.small_nbytes])
            self._context.record().wait()
        for region, page, _ in self._filled:
            self._carry("write", Place(self.far, region, page, 1), Place(self.near, self._written.near, 0, 1))
            next(self._places)
        units = self.extent.small_units
        self._carry("write", Place(self.far, self._far_small, 0, units), Place(self.near, self._small.near, 0, units))

    def _allocate_far(self, suffix: str, num_units: int, unit_nbytes: int) -> Region:
        name = f"profile.{self.far.label}{suffix}"
        return self.far.allocate(RegionSpec(name=name, num_units=num_units, unit_nbytes=unit_nbytes))

    def _pages(self, spans: Sequence[tuple[Region, int, int]], suffix: str) -> _Pages:
        """With a near region of their own."""
        units, name = max(count for _, _, count in spans), f"profile.{self.far.label}{suffix}"
        unit_nbytes = spans[0][0].spec.unit_nbytes
        near = self.near.allocate(RegionSpec(name=name, num_units=self._workers * units, unit_nbytes=unit_nbytes))
        self._near.append(near)
        return _Pages(tuple(spans), near, units)


def _attached(far: Tier, stored: Sequence[StoredTensor]) -> list[tuple[StoredTensor, Region]]:
    """What of stored tensors can be read. Damaged ones are passed over: the model may be another than the recipe's, and
    whoever runs it is told.
    """
    attached = []
    for tensor in stored:
        with suppress(CorruptDataError, StorageError):
            attached.append((tensor, far.attach(tensor, placed_units=tensor.num_units)))
    return attached


def _pages_of(region: Region, tensor: StoredTensor) -> list[tuple[Region, int, int]]:
    starts = range(0, tensor.num_units, tensor.units_per_page)
    return [(region, first, min(tensor.units_per_page, tensor.num_units - first)) for first in starts]


def measure_link(probe: Probe, direction: Direction, others: Sequence[Probe], compute: Load) -> Link:
    """others: the probes of all other tiers. compute: what the processor does meanwhile."""
    seconds, load = probe.extent.link_seconds, probe.load(direction)
    reverse = probe.load("write" if direction == "read" else "read")
    alone = rate(load, seconds)

    def left(*busy: Load) -> float:
        return min(1.0, rates([load, *busy], seconds)[0] / alone)

    beside_processor, processor = rates([load, compute], seconds)
    return Link(
        bytes_per_s=alone,
        latency_s=probe.latency(direction, alone),
        unit_s=probe.unit_s(alone) if direction == "read" else None,
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
