"""How long a call takes at best."""

from __future__ import annotations

import time
from collections.abc import Callable


def best_seconds(run: Callable[[], object], count: int) -> float:
    """Of `count` calls, after one that is not counted."""
    run()  # compiles
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
