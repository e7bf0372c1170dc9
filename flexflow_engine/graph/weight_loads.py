"""When a layer's weight pages are loaded: spread over the GPU batches of the layer before it, as slots allow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from flexflow_engine.abc.step import BatchStep, Step
from flexflow_engine.graph.builder import GraphBuilder
from flexflow_engine.graph.task import COMPUTE_LANE, DecodeWeights, Tile
from flexflow_engine.graph.transfers import Transfer, Transfers
from flexflow_engine.placement.layout import WEIGHT_SLOTS, Layout
from flexflow_engine.placement.span import Span
from flexflow_engine.placement.weights import Page, PlacedLayer, Run

PageNbytes = Callable[[str, int], int]
"""What reading a page of a tensor from a tier that reads the store costs, by the tensor's name and the page's index."""


class WeightOrder:
    """What is the same for every step of a run: each layer's load list, and which layers have one."""

    def __init__(self, layout: Layout, stored_nbytes: PageNbytes | None = None) -> None:
        """stored_nbytes: None where there is no store yet; pages then count as if nothing was compressed."""
        self._stored_nbytes = stored_nbytes
        self._reads_store = {tier.name for tier in layout.tiers if tier.reads_store}
        self._read_nbytes: dict[Page, int] = {}
        self.pages = [layout.weights.page_order(layer, layout.direct) for layer in layout.weights.layers]
        self._loading = [index for index, pages in enumerate(self.pages) if pages]

    def read_nbytes(self, run: Run, page: Page) -> int | None:
        """Bytes that loading a page reads, where its tier reads them from a store; asked of the store once."""
        if self._stored_nbytes is None or run.tier not in self._reads_store:
            return None
        if page not in self._read_nbytes:
            self._read_nbytes[page] = self._stored_nbytes(page.tensor.name, page.index)
        return self._read_nbytes[page]

    def window(self, layer: int) -> list[int]:
        """The layers whose weights may be in slots while `layer` runs: as many as there are slots, itself included."""
        return [index for index in self._loading if index >= layer][:WEIGHT_SLOTS]


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
        pages = self._order.pages[index]
        tile = Tile(self._step.index, index, self._step.batches[position].gpu_batch)
        share = pages[len(pages) * position // count : len(pages) * (position + 1) // count]
        by_tier: dict[str, list[tuple[Run, Page, int]]] = defaultdict(list)
        for one in share:
            by_tier[one[0].tier].append(one)
        for tier, some in by_tier.items():
            for together in [some] if self._layout.tier(tier).read_by_host else [[one] for one in some]:
                self._load_together(tile, together)

    def _load_together(self, tile: Tile, pages: Sequence[tuple[Run, Page, int]]) -> None:
        """One task: of one page, or of all in host memory, where a copy takes hardly longer than a task."""
        transfers = [self._transfer(tile, *one) for one in pages]
        page = pages[0][1]
        name = f"{page.tensor.name}[{page.index}]" + (f" and {len(pages) - 1} more" if len(pages) > 1 else "")
        self._transfers.load(name, tile, transfers, reads=[], adds=transfers[0].target.region)

    def _transfer(self, tile: Tile, run: Run, page: Page, offset: int) -> Transfer:
        location = f"weights.slot.{self._slots[tile.layer]}"
        target = Span(self._layout.device.name, location, offset, page.nbytes)
        source, read_nbytes = self._layout.page_span(run, page), self._order.read_nbytes(run, page)
        return Transfer(source, target, page.tensor.unit_nbytes, read_nbytes)
