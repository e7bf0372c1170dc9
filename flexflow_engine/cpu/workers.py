"""Threads that share the work of one kernel call.

Numba's own threads are not used: its default layer may not be entered from two threads at once, and lanes do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Workers:
    """Threads kept from call to call: starting one takes several times as long as waking it. The owner closes them.

    Any thread may share work, several at once; what is shared must not share again.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kernel")  # starts them as they are needed

    def share(self, work: Callable[[int], None], parts: int) -> None:
        """Call `work` with 0 ... parts - 1, each in a thread, the first in this one. Raises what a call raised."""
        others = [self._pool.submit(work, part) for part in range(1, parts)]
        work(0)
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._pool.shutdown()
