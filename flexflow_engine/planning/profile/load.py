"""Work done again and again, and how fast it goes: alone, or beside other work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from flexflow_engine.cpu.settings import take_over_torch_threads


@dataclass(frozen=True, slots=True)
class Load:
    """Work that can be repeated without end, by several threads at once."""

    work: Callable[[int], None]
    """Does it once, and returns when that, or on a device what was asked for some calls before, is done; takes the
    number of the calling worker.
    """
    amount: float
    """What one call gets done: bytes, operations."""
    workers: int = 1


def rates(loads: Sequence[Load], seconds: float) -> list[float]:
    """What each load gets done a second while all of them run, for about so many seconds."""
    start = threading.Barrier(sum(load.workers for load in loads))
    with ThreadPoolExecutor(start.parties) as pool:
        repeated = [
            [pool.submit(_repeat, load.work, worker, start, seconds) for worker in range(load.workers)]
            for load in loads
        ]
        return [
            load.amount * _calls_a_second([run.result() for run in runs])
            for load, runs in zip(loads, repeated, strict=True)
        ]


def rate(load: Load, seconds: float) -> float:
    """The same, alone."""
    return rates([load], seconds)[0]


@dataclass(frozen=True, slots=True)
class _Run:
    """What one worker did, in seconds of `time.perf_counter`."""

    calls: int
    begin: float
    end: float


def _calls_a_second(runs: Sequence[_Run]) -> float:
    """Of all workers together: where they take turns, the time that one waits for another counts."""
    return sum(run.calls for run in runs) / (max(run.end for run in runs) - min(run.begin for run in runs))


def _repeat(work: Callable[[int], None], worker: int, start: threading.Barrier, seconds: float) -> _Run:
    """The first call is not counted: it loads what is loaded late, and touches fresh memory."""
    take_over_torch_threads()
    try:
        with torch.inference_mode():
            work(worker)
            start.wait()
            begin = now = time.perf_counter()
            calls = 0
            while now - begin < seconds:
                work(worker)
                calls, now = calls + 1, time.perf_counter()
    except BaseException:
        start.abort()  # the others wait for this one
        raise
    return _Run(calls, begin, now)
