"""The completions of a job: JSON lines in input order, under their final name only when they are all there.

Until then the file is called `….partial`. What a crash or an error leaves is that file; a file of an earlier run
keeps its place until the new one is whole.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from flexflow_engine.errors import StorageError
from flexflow_engine.files import open_locked, partial_of
from flexflow_engine.jobs.batching import FinishedSequence
from flexflow_engine.jobs.prompts import Prompt
from flexflow_engine.jobs.tokenizer import Tokenizer

TRIAL_NBYTES = 4096


@dataclass(frozen=True, slots=True)
class ExactMatch:
    """How many completions are the expected text, of those whose prompt line knows it."""

    matched: int
    total: int


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How probable the scored tokens were, all lines together."""

    tokens: int
    logprob: float
    """Sum over the tokens, natural logarithms."""

    @property
    def perplexity(self) -> float | None:
        """exp(-mean log-probability); None where that is no finite number."""
        try:
            perplexity = math.exp(-self.logprob / self.tokens)
        except OverflowError:
            return None
        return perplexity if math.isfinite(perplexity) else None


class CompletionWriter:
    """Takes sequences as they end, in any order; used from one thread, as a context manager.

    Constant: the paths, the prompts, the tokenizer. Changing:
        _early      sequences that ended before an earlier one of the input, by index
        _next       index of the next line to write
        _matched, _compared    completions that are what was expected, and those compared
        _scored, _logprob      tokens with a log-probability, and the sum of those
        _finished   whether the file has its final name
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], tokenizer: Tokenizer | None) -> None:
        """Raises StorageError when the file can't be written, so that it is known before the run."""
        self._path, self._partial = path, partial_of(path)
        self._check_target()
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._early: dict[int, FinishedSequence] = {}
        self._next = self._matched = self._compared = self._scored = 0
        self._logprob = 0.0
        self._finished = False
        try:
            self._file = _open_alone(self._partial)
            self._try_out()
        except OSError as error:
            raise self._storage_error(error) from error

    @property
    def exact_match(self) -> ExactMatch | None:
        """None when no prompt said what was expected, or there is no text to compare."""
        return ExactMatch(self._matched, self._compared) if self._compared else None

    @property
    def likelihood(self) -> Likelihood | None:
        """None when no token was scored."""
        return Likelihood(self._scored, self._logprob) if self._scored else None

    def add(self, finished: FinishedSequence) -> None:
        """Take a sequence; what is now complete from the first line on is written. Raises StorageError."""
        self._early[finished.sequence] = finished
        try:
            while (ready := self._early.pop(self._next, None)) is not None:
                self._file.write(self._line(self._prompts[self._next], ready))
                self._next += 1
            self._file.flush()
        except OSError as error:
            raise self._storage_error(error) from error

    def finish(self) -> None:
        """Every prompt has its line: make them durable and give the file its name. Raises StorageError."""
        assert self._next == len(self._prompts), "a sequence is missing"
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._partial.replace(self._path)
            self._file.close()  # only now: the lock ends with it
        except OSError as error:
            raise self._storage_error(error) from error
        self._finished = True

    def close(self) -> None:
        """Let go of the file; without `finish` it stays `.partial`, unless it is empty."""
        with suppress(OSError):  # the disk is full, which `add` has told
            if not self._finished and not self._next:
                self._partial.unlink(missing_ok=True)
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, prompt: Prompt, finished: FinishedSequence) -> str:
        text = None if self._tokenizer is None else self._tokenizer.decode(finished.token_ids)
        self._compare(prompt.expected, text)
        line = {
            "custom_id": prompt.custom_id,
            "text": text,
            "token_ids": finished.token_ids,
            **self._score(finished.logprobs),
            "finish_reason": finished.finish_reason,
            "usage": {"prompt_tokens": len(prompt.token_ids), "completion_tokens": len(finished.token_ids)},
        }
        return json.dumps(line, ensure_ascii=False) + "\n"

    def _score(self, logprobs: Sequence[float]) -> dict[str, list[float | None]]:
        """What a line says of scored tokens. JSON has no infinity and no NaN: null."""
        self._scored += len(logprobs)
        self._logprob += sum(logprobs)
        return {"token_logprobs": [x if math.isfinite(x) else None for x in logprobs]} if logprobs else {}

    def _compare(self, expected: str | None, text: str | None) -> None:
        if expected is not None and text is not None:
            self._compared += 1
            self._matched += text.strip() == expected.strip()

    def _check_target(self) -> None:
        """A device, or a folder, is not to be replaced by a file."""
        try:
            replaceable = self._path.is_file() or not self._path.exists()
        except OSError as error:
            what = f"the completions can't be written ({error.strerror})"
            raise StorageError(what, where=str(self._path), fix="name another file with --output") from error
        if not replaceable:
            raise StorageError("the output is no regular file", where=str(self._path), fix="name another with --output")

    def _try_out(self) -> None:
        """Find a full disk or a used-up quota now."""
        try:
            self._file.write("\n" * TRIAL_NBYTES)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.seek(0)
            self._file.truncate()
        except OSError:
            self.close()
            self._partial.unlink(missing_ok=True)
            raise

    def _storage_error(self, error: OSError) -> StorageError:
        fix = "name a place that can be written with --output"
        return StorageError(f"the completions can't be written ({error.strerror})", where=str(self._partial), fix=fix)


def _open_alone(path: Path) -> TextIO:
    """An empty file at `path` that no other run writes. Raises StorageError when one does, OSError as `open`."""
    try:
        descriptor = open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what = "another run is writing its completions there"
        raise StorageError(what, where=str(path), fix="wait for it, or name another place with --output") from error
    file = os.fdopen(descriptor, "w", encoding="utf-8")
    file.truncate(0)  # only now: what another run has written is left alone until it is known dead
    return file
