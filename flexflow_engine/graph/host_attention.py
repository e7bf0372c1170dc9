"""A decode tile of a decoder layer whose attention runs on the host:

    compute      inputs k |  ...  inputs k + 1  ... | output k
    host.write            | q k v                   |
    attention                     | attend k        |
    host.read                               attended|          both copies fall away on a compute tier in host memory

Everything passes through one attention slot a tile: what the host attends to replaces the queries in it.
"""

from __future__ import annotations

from flexflow_engine.graph.builder import GraphBuilder
from flexflow_engine.graph.lanes import read_lane, write_lane
from flexflow_engine.graph.task import (
    ATTENTION_LANE,
    COMPUTE_LANE,
    Attend,
    AttentionInputs,
    AttentionOutput,
    Copy,
    Move,
)
from flexflow_engine.graph.tile_work import TileWork
from flexflow_engine.graph.work import AttentionWork, attention_inputs_flops, matmul_flops
from flexflow_engine.placement.attention import ATTENTION_SLOTS
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.span import Span


class HostAttention:
    """Emits into one builder, for one step. What the tasks read and write besides is told by the caller."""

    def __init__(self, layout: Layout, builder: GraphBuilder, attention: AttentionWork) -> None:
        self._layout, self._builder, self._attention = layout, builder, attention

    def begin(self, work: TileWork, *, weights: list[str], hidden: list[str], cache: list[str]) -> None:
        """Emit what leads to the attended values, in the host's memory. It reads weights and hidden states, and updates
        the cache's locations.
        """
        work.attention = slot = self._builder.next_slot("attention", ATTENTION_SLOTS)
        self._builder.add(
            name=f"attention inputs {work.layer.spec.name}",
            kind="compute",
            tile=work.tile,
            lane=COMPUTE_LANE,
            operation=AttentionInputs(
                layer=work.layer.index,
                batch=work.batch,
                weight_slot=work.weights,
                hidden_slot=work.hidden,
                attention_slot=slot,
            ),
            reads=[*weights, *hidden],
            writes=[self._layout.attention.near_slot(slot)],
            flops=attention_inputs_flops(self._layout, work.batch),
        )
        if self._layout.attention.across_link:
            self._send(work, slot)
        self._attend(work, slot, cache)

    def end(self, work: TileWork, *, weights: list[str], hidden: list[str]) -> None:
        """Emit the rest of the layer, which updates the hidden states."""
        assert work.attention is not None
        slot, inputs_flops = work.attention, attention_inputs_flops(self._layout, work.batch)
        if self._layout.attention.across_link:
            self._receive(work, slot)
        self._builder.add(
            name=f"attention output {work.layer.spec.name}",
            kind="compute",
            tile=work.tile,
            lane=COMPUTE_LANE,
            operation=AttentionOutput(
                layer=work.layer.index,
                batch=work.batch,
                weight_slot=work.weights,
                hidden_slot=work.hidden,
                attention_slot=slot,
            ),
            reads=[*weights, self._layout.attention.near_slot(slot), *hidden],
            writes=hidden,
            flops=matmul_flops(work.layer, work.batch) - inputs_flops,
        )

    def _attend(self, work: TileWork, slot: int, cache: list[str]) -> None:
        updates = [self._layout.attention.host_slot(slot), *cache]
        self._builder.add(
            name=f"attend {work.layer.spec.name}",
            kind="compute",
            tile=work.tile,
            lane=ATTENTION_LANE,
            operation=Attend(layer=work.layer.index, batch=work.batch, kv_slot=work.kv, attention_slot=slot),
            reads=updates,
            writes=updates,
            nbytes=self._attention.nbytes[work.tile.gpu_batch],
            flops=self._attention.flops[work.tile.gpu_batch],
        )

    def _send(self, work: TileWork, slot: int) -> None:
        host, nbytes = self._layout.attention.tier, self._layout.attention_nbytes(len(work.batch.rows))
        self._builder.add(
            name="store queries, keys, values",
            kind="store",
            tile=work.tile,
            lane=write_lane(host),
            operation=Copy(host, (Move(self._near_span(slot, nbytes), self._host_span(slot, nbytes)),)),
            reads=[self._layout.attention.near_slot(slot)],
            writes=[self._layout.attention.host_slot(slot)],
            nbytes=nbytes,
        )

    def _receive(self, work: TileWork, slot: int) -> None:
        host, nbytes = self._layout.attention.tier, self._layout.attended_nbytes(len(work.batch.rows))
        self._builder.add(
            name="load attended values",
            kind="load",
            tile=work.tile,
            lane=read_lane(host),
            operation=Copy(host, (Move(self._host_span(slot, nbytes), self._near_span(slot, nbytes)),)),
            reads=[self._layout.attention.host_slot(slot)],
            writes=[self._layout.attention.near_slot(slot)],
            nbytes=nbytes,
        )

    def _near_span(self, slot: int, nbytes: int) -> Span:
        return Span(self._layout.attention.near_tier, self._layout.attention.near_slot(slot), 0, nbytes)

    def _host_span(self, slot: int, nbytes: int) -> Span:
        return Span(self._layout.attention.tier, self._layout.attention.host_slot(slot), 0, nbytes)
