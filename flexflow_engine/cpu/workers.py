"""Threads that share the work of one kernel call, or of one product.

Numba's own threads are not used: its default layer may not be entered from two threads at once, and lanes do. Nor are
torch's, which split work evenly and wait for each other: where something else takes a core for a while, all of them do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


class Workers:
    """Threads kept from call to call: starting one takes several times as long as waking it. The owner closes them.

    Any thread may share work, several at once; what is shared must not share again.
    """

    def __init__(self, threads: int | None = None) -> None:
        """threads: that work on one call, its caller among them; as many as torch computes with, if not given."""
        self.threads = threads or torch.get_num_threads()
        self._pool = ThreadPoolExecutor(2 * self.threads, thread_name_prefix="kernel")  # two lanes; started when needed

    def share(self, work: Callable[[int], None], parts: int) -> None:
        """Call `work` with 0 ... parts - 1, each in a thread, the first in this one. Raises what a call raised."""
        others = [self._pool.submit(_inferring, work, part) for part in range(1, parts)]
        work(0)
        for other in others:
            other.result()

    def draw(self, work: Callable[[int, int, int], None], count: int, *, step: int = 1) -> None:
        """Call `work` with a thread's number and the bounds [first, stop) of `step` adjoining ones of 0 ... count - 1,
        which threads take part by part: who is kept from working takes fewer. Raises what a call raised.
        """
        parts = range(0, count, step)
        left = iter(parts)

        def take(thread: int) -> None:
            for first in left:
                work(thread, first, min(first + step, count))

        self.share(take, min(self.threads, len(parts)))

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._pool.shutdown()


def _inferring(work: Callable[[int], None], part: int) -> None:
    """torch's inference mode is a thread's own."""
    with torch.inference_mode():
        work(part)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Have torch compute in the calling thread alone, in the whole process: where others share the work, or where it is
    done before they would have woken.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
