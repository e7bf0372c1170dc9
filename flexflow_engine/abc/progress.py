"""How a run tells whoever started it that it is getting on."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called from the engine's main thread, between steps; must return quickly and raise nothing."""

    def reading(self, done_bytes: int, total_bytes: int) -> None:
        """A checkpoint's files so far, read to know whether the store has their weights; called every few MiB, and not
        of files that were read before.
        """

    def importing(self, done_bytes: int, total_bytes: int) -> None:
        """Weights written to the store so far; called after each page or tensor, last with done == total."""

    def step(
        self,
        finished_sequences: int,
        total_sequences: int,
        generated_tokens: int,
        seconds: float,
        *,
        earlier_sequences: int = 0,
    ) -> None:
        """After a step's tokens are known: sequences of the whole job, and of them those that earlier runs finished;
        tokens since the run began, in `seconds` of prefill and decode.
        """

    def notice(self, text: str) -> None:
        """Something worth one line: `weights found in the store`."""
