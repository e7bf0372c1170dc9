"""The completions of a job: JSON lines in input order, under their final name only when they are all there.

Until then they lie in a journal called `….partial`, in the order in which their sequences ended. What a crash or an
error leaves is that file, and the next run of the job goes on with it; a file of an earlier job keeps its place until
the new one is whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flexflow_engine.files import PARTIAL, check_place, partial_of, replacing, reporting
from flexflow_engine.jobs.answers import Answers
from flexflow_engine.jobs.batching import FinishedSequence
from flexflow_engine.jobs.identity import JobIdentity
from flexflow_engine.jobs.journal import Journal, Place
from flexflow_engine.jobs.prompts import Prompt
from flexflow_engine.jobs.tokenizer import Tokenizer

ORDERED = f"{PARTIAL}.ordered"
"""How the name of the file ends that is made of the journal."""


class CompletionWriter:
    """Takes sequences as they end, in any order; used from one thread, as a context manager.

    Constant: `identity`, `pending`, `earlier`, the path, the prompts, the tokenizer. Changing:
        answers     what the completions say so far, those of earlier runs among them
        _missing    custom_id -> a prompt that has no completion yet
        _places     custom_id -> where its line lies in the journal
    """

    def __init__(
        self,
        path: Path,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer | None,
        *,
        identity: JobIdentity,
        tell: Callable[[str], None],
        fresh: bool = False,
    ) -> None:
        """identity: of the job. tell: takes a line on what an earlier run has left. fresh: whether that is kept under
        another name, and not gone on with.

        Raises StorageError when the file can't be written, so that it is known before the run.
        """
        self._path, self._partial = path, partial_of(path)
        check_place(path)
        self._prompts, self._tokenizer = prompts, tokenizer
        self._missing = {prompt.custom_id: prompt for prompt in prompts}
        self._places: dict[str, Place] = {}
        self.identity = identity
        self.answers = Answers()
        with reporting(self._partial), ExitStack() as stack:
            self._journal = stack.enter_context(closing(Journal(self._partial, identity, fresh=fresh)))
            for place, line in self._journal.lines():
                self._take(place, line)
            self._tell(tell)
            stack.pop_all()
        self.pending = tuple(self._missing.values())
        """The prompts that no earlier run has completed, in input order: sequence n is the n-th of them."""
        self.earlier = self.done
        """Completions of earlier runs."""

    @property
    def done(self) -> int:
        """Completions that are there, of this run and of earlier ones."""
        return len(self._places)

    def add(self, finished: FinishedSequence) -> None:
        """Take a sequence; from now on no crash of this process loses it. Raises StorageError."""
        line = self._line(self.pending[finished.sequence], finished)
        with reporting(self._partial):
            place = self._journal.append(line)
        self._take(place, line)

    def finish(self) -> None:
        """Every prompt has its line: bring them in order, make them durable, give the file its name.

        Raises StorageError; the journal keeps them then.
        """
        assert not self._missing, "a sequence is missing"
        with replacing(self._path, ORDERED) as ordered:
            self._write_ordered(ordered)
        _settle_names(self._path.parent)
        with reporting(self._partial):
            self._journal.remove()

    def close(self) -> None:
        """Let go of the file; without `finish` it stays `.partial`, unless it is empty."""
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """What ends a job is told with how to go on."""
        if error is not None and self.done and self._partial.exists():
            error.add_note(f"{self._so_far()}; run again to go on")
        self.close()

    def _tell(self, tell: Callable[[str], None]) -> None:
        if self._journal.notice:
            tell(self._journal.notice)
        if self.done:
            tell(f"continuing: {self._so_far()}")

    def _so_far(self) -> str:
        return f"{self.done} of {len(self._prompts)} completions are in {self._partial}"

    def _take(self, place: Place, line: Mapping[str, Any]) -> None:
        """Note a line of the journal; one that no prompt waits for is passed over."""
        prompt = self._missing.pop(line.get("custom_id", ""), None)
        if prompt is not None:
            self._places[prompt.custom_id] = place
            self.answers.count(line, prompt.expected)

    def _line(self, prompt: Prompt, finished: FinishedSequence) -> dict[str, Any]:
        return {
            "custom_id": prompt.custom_id,
            "text": None if self._tokenizer is None else self._tokenizer.decode(finished.token_ids),
            "token_ids": finished.token_ids,
            **_scores(finished.logprobs),
            "finish_reason": finished.finish_reason,
            "usage": {"prompt_tokens": len(prompt.token_ids), "completion_tokens": len(finished.token_ids)},
        }

    def _write_ordered(self, path: Path) -> None:
        with path.open("wb") as file:
            for prompt in self._prompts:
                file.write(self._journal.read(self._places[prompt.custom_id]))
            file.flush()
            os.fsync(file.fileno())


def _scores(logprobs: Sequence[float]) -> dict[str, list[float | None]]:
    """What a line says of scored tokens. JSON has no infinity and no NaN: null."""
    return {"token_logprobs": [x if math.isfinite(x) else None for x in logprobs]} if logprobs else {}


def _settle_names(folder: Path) -> None:
    """Wait until the disk has a folder's names; some file systems refuse that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
