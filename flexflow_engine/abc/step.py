"""One step of a job: which rows of which gpu batches compute how many new tokens. Plain data.

A job decides the composition of its steps (`jobs.batching`), the graph compiles them, the runtime carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStep:
    """One sequence's part in a step. It yields one token, that after its last position."""

    row: int
    """Place in the gpu batch, 0 up to gpu_batch_size; a sequence keeps its row until it ends."""
    sequence: int
    """Index of the sequence in the job's input."""
    new_tokens: int
    """Positions to compute: the whole prompt, or 1."""
    context: int
    """Tokens of the sequence that are cached already; 0 for a prompt."""


@dataclass(frozen=True, slots=True)
class BatchStep:
    """One gpu batch's part in a step; its rows, in ascending order, are all in the same phase."""

    gpu_batch: int
    rows: tuple[RowStep, ...]
    new_tokens: int = field(init=False, compare=False)
    """Positions computed, over all rows."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "new_tokens", sum(row.new_tokens for row in self.rows))

    @property
    def phase(self) -> Phase:
        return "decode" if self.rows[0].context else "prefill"


@dataclass(frozen=True, slots=True)
class Step:
    """What is computed in one pass through the layers; gpu batches in ascending order, none without rows."""

    index: int
    """0 for the first step of the job, then one more each."""
    batches: tuple[BatchStep, ...]

    def new_tokens(self, phase: Phase) -> int:
        """Positions computed in one phase, over all gpu batches."""
        return sum(batch.new_tokens for batch in self.batches if batch.phase == phase)


@dataclass(frozen=True, slots=True)
class NextTokens:
    """What a step yields for one gpu batch: a token a row, in the order of its rows."""

    token_ids: Sequence[int]
    logprobs: Sequence[float] = ()
    """Natural logarithm of each token's probability; empty where tokens are not scored."""
    not_finite: Sequence[int] = ()
    """Places of rows whose best logit is infinite or no number, so that their tokens mean nothing."""
