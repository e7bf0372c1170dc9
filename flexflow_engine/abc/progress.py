"""How a run tells whoever started it that it is getting on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is."""

    finished_sequences: int
    """Of the whole job, those of earlier runs included."""
    total_sequences: int
    generated_tokens: int
    """Since this run began."""
    seconds: float
    """Of prefill and decode, since then."""
    earlier_sequences: int = 0
    """That earlier runs finished."""


class Progress(Protocol):
    """Called from the engine's main thread, between steps; must return quickly and raise nothing."""

    def reading(self, done_bytes: int, total_bytes: int) -> None:
        """A checkpoint's files so far, read to know whether the store has their weights; called every few MiB, and not
        of files that were read before.
        """

    def importing(self, done_bytes: int, total_bytes: int) -> None:
        """Weights written to the store so far; called after each page or tensor, last with done == total."""

    def step(self, job: JobProgress) -> None:
        """After a step's tokens are known."""

    def notice(self, text: str) -> None:
        """Something worth one line: `weights found in the store`."""
