"""Which rows' hidden states lie on which tier between two layers.

A region holds the new tokens of its rows one after another, from its first unit on; a unit is one token's hidden
state. Regions are sized for the longest prompt; a decode step uses one token a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexflow_engine.abc.policy import Placement
from flexflow_engine.abc.step import BatchStep
from flexflow_engine.placement.diffusion import cut_groups


@dataclass(frozen=True, slots=True)
class HiddenPart:
    """Rows [first_row, stop_row) of one GPU batch."""

    tier: str
    name: str
    first_row: int
    stop_row: int
    slot_unit: int | None
    """Where the part starts in a slot; None on a tier that is computed on in place."""

    def tokens(self, batch: BatchStep) -> int:
        """New tokens of the part's rows in a step."""
        if self.first_row <= batch.rows[0].row and batch.rows[-1].row < self.stop_row:  # all, as rows are in order
            return batch.new_tokens
        return sum(row.new_tokens for row in batch.rows if self.first_row <= row.row < self.stop_row)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationLayout:
    """Every GPU batch's hidden states, placed."""

    token_nbytes: int
    max_new_tokens: int
    """Most new tokens of a row in one step: the longest prompt."""
    parts: tuple[tuple[HiddenPart, ...], ...]
    """[gpu_batch]"""

    def units(self, part: HiddenPart) -> int:
        return (part.stop_row - part.first_row) * self.max_new_tokens

    @property
    def slot_units(self) -> int:
        return max((sum(self.units(p) for p in parts if p.slot_unit is not None) for parts in self.parts), default=0)


def place_activations(
    *,
    gpu_batch_size: int,
    num_gpu_batches: int,
    max_new_tokens: int,
    token_nbytes: int,
    placement: Placement,
    direct: frozenset[str],
) -> ActivationLayout:
    """Deal the rows of all GPU batches among the tiers."""
    cuts = cut_groups([[1] * gpu_batch_size] * num_gpu_batches, placement)
    batches = []
    for k, batch in enumerate(cuts):
        parts: list[HiddenPart] = []
        offset = 0
        for cut in batch:
            slotted = cut.tier not in direct
            parts.append(
                HiddenPart(cut.tier, f"hidden.{k}.{cut.start}", cut.start, cut.stop, offset if slotted else None)
            )
            offset += (cut.stop - cut.start) * max_new_tokens if slotted else 0
        batches.append(tuple(parts))
    return ActivationLayout(token_nbytes=token_nbytes, max_new_tokens=max_new_tokens, parts=tuple(batches))
