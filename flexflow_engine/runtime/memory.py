"""A layout's regions on real tiers, and the copies between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flexflow_engine.abc.policy import TierDescription
from flexflow_engine.abc.tier import HOST, HostBytes, LaneContext, Region, Tier
from flexflow_engine.graph.task import Copy
from flexflow_engine.placement.layout import Layout, store_region
from flexflow_engine.placement.memory import allocations, workspaces
from flexflow_engine.placement.span import Span
from flexflow_engine.placement.weights import Run
from flexflow_engine.store.weights import WeightStore


@dataclass(frozen=True, slots=True)
class Place:
    """Units of a region on an open tier."""

    tier: Tier
    region: Region
    first: int
    count: int

    @property
    def host_bytes(self) -> HostBytes:
        """A view; only where the host addresses the memory."""
        view: HostBytes = self.tier.tensor(self.region, self.first, self.count).numpy()
        return view


def transfer_in(*, far: Place, near: Place) -> None:
    """Copy `far` to `near`, over the far tier's link. The host addresses at least one of them."""
    if near.tier.memory == HOST:
        far.tier.read(far.region, far.first, far.count, near.host_bytes)
    else:
        near.tier.write(near.region, near.first, near.count, far.host_bytes)


def transfer_out(*, far: Place, near: Place) -> None:
    """Copy `near` to `far`, the other way."""
    if near.tier.memory == HOST:
        far.tier.write(far.region, far.first, far.count, near.host_bytes)
    else:
        near.tier.read(near.region, near.first, near.count, far.host_bytes)


class Memory:
    """Owns every region of a run. Made before the lanes start, closed after they have ended."""

    def __init__(self, layout: Layout, tiers: Mapping[str, Tier], store: WeightStore) -> None:
        """Allocate all regions and fill the resident weights. Raises TierError, StorageError or CorruptDataError."""
        self._tiers = tiers
        self._regions: dict[tuple[str, str], Region] = {}
        self._reserved: dict[str, int] = {}
        try:
            self._allocate(layout, store)
            self._fill_weights(layout, store)
        except BaseException:
            self.close()
            raise

    def tensor(self, span: Span) -> torch.Tensor:
        """The bytes of a span on a tier with addressable memory: uint8, a view."""
        region = self._regions[span.tier, span.region]
        return self._tiers[span.tier].tensor(region, span.first, span.count)

    def region_tensor(self, tier: str, region: str) -> torch.Tensor:
        """The bytes of a whole region: uint8, a view."""
        return self.tensor(Span(tier, region, 0, self._regions[tier, region].spec.num_units))

    def copy(self, copy: Copy) -> None:
        """Carry out the moves over the far tier's link. The host addresses at least one end."""
        for move in copy.moves:
            if move.source.tier == copy.far:
                transfer_in(far=self._place(move.source), near=self._place(move.target))
            else:
                transfer_out(far=self._place(move.target), near=self._place(move.source))

    def read(self, span: Span, out: HostBytes) -> None:
        """Read a span of any tier into host memory."""
        self._tiers[span.tier].read(self._regions[span.tier, span.region], span.first, span.count, out)

    def gather(self, tier: str, region: str, units: NDArray[np.int64], out: HostBytes) -> None:
        """Read single units of any tier into host memory, `out`, uint8 [n * unit_nbytes]."""
        self._tiers[tier].gather(self._regions[tier, region], units, out)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        for (tier, _), region in self._regions.items():
            self._tiers[tier].free(region)
        self._regions = {}
        for tier, nbytes in self._reserved.items():
            self._tiers[tier].release(nbytes)
        self._reserved = {}

    def _place(self, span: Span) -> Place:
        return Place(self._tiers[span.tier], self._regions[span.tier, span.region], span.first, span.count)

    def _allocate(self, layout: Layout, store: WeightStore) -> None:
        for name, nbytes in workspaces(layout).items():
            self._tiers[name].reserve(nbytes, what="workspace")
            self._reserved[name] = nbytes
        for allocation in allocations(layout):
            key = allocation.tier, allocation.spec.name
            self._regions[key] = self._tiers[allocation.tier].allocate(allocation.spec)
        for tier in layout.tiers:
            if tier.reads_store:
                self._attach(tier.name, layout.weights.placed(tier.name), store)

    def _attach(self, tier: str, runs: tuple[Run, ...], store: WeightStore) -> None:
        placed: dict[str, int] = {}
        for run in runs:
            placed[run.tensor.name] = placed.get(run.tensor.name, 0) + run.num_units
        for name, units in placed.items():
            region = self._tiers[tier].attach(store.stored(name), placed_units=units)
            self._regions[tier, store_region(name)] = region

    def _fill_weights(self, layout: Layout, store: WeightStore) -> None:
        for tier in layout.tiers:
            with closing(self._tiers[tier.name].lane_context()) as context, context:
                for span, name, units in _residents(layout, tier):
                    self._fill(span, name, units, store, context)

    def _fill(self, span: Span, name: str, units: range, store: WeightStore, context: LaneContext) -> None:
        """Copy stored units into a span; through a buffer of one page where the host can't address the tier, whose
        context it is.
        """
        tier, region = self._tiers[span.tier], self._regions[span.tier, span.region]
        if tier.memory == HOST:
            store.read_units(name, units.start, len(units), tier.tensor(region, span.first, span.count).numpy())
            return
        page = np.empty(span.count * region.spec.unit_nbytes, np.uint8)
        store.read_units(name, units.start, len(units), page)
        tier.write(region, span.first, span.count, page)
        context.record().wait()


def _residents(layout: Layout, tier: TierDescription) -> Iterator[tuple[Span, str, range]]:
    """The weights that lie on a tier throughout a run: where, and which units of which stored tensor."""
    if tier is layout.device:
        for tensor in layout.weights.small:
            span = Span(tier.name, "small", layout.small_offsets[tensor.name], tensor.nbytes)
            yield span, tensor.name, range(tensor.num_units)
    for run in () if tier.reads_store else layout.weights.placed(tier.name):
        for page in run.pages:
            units = range(page.first_unit, page.first_unit + page.num_units)
            yield layout.page_span(run, page), run.tensor.name, units
