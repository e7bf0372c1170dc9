"""The loads and stores of one tile's KV cache: pages that are full, and what a prompt leaves.

decode         far tiers --load full pages--> kv.slot --store the pages that new tokens filled--> far tiers
prompts        kv.slot --store full pages--> far tiers
prompts, with attention on the host across a link
               kv.prompt --store full pages; where pages take single tokens, begun ones--> every tier of the cache
                         --store--> tail pages
"""

from __future__ import annotations

from flexflow_engine.abc.step import BatchStep
from flexflow_engine.graph.builder import GraphBuilder
from flexflow_engine.graph.task import Tile
from flexflow_engine.graph.transfers import Transfer, Transfers
from flexflow_engine.placement.kv import Rectangle
from flexflow_engine.placement.layout import KV_SLOTS, Layout
from flexflow_engine.placement.span import Span

Pair = tuple[Span, Span]
"""(far, near) spans of the same pages."""


class CacheIO:
    """Emits into one builder, for one step.

    changing state    what all layers' rectangles of the same rows, and pages, have in common:
        _longest_tokens   (gpu_batch, rows) -> cached tokens of the longest one
        _filled_runs      (gpu_batch, rows, pages) -> units that the step's tokens are the last of
    """

    def __init__(self, layout: Layout, builder: GraphBuilder, transfers: Transfers) -> None:
        self._layout, self._kv, self._near = layout, layout.kv, layout.attention.tier
        self._builder = builder
        self._transfers = transfers
        self._longest_tokens: dict[tuple[int, int, int], int] = {}
        self._filled_runs: dict[tuple[int, int, int, int, int], list[range]] = {}

    def load(self, tile: Tile, batch: BatchStep) -> int | None:
        """The slot into which pages are loaded that are full already, in a decode step; a prompt's pages are computed
        into it instead. None where no rectangle passes through a slot.
        """
        cache = self._layout.kv_tile(tile.layer, tile.gpu_batch)
        if not cache.slotted:
            return None
        slot = self._builder.next_slot("kv", KV_SLOTS)
        location = f"kv.slot.{slot}"
        self._builder.begin(location)
        if batch.phase == "decode":
            for rectangle, offset in cache.slotted:
                pages = self._longest(rectangle, batch) // self._kv.page_tokens
                if pairs := self._prefix(rectangle, Span(self._near, location, offset, 0), pages):
                    loads = [Transfer(far, near, self._kv.page_nbytes) for far, near in pairs]
                    self._transfers.load(rectangle.name, tile, loads, reads=[rectangle.name], adds=location)
        return slot

    def store(self, tile: Tile, batch: BatchStep, slot: int) -> None:
        """What the computation has put into the slot: a prompt's full pages, or the pages that new tokens filled."""
        location = f"kv.slot.{slot}"
        for rectangle, offset in self._layout.kv_tile(tile.layer, tile.gpu_batch).slotted:
            near = Span(self._near, location, offset, 0)
            if batch.phase == "prefill":
                pairs = self._prefix(rectangle, near, self._longest(rectangle, batch) // self._kv.page_tokens)
            else:
                pairs = self._filled(rectangle, near, batch)
            self._store(rectangle, tile, pairs, reads=location)

    def prompt_slot(self) -> int:
        """The slot on the compute tier for a prompt's keys and values."""
        return self._builder.next_slot("kv.prompt", KV_SLOTS)

    def store_prompts(self, tile: Tile, batch: BatchStep, slot: int) -> None:
        """All that a prompt has put into its slot."""
        cache, device = self._layout.kv_tile(tile.layer, tile.gpu_batch), self._layout.device.name
        location = f"kv.prompt.{slot}"
        for rectangle, offset in cache.prompts:
            tokens = self._longest(rectangle, batch)
            begun = self._kv.page_tokens - 1 if rectangle.tier in self._kv.takes_tokens else 0
            near = Span(device, f"{location}.pages", offset, 0)
            pairs = self._prefix(rectangle, near, (tokens + begun) // self._kv.page_tokens)
            self._store(rectangle, tile, pairs, reads=location)
        if cache.tail_rows:
            tails, units = self._tails(tile), 2 * len(cache.tail_rows)
            near, far = Span(device, f"{location}.tails", 0, units), Span(self._near, tails, 0, units)
            self._transfers.store(
                tails, tile, [Transfer(near, far, self._kv.tail_page_nbytes)], reads=location, writes=tails
            )

    def locations(self, tile: Tile, slot: int | None) -> list[str]:
        """The locations that attention updates: rectangles in place, the slot, the tail pages."""
        cache = self._layout.kv_tile(tile.layer, tile.gpu_batch)
        locations = [r.name for r in cache.rectangles if r.tier in self._layout.attention.in_place]
        if slot is not None:
            locations.append(f"kv.slot.{slot}")
        if cache.tail_rows:
            locations.append(self._tails(tile))
        return locations

    def _tails(self, tile: Tile) -> str:
        return f"kv.{self._layout.decoder(tile.layer)}.{tile.gpu_batch}.tail"

    def _store(self, rectangle: Rectangle, tile: Tile, pairs: list[Pair], *, reads: str) -> None:
        if pairs:
            stores = [Transfer(near, far, self._kv.page_nbytes) for far, near in pairs]
            self._transfers.store(rectangle.name, tile, stores, reads=reads, writes=rectangle.name)

    def _prefix(self, rectangle: Rectangle, near: Span, stop_page: int) -> list[Pair]:
        """The pages before `stop_page` of all rows. `near` begins at the rectangle's first unit."""
        units = rectangle.until(stop_page).num_units
        return _pairs(rectangle, near, range(units)) if units > 0 else []

    def _filled(self, rectangle: Rectangle, near: Span, batch: BatchStep) -> list[Pair]:
        """The pages that this step's tokens are the last of, those of adjoining rows in one move."""
        r = rectangle
        key = batch.gpu_batch, r.first_row, r.stop_row, r.first_page, r.stop_page
        if key not in self._filled_runs:
            self._filled_runs[key] = _runs(_filled_units(rectangle, batch, self._kv.page_tokens))
        return [pair for run in self._filled_runs[key] for pair in _pairs(rectangle, near, run)]

    def _longest(self, rectangle: Rectangle, batch: BatchStep) -> int:
        """Cached tokens of the rectangle's longest row: after this step where it computes prompts, else before it."""
        key = batch.gpu_batch, rectangle.first_row, rectangle.stop_row
        if key not in self._longest_tokens:
            rows = (row for row in batch.rows if rectangle.first_row <= row.row < rectangle.stop_row)
            prompts = batch.phase == "prefill"
            self._longest_tokens[key] = max((row.context + prompts * row.new_tokens for row in rows), default=0)
        return self._longest_tokens[key]


def _filled_units(rectangle: Rectangle, batch: BatchStep, page_tokens: int) -> list[int]:
    """Of the pages that a step's tokens are the last of, ascending."""
    units = []
    for row in batch.rows:
        page, last = divmod(row.context, page_tokens)
        if last == page_tokens - 1 and rectangle.holds(row.row, page):
            units.append(rectangle.unit(row.row, page))
    return sorted(units)


def _pairs(rectangle: Rectangle, near: Span, units: range) -> list[Pair]:
    """The same units of a rectangle's keys, and of its values."""
    return [
        (
            Span(rectangle.tier, f"{rectangle.name}.{part}", units.start, len(units)),
            Span(near.tier, near.region, near.first + index * rectangle.num_units + units.start, len(units)),
        )
        for index, part in enumerate("kv")
    ]


def _runs(units: list[int]) -> list[range]:
    """Ascending numbers, as ranges without a gap."""
    runs: list[range] = []
    for unit in units:
        if runs and runs[-1].stop == unit:
            runs[-1] = range(runs[-1].start, unit + 1)
        else:
            runs.append(range(unit, unit + 1))
    return runs
