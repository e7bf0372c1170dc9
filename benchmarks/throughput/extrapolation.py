"""What a whole job of steps that are all alike takes, from a few of them at its beginning and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledJob:
    """Seconds of a job's parts. A step grows with the cache, linearly, from the first ones to the last ones."""

    batch_size: int
    new_tokens: int
    prefill_s: float
    first_steps_s: Sequence[float]
    """Decode steps right after the prompts."""
    last_steps_s: Sequence[float]
    """Decode steps with the cache as long as it is at the job's end."""

    @property
    def step_s(self) -> float:
        """A mean step: half way between the first and the last."""
        return (median(self.first_steps_s) + median(self.last_steps_s)) / 2

    @property
    def seconds(self) -> float:
        """The prompts give each sequence its first token, the other tokens take a step each."""
        return self.prefill_s + (self.new_tokens - 1) * self.step_s

    @property
    def tokens_per_s(self) -> float:
        return self.batch_size * self.new_tokens / self.seconds
