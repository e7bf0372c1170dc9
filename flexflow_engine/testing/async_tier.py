"""A compute tier for tests whose copies run late, as a GPU's do, on a machine without one.

What goes wrong only on CUDA goes wrong here: a host that looks at a buffer before the copy into it has arrived, one
that refills a buffer before the copy out of it has begun, a task that takes *issued* for *done*.

    lane's thread      write a | read b | record e | next task ...          returns at once
    stream's thread      .....a.b....e                                      one by one, each after a random delay

What it cannot show: kernels are the CPU's and run on the calling thread, so they are never late. To keep their order
with the copies, `tensor` first waits for the stream of the context that the thread is in; a device queues the kernel.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

from flexflow_engine.abc.tier import Completion, HostBytes, LaneContext, Region
from flexflow_engine.testing.tiers import IslandTier

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How late copies are."""

    seed: int = 0
    most_delay_seconds: float = 0.003
    """Each copy starts this late at most, evenly distributed."""


class StreamIslandTier(IslandTier):
    """An island whose reads and writes are only issued, on the stream of the context that the thread is in."""

    name = "stream-island"
    Options = StreamOptions

    def __init__(self, *, label: str, budget_bytes: int, options: StreamOptions) -> None:
        super().__init__(label=label, budget_bytes=budget_bytes, options=options)
        self._entered = _Entered()
        self._numbers = itertools.count()

    def read(self, region: Region, first: int, count: int, out: HostBytes) -> None:
        self._issue(partial(super().read, region, first, count, out))

    def write(self, region: Region, first: int, count: int, data: HostBytes) -> None:
        self._issue(partial(super().write, region, first, count, data))

    def tensor(self, region: Region, first: int, count: int) -> torch.Tensor:
        for context in self._entered.contexts[-1:]:
            context.record().wait()
        return super().tensor(region, first, count)

    def lane_context(self) -> StreamContext:
        number = next(self._numbers)
        delays = random.Random(f"{self.options.seed} {number}")
        stream = _Stream(f"{self.label}-stream-{number}", delays, self.options.most_delay_seconds)
        return StreamContext(self, stream, self._entered)

    def _issue(self, copy: Callable[[], None]) -> None:
        assert self._entered.contexts, f"a copy of {self.label} outside of its contexts"
        self._entered.contexts[-1].stream.issue(copy)


class StreamCompletion(Completion):
    """An event that a stream reaches once everything issued before it is done."""

    def __init__(self, tier: StreamIslandTier) -> None:
        self.tier = tier
        self._reached = threading.Event()
        self._failure: Exception | None = None
        self._finished_at = 0.0

    def wait(self) -> None:
        """Block the calling thread until the event is reached. Raises what the stream's first failed copy raised."""
        self._reached.wait()
        if self._failure is not None:
            raise self._failure

    def finished_at(self) -> float:
        assert self._reached.is_set(), "to be asked after wait"
        return self._finished_at

    def reach(self, failure: Exception | None) -> None:
        """Called once, by the stream's thread."""
        self._failure, self._finished_at = failure, time.perf_counter()
        self._reached.set()


class StreamContext(LaneContext):
    """One lane's stream; several threads of the lane may be inside at once and share the stream's order."""

    def __init__(self, tier: StreamIslandTier, stream: _Stream, entered: _Entered) -> None:
        self.stream = stream
        self._tier, self._entered = tier, entered

    def __enter__(self) -> StreamContext:
        self._entered.contexts.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        left = self._entered.contexts.pop()
        assert left is self

    def after(self, completion: Completion) -> None:
        """On this tier the stream waits and the caller does not; for anything else the caller waits."""
        if isinstance(completion, StreamCompletion) and completion.tier is self._tier:
            self.stream.follow(completion)
        else:
            completion.wait()

    def record(self) -> StreamCompletion:
        completion = StreamCompletion(self._tier)
        self.stream.reach(completion)
        return completion

    def close(self) -> None:
        """Wait for this stream's work, and end its thread; completions tell what failed. Idempotent."""
        self.stream.close()


class _Entered(threading.local):
    """The contexts that the calling thread is in, the innermost last."""

    def __init__(self) -> None:
        self.contexts: list[StreamContext] = []


class _Stream:
    """A thread that does one thing after another. After a failure it does no more, and events tell of it."""

    def __init__(self, name: str, delays: random.Random, most_delay_seconds: float) -> None:
        self._delays, self._most_delay_seconds = delays, most_delay_seconds
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def issue(self, copy: Callable[[], None]) -> None:
        self._queue.put(partial(self._attempt, partial(self._late, copy)))

    def follow(self, completion: StreamCompletion) -> None:
        """Hold back what is issued from now on until `completion` is done; its failure is this stream's as well."""
        self._queue.put(partial(self._attempt, completion.wait))

    def reach(self, completion: StreamCompletion) -> None:
        assert self._thread.is_alive(), "the context is closed"
        self._queue.put(lambda: completion.reach(self._failure))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while work := self._queue.get():
            work()

    def _attempt(self, work: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                work()
            except Exception as error:  # whoever waits for an event after this copy raises it
                self._failure = error

    def _late(self, copy: Callable[[], None]) -> None:
        time.sleep(self._delays.random() * self._most_delay_seconds)
        copy()
