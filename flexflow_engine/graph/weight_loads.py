"""When a layer's weight pages are loaded: spread over the GPU batches of the layer before it, as slots allow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from flexflow_engine.abc.step import BatchStep, Step
from flexflow_engine.graph.builder import GraphBuilder
from flexflow_engine.graph.task import COMPUTE_LANE, DecodeWeights, Tile
from flexflow_engine.graph.transfers import Transfer, Transfers
from flexflow_engine.placement.layout import WEIGHT_SLOTS, Layout
from flexflow_engine.placement.span import Span
from flexflow_engine.placement.weights import Page, PlacedLayer, Run

PageNbytes = Callable[[str, int], int]
"""What reading a page of a tensor from a tier that reads the store costs, by the tensor's name and the page's index."""


Place = tuple[Run, Page, int]
"""A page to load, and its byte offset in the slot."""


@dataclass(frozen=True, slots=True)
class PageLoad:
    """What one task loads: a page, or all of a GPU batch's from one tier in host memory."""

    name: str
    transfers: tuple[Transfer, ...]


class WeightOrder:
    """What is the same for every step of a run: each layer's load list, and which layers have one.

    changing state    _read_nbytes, _loads    what was asked for already
    """

    def __init__(self, layout: Layout, stored_nbytes: PageNbytes | None = None) -> None:
        """stored_nbytes: None where there is no store yet; pages then count as if nothing was compressed."""
        self._layout, self._stored_nbytes = layout, stored_nbytes
        self._reads_store = {tier.name for tier in layout.tiers if tier.reads_store}
        self._read_nbytes: dict[Page, int] = {}
        self._loads: dict[tuple[int, int, int, int], list[PageLoad]] = {}
        self.pages = [layout.weights.page_order(layer, layout.direct) for layer in layout.weights.layers]
        self._loading = [index for index, pages in enumerate(self.pages) if pages]

    def loads(self, layer: int, slot: int, position: int, count: int) -> Sequence[PageLoad]:
        """Of the pages of a layer that fall to the GPU batch at `position` of `count`."""
        key = layer, slot, position, count
        if key not in self._loads:
            pages = self.pages[layer]
            share = pages[len(pages) * position // count : len(pages) * (position + 1) // count]
            self._loads[key] = list(self._page_loads(share, f"weights.slot.{slot}"))
        return self._loads[key]

    def window(self, layer: int) -> list[int]:
        """The layers whose weights may be in slots while `layer` runs: as many as there are slots, itself included."""
        return [index for index in self._loading if index >= layer][:WEIGHT_SLOTS]

    def _page_loads(self, share: Sequence[Place], location: str) -> Iterator[PageLoad]:
        by_tier: dict[str, list[Place]] = defaultdict(list)
        for place in share:
            by_tier[place[0].tier].append(place)
        for name, some in by_tier.items():
            tier = self._layout.tier(name)
            for together in [some] if tier.read_by_host else [[place] for place in some]:
                transfers = [self._transfer(location, *place) for place in together]
                if tier.read_by_host and tier.read_concurrency == 1:  # several threads share them page by page
                    transfers = _joined(transfers)
                page, more = together[0][1], len(together) - 1
                what = f"{page.tensor.name}[{page.index}]" + (f" and {more} more" if more else "")
                yield PageLoad(what, tuple(transfers))

    def _transfer(self, location: str, run: Run, page: Page, offset: int) -> Transfer:
        target = Span(self._layout.device.name, location, offset, page.nbytes)
        return Transfer(
            self._layout.page_span(run, page), target, page.tensor.unit_nbytes, self._stored_page_nbytes(run, page)
        )

    def _stored_page_nbytes(self, run: Run, page: Page) -> int | None:
        """Bytes that loading a page reads, where its tier reads them from a store; asked of the store once."""
        if self._stored_nbytes is None or run.tier not in self._reads_store:
            return None
        if page not in self._read_nbytes:
            self._read_nbytes[page] = self._stored_nbytes(page.tensor.name, page.index)
        return self._read_nbytes[page]


class WeightLoads:
    """Emits into one builder, for one step. `_begun` maps a layer whose pages have been emitted to the layer during
    which that began, or None for the step's start; `_slots` tells where each went.
    """

    def __init__(
        self, layout: Layout, order: WeightOrder, step: Step, builder: GraphBuilder, transfers: Transfers
    ) -> None:
        self._layout, self._order, self._step = layout, order, step
        self._builder, self._transfers = builder, transfers
        self._begun: dict[int, int | None] = {}
        self._slots: dict[int, int] = {}

    def load_first(self) -> None:
        """The first layer that loads, which no layer runs before."""
        for index in self._order.window(0)[:1]:
            self._load_pages(index, during=None, position=0, count=1)

    def load_next(self, layer: PlacedLayer, batch: BatchStep) -> None:
        """The pages of later layers that fall to one GPU batch of a layer."""
        for index in self._order.window(layer.index):
            if self._begun.get(index, layer.index) == layer.index and index > layer.index:
                position = self._step.batches.index(batch)
                self._load_pages(index, during=layer.index, position=position, count=len(self._step.batches))

    def decode(self, layer: PlacedLayer, tile: Tile) -> None:
        """Decode a layer's matrices into the buffer that all GPU batches read."""
        slot = self.slot(layer)
        self._builder.add(
            name=f"decode {layer.spec.name}",
            kind="compute",
            tile=tile,
            lane=COMPUTE_LANE,
            operation=DecodeWeights(layer.index, slot),
            reads=[] if slot is None else [f"weights.slot.{slot}"],
            writes=["weights.decoded"],
        )

    def slot(self, layer: PlacedLayer) -> int | None:
        """The slot that holds what was loaded of a layer; None where nothing has to be."""
        return self._slots.get(layer.index)

    def locations(self, layer: PlacedLayer) -> list[str]:
        """The locations that a computation with the layer's weights reads."""
        if self._layout.decodes_weights:
            return ["weights.decoded"] if layer.runs else []
        slot = self.slot(layer)
        return [] if slot is None else [f"weights.slot.{slot}"]

    def _load_pages(self, index: int, *, during: int | None, position: int, count: int) -> None:
        """Emit the pages of layer `index` that fall to the GPU batch at `position` of `count`."""
        if index not in self._begun:
            self._begun[index] = during
            self._slots[index] = self._builder.next_slot("weights", WEIGHT_SLOTS)
            self._builder.begin(f"weights.slot.{self._slots[index]}")
        tile = Tile(self._step.index, index, self._step.batches[position].gpu_batch)
        slot = self._slots[index]
        for load in self._order.loads(index, slot, position, count):
            self._transfers.load(load.name, tile, load.transfers, reads=[], adds=f"weights.slot.{slot}")


def _joined(transfers: Sequence[Transfer]) -> list[Transfer]:
    """Those that follow each other at both ends as one: a copy of them all takes one call."""
    joined: list[Transfer] = []
    for transfer in transfers:
        source, target = transfer.source, transfer.target
        assert transfer.read_nbytes is None, "what lies in host memory is not read from a store"
        last = joined[-1] if joined else None
        if last and _follows(last.source, source) and _follows(last.target, target):
            joined[-1] = last._replace(source=_longer(last.source, source), target=_longer(last.target, target))
        else:
            joined.append(transfer)
    return joined


def _follows(span: Span, other: Span) -> bool:
    return (span.tier, span.region, span.first + span.count) == (other.tier, other.region, other.first)


def _longer(span: Span, by: Span) -> Span:
    return replace(span, count=span.count + by.count)
