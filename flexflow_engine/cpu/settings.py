"""Settings of the whole process that a run needs otherwise while it lasts."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import Generic, TypeVar

import torch

SWITCH_SECONDS = 0.00002
T = TypeVar("T")


class _Held(Generic[T]):
    """A setting of the whole process that several may hold to a value, and leave in any order; the last gives it back.

    changing state, guarded by a lock    _before, what it was before the first of those who hold it, and to what they
                                         hold it, once for each
    """

    def __init__(self, get: Callable[[], T], put: Callable[[T], object]) -> None:
        self._get, self._put = get, put
        self._lock = Lock()
        self._before: list[tuple[T, T]] = []

    def usual(self) -> T:
        """What it is where nobody holds it."""
        with self._lock:
            return self._usual()

    @contextmanager
    def hold(self, value: T) -> Iterator[None]:
        with self._lock:
            self._before.append((self._usual(), value))
            self._put(value)
        try:
            yield
        finally:
            with self._lock:
                before, _ = self._before.pop()
                if not self._before:
                    self._put(before)

    def take_over(self) -> None:
        """Of a setting that every thread has for itself: in this one what it is held to, or what it is."""
        with self._lock:
            self._put(self._before[-1][1] if self._before else self._get())

    def _usual(self) -> T:
        return self._before[0][0] if self._before else self._get()


_THREADS = _Held(torch.get_num_threads, torch.set_num_threads)
_SWITCHES = _Held(sys.getswitchinterval, sys.setswitchinterval)


def _is_frozen() -> bool:
    return gc.get_freeze_count() > 0


def _freeze(wanted: bool) -> None:
    if wanted and not _is_frozen():
        gc.collect()  # what is garbage already would be kept as well
        gc.freeze()
    elif not wanted:
        gc.unfreeze()


_STANDING = _Held(_is_frozen, _freeze)


def torch_threads() -> int:
    """How many threads torch computes with where nobody holds it to one."""
    return _THREADS.usual()


def one_torch_thread() -> AbstractContextManager[None]:
    """Have torch compute in the calling thread alone, in the whole process: where others share the work, or where it is
    done before they would have woken. Several may hold it to that, and leave in any order.
    """
    return _THREADS.hold(1)


def take_over_torch_threads() -> None:
    """Have torch, and libraries that it calls, keep to its number of threads in this thread, which has just begun. A
    thread learns it when it first asks for it; until then a BLAS starts a team of its own in it, and two such teams
    hinder each other.
    """
    _THREADS.take_over()


@contextmanager
def torch_team(threads: int) -> Iterator[None]:
    """Have torch share what this thread computes among so many of its own threads, within `one_torch_thread`. Other
    threads keep to one, if they have taken that over.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quick_switches() -> AbstractContextManager[None]:
    """While it lasts, a thread that computes in Python hands its lock over after 20 microseconds.

    A lane that queues kernels asks for the lock after each of them. Beside a thread that compiles a step an operator of
    torch's took 2.7 ms with Python's usual 5 ms, 0.2 ms with 0.5, and 25 microseconds with this; the other thread lost
    6 % of its time. Several may ask for it, and leave in any order.
    """
    return _SWITCHES.hold(SWITCH_SECONDS)


def standing_heap() -> AbstractContextManager[None]:
    """While it lasts, searches for cycles of references pass over everything that there was before. Such a search holds
    Python's lock; through a few hundred thousand objects of imported modules it stops all lanes for 0.2 s each time.

    Several may ask for it, and leave in any order. A program that froze its heap itself is left as it is.
    """
    return _STANDING.hold(True)
