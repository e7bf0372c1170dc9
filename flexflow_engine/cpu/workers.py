"""Threads that share the work of one kernel call, or of one product.

Numba's own threads are not used: its default layer may not be entered from two threads at once, and lanes do. Nor are
torch's, which split work evenly and wait for each other: where something else takes a core for a while, all of them do.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

SWITCH_SECONDS = 0.0005
T = TypeVar("T")


class Workers:
    """Threads kept from call to call: starting one takes several times as long as waking it. The owner closes them.

    Any thread may share work, several at once; what is shared must not share again.
    """

    def __init__(self, threads: int | None = None) -> None:
        """threads: that work on one call, its caller among them; as many as `torch_threads`, if not given."""
        self.threads = threads or torch_threads()
        self._pool = ThreadPoolExecutor(  # two lanes' threads, started when needed
            2 * self.threads, thread_name_prefix="kernel", initializer=take_over_torch_threads
        )

    def share(self, work: Callable[[int], None], parts: int) -> None:
        """Call `work` with 0 ... parts - 1, each in a thread, the first in this one. When all have ended, raises what
        a call raised.
        """
        modes = _get_current_dispatch_mode_stack() if parts > 1 else ()
        others = [self._pool.submit(_as_in_the_caller, modes, work, part) for part in range(1, parts)]
        try:
            work(0)
        finally:
            for other in others:
                other.exception()
        for other in others:
            other.result()

    def draw(
        self, work: Callable[[int, int, int], None], count: int, *, step: int = 1, threads: int | None = None
    ) -> None:
        """Call `work` with a thread's number and the bounds [first, stop) of `step` adjoining ones of 0 ... count - 1,
        which threads, at most so many, take part by part: who is kept from working takes fewer. When all have ended,
        raises what a call raised; nothing more is drawn then.
        """
        parts = range(0, count, step)
        left = iter(parts)

        def take(thread: int) -> None:
            try:
                for first in left:
                    work(thread, first, min(first + step, count))
            except BaseException:
                deque(left, maxlen=0)
                raise

        self.share(take, min(threads or self.threads, self.threads, len(parts)))

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._pool.shutdown()


def _as_in_the_caller(modes: Sequence[AbstractContextManager[object]], work: Callable[[int], None], part: int) -> None:
    """torch's inference mode and its dispatch modes are a thread's own."""
    with torch.inference_mode(), ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        work(part)


def take_over_torch_threads() -> None:
    """Have libraries that torch calls in this thread keep to torch's number of threads. A thread learns it when it
    first asks for it; until then a BLAS starts a team of its own in it, and two such teams hinder each other.
    """
    torch.get_num_threads()


class _Held(Generic[T]):
    """A setting of the whole process that several may hold to a value, and leave in any order; the last gives it back.

    changing state, guarded by a lock    _before, what it was before the first of those who hold it, once for each
    """

    def __init__(self, get: Callable[[], T], put: Callable[[T], object]) -> None:
        self._get, self._put = get, put
        self._lock = Lock()
        self._before: list[T] = []

    def usual(self) -> T:
        """What it is where nobody holds it."""
        with self._lock:
            return self._usual()

    @contextmanager
    def hold(self, value: T) -> Iterator[None]:
        with self._lock:
            self._before.append(self._usual())
            self._put(value)
        try:
            yield
        finally:
            with self._lock:
                before = self._before.pop()
                if not self._before:
                    self._put(before)

    def _usual(self) -> T:
        return self._before[0] if self._before else self._get()


_THREADS = _Held(torch.get_num_threads, torch.set_num_threads)
_SWITCHES = _Held(sys.getswitchinterval, sys.setswitchinterval)


def torch_threads() -> int:
    """How many threads torch computes with where nobody holds it to one."""
    return _THREADS.usual()


def one_torch_thread() -> AbstractContextManager[None]:
    """Have torch compute in the calling thread alone, in the whole process: where others share the work, or where it is
    done before they would have woken. Several may hold it to that, and leave in any order.
    """
    return _THREADS.hold(1)


def quick_switches() -> AbstractContextManager[None]:
    """While it lasts, a thread that computes in Python hands its lock over after half a millisecond.

    A lane that queues kernels asks for the lock after each of them. Beside a thread that compiles a step it would wait
    for Python's usual 5 ms each time, longer than the kernels take. Several may ask for it, and leave in any order.
    """
    return _SWITCHES.hold(SWITCH_SECONDS)
