"""Compiles one step into a task graph.

Tiles run layer by layer, and within a layer GPU batch by GPU batch, so that a layer's weights are loaded once and used
by all of them. What a tile needs is emitted one tile ahead; the pages of the next layer that loads are spread over the
GPU batches of the current one, between their other loads:

    compute    | 2,k0 | 2,k1 | 2,k2 | 3,k0 |
    disk.read  | kv 2,k1 w3 | kv 2,k2 w3 | kv 3,k0 w3 | ...        w3: a third of layer 3's pages

The order of emission is every lane's order; it is topological by construction, so in-order lanes can't deadlock.
"""

from __future__ import annotations

from flexflow_engine.abc.step import BatchStep, Step
from flexflow_engine.graph.builder import Frontier, GraphBuilder, TaskGraph
from flexflow_engine.graph.lanes import lane_widths
from flexflow_engine.graph.task import COMPUTE_LANE, TOKENS_LANE, Compute, DecodeWeights, FetchTokens, Tile
from flexflow_engine.graph.tile_io import TileIO
from flexflow_engine.graph.transfers import Transfer, Transfers
from flexflow_engine.placement.layout import WEIGHT_SLOTS, Layout
from flexflow_engine.placement.span import Span
from flexflow_engine.placement.weights import Page, PlacedLayer, Run


class StepCompiler:
    """Holds what is the same for every step of a run: the layout and each layer's load list."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.widths = lane_widths(layout.tiers)
        self.layers = layout.weights.layers
        self.page_order = [layout.weights.page_order(layer, layout.direct) for layer in self.layers]
        self._loading = [layer.index for layer in self.layers if self.page_order[layer.index]]

    def compile(self, step: Step, frontier: Frontier) -> tuple[TaskGraph, Frontier]:
        """The step's graph, joined to the steps before it by `frontier`, and the frontier for the next one."""
        return _StepEmitter(self, step, frontier).emit()

    def window(self, layer: int) -> list[int]:
        """The layers whose weights may be in slots while `layer` runs: as many as there are slots, itself included."""
        return [index for index in self._loading if index >= layer][:WEIGHT_SLOTS]

    def flops(self, layer: PlacedLayer, batch: BatchStep) -> float:
        """Two for each weight and token; in attention four for each cached position, new token and hidden number."""
        tokens = batch.new_tokens if layer.spec.kind in {"embed", "decoder"} else len(batch.rows)
        weights = sum((run.stop_row - run.first_row) * run.tensor.columns for run in layer.runs)
        flops = 2.0 * weights * tokens
        if layer.spec.kind == "decoder":
            contexts = sum(row.new_tokens * (row.context + (row.new_tokens + 1) / 2) for row in batch.rows)
            flops += 4.0 * self.layout.attention_width * contexts
        return flops


