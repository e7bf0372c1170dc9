"""The engine's progress for whoever waits: a live line on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from rich.console import Console
from rich.status import Status

from flexflow_engine.abc.durations import format_duration
from flexflow_engine.abc.progress import JobProgress, Progress
from flexflow_engine.abc.sizes import format_size

PLAIN_INTERVAL_SECONDS = 5.0
"""Between two plain lines about the same thing; its first and its last are always written."""


@contextmanager
def progress_on_stderr() -> Iterator[Progress]:
    """The progress that suits where stderr goes."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield PlainProgress(sys.stderr, time.monotonic)
        return
    with console.status("starting") as status:
        yield LiveProgress(console, status)


class PlainProgress:
    """One line an update, at most one in PLAIN_INTERVAL_SECONDS."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._last: dict[str, float] = {}

    def reading(self, done_bytes: int, total_bytes: int) -> None:
        if self._due("read", done_bytes == total_bytes):
            self.notice(_moving("reading the checkpoint", done_bytes, total_bytes))

    def importing(self, done_bytes: int, total_bytes: int) -> None:
        if self._due("import", done_bytes == total_bytes):
            self.notice(_moving("importing weights", done_bytes, total_bytes))

    def step(self, job: JobProgress) -> None:
        if self._due("step", job.finished_sequences == job.total_sequences):
            self.notice(_step(job))

    def notice(self, text: str) -> None:
        with suppress(OSError):  # nobody reads it any more, as with `2>&1 | head -3`: that ends no job
            print(text, file=self._stream, flush=True)

    def _due(self, about: str, last: bool) -> bool:
        now = self._clock()
        due = last or now - self._last.get(about, -PLAIN_INTERVAL_SECONDS) >= PLAIN_INTERVAL_SECONDS
        if due:
            self._last[about] = now
        return due


class LiveProgress:
    """One line that changes in place; notices stay above it, and end what it told."""

    def __init__(self, console: Console, status: Status) -> None:
        self._console = console
        self._status = status

    def reading(self, done_bytes: int, total_bytes: int) -> None:
        self._status.update(_moving("reading the checkpoint", done_bytes, total_bytes))

    def importing(self, done_bytes: int, total_bytes: int) -> None:
        self._status.update(_moving("importing weights", done_bytes, total_bytes))

    def step(self, job: JobProgress) -> None:
        self._status.update(_step(job))

    def notice(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)
        self._status.update("working")


def _moving(what: str, done_bytes: int, total_bytes: int) -> str:
    percent = 100 * done_bytes / total_bytes if total_bytes else 100
    return f"{what}: {format_size(done_bytes)} of {format_size(total_bytes)} ({percent:.0f} %)"


def _step(job: JobProgress) -> str:
    finished, total, tokens, seconds = job.finished_sequences, job.total_sequences, job.generated_tokens, job.seconds
    rate, here = tokens / seconds if seconds else 0.0, finished - job.earlier_sequences
    left = f", about {format_duration(seconds * (total - finished) / here)} left" if here and finished < total else ""
    return f"{finished} of {total} sequences, {tokens} tokens, {rate:.1f} tokens/s{left}"
