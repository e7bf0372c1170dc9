"""Threads that share the work of one kernel call, or of one product.

Numba's own threads are not used: its default layer may not be entered from two threads at once, and lanes do. Nor are
torch's, but for products of jobs that move nothing (`products.matmul`): they split work evenly and wait for each
other, and where something else takes a core for a while, all of them do.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from flexflow_engine.cpu.settings import take_over_torch_threads, torch_threads


class Workers:
    """Threads kept from call to call: starting one takes several times as long as waking it. The owner closes them.

    Any thread may share work, several at once; what is shared must not share again. Each has threads of its own, no
    more than work on one call: of several idle ones another would wake each time, on a processor that is busy.

    Changing state, under a lock: `_pools`, one for each thread that has shared work and goes on; `_closed`.
    """

    def __init__(self, threads: int | None = None) -> None:
        """threads: that work on one call, its caller among them; as many as `torch_threads`, if not given."""
        self.threads = threads or torch_threads()
        self._pools: list[tuple[threading.Thread, ThreadPoolExecutor]] = []
        self._closed = False
        self._lock, self._own = threading.Lock(), threading.local()

    def share(self, work: Callable[[int], None], parts: int) -> None:
        """Call `work` with 0 ... parts - 1, each in a thread, the first in this one; no more of them than `threads`.
        When all have ended, raises what a call raised.
        """
        assert parts <= self.threads
        self._together(work, parts, needs_all=True)

    def draw(self, work: Callable[[int, int], None], count: int, *, threads: int | None = None) -> None:
        """Call `work` with a thread's number and one of 0 ... count - 1, which threads, at most so many, take one after
        another: who is kept from working takes fewer, and who has not begun when nothing is left is not waited for.
        When all have ended, raises what a call raised; nothing more is drawn then.
        """
        threads = min(threads or self.threads, self.threads, count)
        if threads <= 1:
            for item in range(count):
                work(0, item)
            return
        left, kept = iter(range(count)), [work]

        def take(thread: int) -> None:
            try:
                for item in left:
                    kept[0](thread, item)
            except BaseException:
                deque(left, maxlen=0)
                raise

        try:
            self._together(take, threads, needs_all=False)
        finally:
            kept.clear()  # the pool keeps `take` until a thread finds it cancelled, and must not keep what `work` holds

    def close(self) -> None:
        """End the threads; nobody may be sharing work, nor share any later. Idempotent."""
        with self._lock:
            self._closed, pools = True, self._pools.copy()
        for _, pool in pools:
            pool.shutdown()

    def _together(self, work: Callable[[int], None], parts: int, *, needs_all: bool) -> None:
        """The first part in this thread. needs_all: also those not begun when it ends."""
        modes = _get_current_dispatch_mode_stack() if parts > 1 else ()
        others = [self._pool().submit(_as_in_the_caller, modes, work, part) for part in range(1, parts)]
        try:
            work(0)
        finally:
            begun = [other for other in others if needs_all or not other.cancel()]
            for other in begun:
                other.exception()
        for other in begun:
            other.result()

    def _pool(self) -> ThreadPoolExecutor:
        """Of the thread that calls; its threads start when needed."""
        try:
            return self._own.pool  # type: ignore[no-any-return]  # a thread's local state has no types
        except AttributeError:
            self._own.pool = pool = self._new_pool()
            return pool

    def _new_pool(self) -> ThreadPoolExecutor:
        """And an end to those whose threads have ended."""
        pool = ThreadPoolExecutor(
            max(1, self.threads - 1), thread_name_prefix="kernel", initializer=take_over_torch_threads
        )
        with self._lock:
            assert not self._closed
            left = [(owner, pool) for owner, pool in self._pools if not owner.is_alive()]
            self._pools = [(owner, pool) for owner, pool in self._pools if owner.is_alive()]
            self._pools.append((threading.current_thread(), pool))
        for _, idle in left:
            idle.shutdown()
        return pool


def _as_in_the_caller(modes: Sequence[AbstractContextManager[object]], work: Callable[[int], None], part: int) -> None:
    """torch's inference mode and its dispatch modes are a thread's own."""
    with torch.inference_mode(), ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        work(part)
