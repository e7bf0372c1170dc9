"""What a tile's computation needs from other tiers and leaves to them: rows of the table and hidden states.

Each function emits the tasks of one tile. Loads return the slot that they fill, None when nothing has to be loaded.
"""

from __future__ import annotations

from math import ceil

from flexflow_engine.abc.step import BatchStep
from flexflow_engine.graph.builder import GraphBuilder
from flexflow_engine.graph.lanes import read_lane
from flexflow_engine.graph.task import Copy, GatherRows, Move, Tile
from flexflow_engine.graph.transfers import Transfer, Transfers
from flexflow_engine.placement.activations import HiddenPart
from flexflow_engine.placement.layout import EMBED_SLOTS, HIDDEN_SLOTS, Layout
from flexflow_engine.placement.span import Span


class TileIO:
    """Emits into one builder, for one step."""

    def __init__(self, layout: Layout, builder: GraphBuilder, transfers: Transfers) -> None:
        self._layout = layout
        self._device = layout.device.name
        self._builder = builder
        self._transfers = transfers

    def gather_rows(self, tile: Tile, batch: BatchStep) -> int:
        """Look up the table's rows that lie on far tiers; the computation looks up the compute tier's own."""
        slot = self._builder.next_slot("embed", EMBED_SLOTS)
        target = Span(self._device, f"embed.slot.{slot}", 0, batch.new_tokens)
        far_tiers = self._layout.far_table_tiers
        self._builder.begin(target.region)
        if self._layout.stages_rows:
            assert self._layout.staging is not None
            staged = Span(self._layout.staging, "staging.embed", 0, batch.new_tokens)
            self._builder.begin(staged.region)
            self._gather(tile, batch, far_tiers, staged)
            self._builder.add(
                name="load rows",
                kind="load",
                tile=tile,
                lane=read_lane(staged.tier),
                operation=Copy(staged.tier, (Move(staged, target),)),
                reads=[staged.region],
                adds=[target.region],
                nbytes=staged.count * self._layout.embed_row_nbytes,
            )
        else:
            self._gather(tile, batch, far_tiers, target)
        return slot

    def load_hidden(self, tile: Tile, batch: BatchStep) -> int | None:
        parts = self._slotted_parts(batch)
        if not parts:
            return None
        slot = self.hidden_slot()
        location = f"hidden.slot.{slot}"
        self._builder.begin(location)
        for part, tokens in parts:
            move = Transfer(
                Span(part.tier, part.name, 0, tokens),
                Span(self._device, location, part.slot_unit or 0, tokens),
                self._layout.activations.token_nbytes,
            )
            self._transfers.load(part.name, tile, [move], reads=[part.name], adds=location)
        return slot

    def hidden_slot(self) -> int:
        return self._builder.next_slot("hidden", HIDDEN_SLOTS)

    def store_hidden(self, tile: Tile, batch: BatchStep, slot: int) -> None:
        location = f"hidden.slot.{slot}"
        for part, tokens in self._slotted_parts(batch):
            move = Transfer(
                Span(self._device, location, part.slot_unit or 0, tokens),
                Span(part.tier, part.name, 0, tokens),
                self._layout.activations.token_nbytes,
            )
            self._transfers.store(part.name, tile, [move], reads=location, writes=part.name)

    def hidden_locations(self, batch: BatchStep, slot: int | None) -> list[str]:
        """The locations that a computation updates: resident parts, and the slot."""
        parts = self._layout.activations.parts[batch.gpu_batch]
        resident = [part.name for part in parts if part.slot_unit is None and part.tokens(batch)]
        return resident if slot is None else [*resident, f"hidden.slot.{slot}"]

    def has_slotted_hidden(self, batch: BatchStep) -> bool:
        return bool(self._slotted_parts(batch))

    def _gather(self, tile: Tile, batch: BatchStep, far_tiers: list[str], target: Span) -> None:
        rows_nbytes = batch.new_tokens * self._layout.embed_row_nbytes
        for far in far_tiers:
            self._builder.add(
                name=f"gather rows from {far}",
                kind="load",
                tile=tile,
                lane=read_lane(far),
                operation=GatherRows(far, target, batch),
                reads=[f"tokens.{batch.gpu_batch}"] if batch.phase == "decode" else [],
                adds=[target.region],
                nbytes=ceil(rows_nbytes * self._layout.weights.table_share(far)),
            )

    def _slotted_parts(self, batch: BatchStep) -> list[tuple[HiddenPart, int]]:
        """Parts that pass through a slot, with their number of tokens in this step."""
        parts = self._layout.activations.parts[batch.gpu_batch]
        return [(p, tokens) for p in parts if p.slot_unit is not None and (tokens := p.tokens(batch))]
