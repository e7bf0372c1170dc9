"""Compiles one step into a task graph.

Tiles run layer by layer, and within a layer GPU batch by GPU batch, so that a layer's weights are loaded once and used
by all of them. What a tile needs is emitted one tile ahead; the pages of the next layer that loads are spread over the
GPU batches of the current one, between their other loads:

    compute    | 2,k0 | 2,k1 | 2,k2 | 3,k0 |
    disk.read  | kv 2,k1 w3 | kv 2,k2 w3 | kv 3,k0 w3 | ...        w3: a third of layer 3's pages

The first tiles' caches come before the rows of the tokens that the step begins with: those rows wait until the step
before has its tokens, and the link must not wait with them.

With attention on the host, a decode tile is begun before the tile in front of it is ended, so that the compute tier has
work while the host attends:

    compute    | inputs 2,k1 | output 2,k0 | inputs 2,k2 | output 2,k1 | inputs 3,k0 | output 2,k2 |
    attention  | attend 2,k0        | attend 2,k1               | attend 2,k2               | ...

The order of emission is every lane's order; it is topological by construction, so in-order lanes can't deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, takewhile

from flexflow_engine.abc.step import Step
from flexflow_engine.graph.builder import Frontier, GraphBuilder, TaskGraph
from flexflow_engine.graph.cache_io import CacheIO
from flexflow_engine.graph.host_attention import HostAttention
from flexflow_engine.graph.lanes import lane_widths
from flexflow_engine.graph.task import COMPUTE_LANE, TOKENS_LANE, Compute, FetchTokens, Tile
from flexflow_engine.graph.tile_io import TileIO
from flexflow_engine.graph.tile_work import TileWork
from flexflow_engine.graph.transfers import Transfers
from flexflow_engine.graph.weight_loads import PageNbytes, WeightLoads, WeightOrder
from flexflow_engine.graph.work import AttentionWork, matmul_flops
from flexflow_engine.placement.layout import KV_SLOTS, Layout


class StepCompiler:
    """Holds what is the same for every step of a run: the layout, the lanes and each layer's load list."""

    def __init__(self, layout: Layout, stored_nbytes: PageNbytes | None = None) -> None:
        """stored_nbytes: of pages in the weight store, for the bytes that loads count; None where there is no store."""
        self.layout = layout
        self.widths = lane_widths(layout)
        self.weight_order = WeightOrder(layout, stored_nbytes)

    def compile(self, step: Step, frontier: Frontier) -> tuple[TaskGraph, Frontier]:
        """The step's graph, joined to the steps before it by `frontier`, and the frontier for the next one."""
        return _StepEmitter(self, step, frontier).emit()


