"""Hidden states between two layers, as torch views of their parts on the compute tier, in place or in a slot."""

from __future__ import annotations

import torch

from flexflow_engine.abc.step import BatchStep
from flexflow_engine.placement.activations import HiddenPart
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.span import Span
from flexflow_engine.runtime.memory import Memory


class HiddenStates:
    """Those of every GPU batch. `slot` is the hidden slot that a tile's far parts are in; None where it has none.

    changing state    _latest    of each GPU batch and slot, where its latest step lies; used from one thread
    """

    def __init__(self, layout: Layout, memory: Memory, dtype: torch.dtype) -> None:
        self._layout, self._memory, self._dtype = layout, memory, dtype
        self._latest: dict[tuple[int, int | None], tuple[BatchStep, list[Span]]] = {}

    def gather(self, batch: BatchStep, slot: int | None) -> torch.Tensor:
        """Of all the batch's tokens, [tokens, hidden_size], in order of rows: a view where they are in one part."""
        parts = self._parts(batch, slot)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put_back(self, batch: BatchStep, slot: int | None, hidden: torch.Tensor) -> None:
        """Write back what `gather` gave, if it was a copy."""
        if len(self._spans(batch, slot)) > 1:
            self.write(batch, slot, hidden)

    def write(self, batch: BatchStep, slot: int | None, hidden: torch.Tensor) -> None:
        """hidden [tokens, hidden_size]"""
        parts = self._parts(batch, slot)
        for part, rows in zip(parts, torch.split(hidden, [len(part) for part in parts]), strict=True):
            part.copy_(rows)

    def _parts(self, batch: BatchStep, slot: int | None) -> list[torch.Tensor]:
        """[tokens of the part, hidden_size] each, in order of rows."""
        tensors = ((self._memory.tensor(span), span.count) for span in self._spans(batch, slot))
        return [tensor.view(self._dtype).view(tokens, -1) for tensor, tokens in tensors]

    def _spans(self, batch: BatchStep, slot: int | None) -> list[Span]:
        """Those of the parts, the same in every layer of a step."""
        key = batch.gpu_batch, slot
        known = self._latest.get(key)
        if known is None or known[0] is not batch:
            parts = ((part, part.tokens(batch)) for part in self._layout.activations.parts[batch.gpu_batch])
            known = self._latest[key] = batch, [self._span(part, tokens, slot) for part, tokens in parts if tokens]
        return known[1]

    def _span(self, part: HiddenPart, tokens: int, slot: int | None) -> Span:
        if part.slot_unit is None:
            return Span(part.tier, part.name, 0, tokens)
        return Span(self._layout.device.name, f"hidden.slot.{slot}", part.slot_unit, tokens)