class _StepEmitter:
    """Emits one step. `_begun` maps a layer whose pages have been emitted to the layer during which that began, or
    None for the step's start; `_weight_slots`, `_inputs` hold what was loaded until it is used.
    """

    def __init__(self, compiler: StepCompiler, step: Step, frontier: Frontier) -> None:
        self._compiler, self._layout, self._step = compiler, compiler.layout, step
        self._builder = GraphBuilder(frontier, compiler.widths)
        self._transfers = Transfers(self._layout, self._builder)
        self._io = TileIO(self._layout, self._builder, self._transfers)
        self._begun: dict[int, int | None] = {}
        self._weight_slots: dict[int, int] = {}
        self._inputs: dict[Tile, _Inputs] = {}

    def emit(self) -> tuple[TaskGraph, Frontier]:
        tiles = [(layer, batch) for layer in self._compiler.layers for batch in self._step.batches]
        for index in self._compiler.window(0)[:1]:
            self._load_pages(index, during=None, position=0, count=1)
        self._load_inputs(*tiles[0])
        for index, (layer, batch) in enumerate(tiles):
            following = tiles[index + 1] if index + 1 < len(tiles) else None
            ahead = following is not None and following[1] is not batch
            if following and ahead:
                self._load_inputs(*following)
            self._load_next_layers(layer, batch)
            self._compute(layer, batch)
            if following and not ahead:  # a single gpu batch: its next tile needs what this one has just stored
                self._load_inputs(*following)
        return self._builder.result(self._step.index)

    def _tile(self, layer: PlacedLayer, batch: BatchStep) -> Tile:
        return Tile(self._step.index, layer.index, batch.gpu_batch)

    def _load_next_layers(self, layer: PlacedLayer, batch: BatchStep) -> None:
        for index in self._compiler.window(layer.index):
            if self._begun.get(index, layer.index) == layer.index and index > layer.index:
                position = self._step.batches.index(batch)
                self._load_pages(index, during=layer.index, position=position, count=len(self._step.batches))

    def _load_pages(self, index: int, *, during: int | None, position: int, count: int) -> None:
        """Emit the pages of layer `index` that fall to the gpu batch at `position` of `count`."""
        if index not in self._begun:
            self._begun[index] = during
            self._weight_slots[index] = self._builder.next_slot("weights", WEIGHT_SLOTS)
            self._builder.begin(f"weights.slot.{self._weight_slots[index]}")
        pages = self._compiler.page_order[index]
        tile = Tile(self._step.index, index, self._step.batches[position].gpu_batch)
        for run, page, offset in pages[len(pages) * position // count : len(pages) * (position + 1) // count]:
            self._load_page(tile, run, page, offset)

    def _load_page(self, tile: Tile, run: Run, page: Page, offset: int) -> None:
        location = f"weights.slot.{self._weight_slots[tile.layer]}"
        target = Span(self._layout.device.name, location, offset, page.nbytes)
        move = Transfer(self._layout.page_span(run, page), target, page.tensor.unit_nbytes)
        self._transfers.load(f"{page.tensor.name}[{page.index}]", tile, [move], reads=[], adds=location)

    def _load_inputs(self, layer: PlacedLayer, batch: BatchStep) -> None:
        tile, kind = self._tile(layer, batch), layer.spec.kind
        inputs = self._inputs[tile] = _Inputs()
        if kind == "embed":
            inputs.embed = self._io.gather_rows(tile, batch)
        if kind in {"decoder", "final"}:
            inputs.hidden = self._io.load_hidden(tile, batch)
        if kind == "decoder":
            inputs.kv = self._io.load_kv(tile, batch, self._layout.kv_tile(layer.index, batch.gpu_batch))

    def _compute(self, layer: PlacedLayer, batch: BatchStep) -> None:
        tile, kind = self._tile(layer, batch), layer.spec.kind
        if self._layout.encoded_weights and layer.runs and batch is self._step.batches[0]:
            self._decode_weights(layer, tile)
        inputs = self._inputs.pop(tile)
        reads, updates, writes = self._weight_reads(layer), list[str](), list[str]()
        if kind == "embed":
            reads += [f"tokens.{batch.gpu_batch}"] if batch.phase == "decode" else []
            inputs.hidden = self._io.hidden_slot() if self._io.has_slotted_hidden(batch) else None
            updates += [f"embed.slot.{inputs.embed}"]
            writes += self._io.hidden_locations(batch, inputs.hidden)
        if kind == "decoder":
            cache = self._layout.kv_tile(layer.index, batch.gpu_batch)
            updates += self._io.hidden_locations(batch, inputs.hidden)
            updates += self._io.kv_locations(tile, batch, cache, inputs.kv)
        if kind == "final":
            reads += self._io.hidden_locations(batch, inputs.hidden)
            writes += [f"features.{batch.gpu_batch}"]
        if kind == "head":
            reads += [f"features.{batch.gpu_batch}"]
            updates += [f"candidates.{batch.gpu_batch}"]
        self._builder.add(
            name=f"compute {layer.spec.name}",
            kind="compute",
            tile=tile,
            lane=COMPUTE_LANE,
            operation=Compute(
                layer=layer.index,
                batch=batch,
                weight_slot=self._weight_slots.get(layer.index),
                kv_slot=inputs.kv,
                hidden_slot=inputs.hidden,
                embed_slot=inputs.embed,
            ),
            reads=[*reads, *updates],
            writes=[*updates, *writes],
            flops=self._compiler.flops(layer, batch),
        )
        self._store(layer, batch, inputs)

    def _decode_weights(self, layer: PlacedLayer, tile: Tile) -> None:
        slot = self._weight_slots.get(layer.index)
        self._builder.add(
            name=f"decode {layer.spec.name}",
            kind="compute",
            tile=tile,
            lane=COMPUTE_LANE,
            operation=DecodeWeights(layer.index, slot),
            reads=[] if slot is None else [f"weights.slot.{slot}"],
            writes=["weights.decoded"],
        )

    def _weight_reads(self, layer: PlacedLayer) -> list[str]:
        if self._layout.encoded_weights:
            return ["weights.decoded"] if layer.runs else []
        slot = self._weight_slots.get(layer.index)
        return [] if slot is None else [f"weights.slot.{slot}"]

    def _store(self, layer: PlacedLayer, batch: BatchStep, inputs: _Inputs) -> None:
        tile = self._tile(layer, batch)
        if layer.spec.kind == "decoder" and inputs.kv is not None:
            self._io.store_kv(tile, batch, self._layout.kv_tile(layer.index, batch.gpu_batch), inputs.kv)
        if layer.spec.kind in {"embed", "decoder"} and inputs.hidden is not None:
            self._io.store_hidden(tile, batch, inputs.hidden)
        if layer is self._compiler.layers[-1]:
            self._builder.add(
                name="fetch tokens",
                kind="store",
                tile=tile,
                lane=TOKENS_LANE,
                operation=FetchTokens(batch),
                reads=[f"candidates.{batch.gpu_batch}"],
                writes=[f"tokens.{batch.gpu_batch}"],
            )


class _Inputs:
    """The slots that one tile's loads fill."""

    __slots__ = ("embed", "hidden", "kv")

    def __init__(self) -> None:
        self.embed: int | None = None
        self.hidden: int | None = None
        self.kv: int | None = None