class _StepEmitter:
    """Emits one step. `_unfinished` is a tile that the host attends to: its output is still to be emitted."""

    def __init__(self, compiler: StepCompiler, step: Step, frontier: Frontier) -> None:
        self._layout, self._step = compiler.layout, step
        self._builder = GraphBuilder(frontier, compiler.widths)
        transfers = Transfers(self._layout, self._builder)
        self._io = TileIO(self._layout, self._builder, transfers)
        self._cache = CacheIO(self._layout, self._builder, transfers)
        self._weights = WeightLoads(self._layout, compiler.weight_order, step, self._builder, transfers)
        self._attention_work = AttentionWork(self._layout, step)
        self._attention = HostAttention(self._layout, self._builder, self._attention_work)
        self._unfinished: TileWork | None = None

    def emit(self) -> tuple[TaskGraph, Frontier]:
        works = [
            TileWork(Tile(self._step.index, layer.index, batch.gpu_batch), layer, batch)
            for layer in self._layout.weights.layers
            for batch in self._step.batches
        ]
        self._weights.load_first()
        self._load_first_caches(works)
        self._load_inputs(works[0])
        for work, following in zip(works, [*works[1:], None], strict=True):
            self._advance(work, following)
        return self._builder.result(self._step.index)

    def _advance(self, work: TileWork, following: TileWork | None) -> None:
        """Compute a tile, end the one before it, and load what the next ones need: ahead of the computation, unless
        something that is still to be emitted makes it or uses its slot.
        """
        before, self._unfinished = self._unfinished, None
        if before and self._layout.decodes_weights and before.layer is not work.layer:
            self._end(before)  # it reads decoded weights where this layer's go
            before = None
        ahead = following is not None and before is None and not following.follows(work)
        if following and ahead:
            self._load_inputs(following)
        if before is None:
            self._weights.load_next(work.layer, work.batch)
        self._compute(work)
        if before:
            self._end(before)
            self._weights.load_next(work.layer, work.batch)
        if self._unfinished and following and following.follows(work):
            self._end(work)
            self._unfinished = None
        if following and not ahead:
            self._load_inputs(following)

    def _load_first_caches(self, works: Sequence[TileWork]) -> None:
        """Of as many tiles as there are slots, up to one of prompts: tiles take the slots in their order."""
        decoder = (work for work in works if work.layer.spec.kind == "decoder")
        for work in takewhile(lambda work: work.batch.phase == "decode", islice(decoder, KV_SLOTS)):
            self._load_cache(work)

    def _load_inputs(self, work: TileWork) -> None:
        kind = work.layer.spec.kind
        if kind == "embed":
            work.embed = self._io.gather_rows(work.tile, work.batch)
        if kind in {"decoder", "final"}:
            work.hidden = self._io.load_hidden(work.tile, work.batch)
        if kind == "decoder" and work.kv is None:
            self._load_cache(work)

    def _load_cache(self, work: TileWork) -> None:
        if self._layout.attention.across_link and work.batch.phase == "prefill":
            work.prompt = self._cache.prompt_slot()
        else:
            work.kv = self._cache.load(work.tile, work.batch)

    def _compute(self, work: TileWork) -> None:
        """Emit a tile's computation and its stores, or the beginning of it where the host attends."""
        if self._layout.decodes_weights and work.layer.runs and work.batch is self._step.batches[0]:
            self._weights.decode(work.layer, work.tile)
        work.weights = self._weights.slot(work.layer)
        if self._layout.attention.on_host and work.layer.spec.kind == "decoder" and work.batch.phase == "decode":
            self._attention.begin(
                work,
                weights=self._weights.locations(work.layer),
                hidden=self._io.hidden_locations(work.batch, work.hidden),
                cache=self._cache.locations(work.tile, work.kv),
            )
            self._store_cache(work)
            self._unfinished = work
        else:
            self._compute_whole(work)
            self._store_cache(work)
            self._store(work)

    def _end(self, work: TileWork) -> None:
        """Emit what is left of a tile that the host attends to."""
        weights, hidden = self._weights.locations(work.layer), self._io.hidden_locations(work.batch, work.hidden)
        self._attention.end(work, weights=weights, hidden=hidden)
        self._store(work)

    def _compute_whole(self, work: TileWork) -> None:
        kind, batch = work.layer.spec.kind, work.batch
        reads, updates, writes = self._weights.locations(work.layer), list[str](), list[str]()
        flops = matmul_flops(work.layer, batch)
        if kind == "embed":
            reads += [f"tokens.{batch.gpu_batch}"] if batch.phase == "decode" else []
            work.hidden = self._io.hidden_slot() if self._io.has_slotted_hidden(batch) else None
            updates += [f"embed.slot.{work.embed}"]
            writes += self._io.hidden_locations(batch, work.hidden)
        if kind == "decoder":
            updates += self._io.hidden_locations(batch, work.hidden)
            if work.prompt is None:
                updates += self._cache.locations(work.tile, work.kv)
            else:
                writes += [f"kv.prompt.{work.prompt}"]
            flops += self._attention_work.flops[batch.gpu_batch]
        if kind == "final":
            reads += self._io.hidden_locations(batch, work.hidden)
            writes += [f"features.{batch.gpu_batch}"]
        if kind == "head":
            reads += [f"features.{batch.gpu_batch}"]
            updates += [f"candidates.{batch.gpu_batch}"]
        self._builder.add(
            name=f"compute {work.layer.spec.name}",
            kind="compute",
            tile=work.tile,
            lane=COMPUTE_LANE,
            operation=Compute(
                layer=work.layer.index,
                batch=batch,
                weight_slot=work.weights,
                kv_slot=work.kv,
                hidden_slot=work.hidden,
                embed_slot=work.embed,
                prompt_slot=work.prompt,
            ),
            reads=[*reads, *updates],
            writes=[*updates, *writes],
            flops=flops,
        )

    def _store_cache(self, work: TileWork) -> None:
        if work.kv is not None:
            self._cache.store(work.tile, work.batch, work.kv)
        if work.prompt is not None:
            self._cache.store_prompts(work.tile, work.batch, work.prompt)

    def _store(self, work: TileWork) -> None:
        """Emit what a tile leaves besides its cache: hidden states, or the step's tokens."""
        if work.layer.spec.kind in {"embed", "decoder"} and work.hidden is not None:
            self._io.store_hidden(work.tile, work.batch, work.hidden)
        if work.layer is self._layout.weights.layers[-1]:
            self._builder.add(
                name="fetch tokens",
                kind="store",
                tile=work.tile,
                lane=TOKENS_LANE,
                operation=FetchTokens(work.batch),
                reads=[f"candidates.{work.batch.gpu_batch}"],
                writes=[f"tokens.{work.batch.gpu_batch}"],
            )
