"""How a lane issues work to a GPU: a stream of its own, events between streams, and no wait for the whole device."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import torch

from flexflow_engine.abc.tier import Completion, LaneContext

REBASE_SECONDS = 60.0
"""CUDA tells elapsed times in float32 milliseconds: after a minute the last bit is 4 microseconds, after a day 8 ms."""


class DeviceClock:
    """Turns one GPU's events into `time.perf_counter()` seconds.

    Holds one event and its host time, taken when the clock was made; a later event takes its place now and then. All
    lanes of a tier share one clock, so that the order of their events is the device's own; the pair is replaced in one
    assignment. The GPU's oscillator is not the host's: the two drift apart by some parts in a million.
    """

    def __init__(self, device: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        event.synchronize()
        self._base = (event, time.perf_counter())

    def seconds(self, event: torch.cuda.Event) -> float:
        """When `event`, which is done, was reached."""
        base, base_seconds = self._base
        elapsed_seconds = float(base.elapsed_time(event)) / 1000
        if elapsed_seconds > REBASE_SECONDS:
            self._base = (event, base_seconds + elapsed_seconds)
        return base_seconds + elapsed_seconds


class CudaCompletion(Completion):
    """An event that a lane's stream reaches once everything issued before it is done."""

    def __init__(self, event: torch.cuda.Event, device: torch.device, clock: DeviceClock) -> None:
        self.event = event
        self.device = device
        self._clock = clock

    def wait(self) -> None:
        """Block the calling thread, not the device, until the event is reached. Raises what a kernel failed with."""
        self.event.synchronize()

    def finished_at(self) -> float:
        """When the work was done, in `time.perf_counter()` seconds; to be asked after `wait`."""
        return self._clock.seconds(self.event)


class CudaContext(LaneContext):
    """One lane's stream on one GPU; several threads of the lane may be inside at once and share the stream's order."""

    def __init__(self, device: str, clock: DeviceClock) -> None:
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device)
        self._clock = clock
        self._entered = threading.local()

    def __enter__(self) -> CudaContext:
        """Make the device and the stream the calling thread's current ones."""
        scope = ExitStack()
        scope.enter_context(torch.cuda.stream(self.stream))
        self._scopes().append(scope)
        return self

    def __exit__(self, *exc: object) -> None:
        self._scopes().pop().close()

    def after(self, completion: Completion) -> None:
        """On this device the stream waits and the caller does not; for anything else the caller waits."""
        if isinstance(completion, CudaCompletion) and completion.device == self.device:
            self.stream.wait_event(completion.event)
        else:
            completion.wait()

    def record(self) -> CudaCompletion:
        # Waiters sleep (`blocking`) instead of spinning: the host's few cores have tiles to compute.
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(self.stream)
        return CudaCompletion(event, self.device, self._clock)

    def close(self) -> None:
        """Wait for this stream's work, so that regions may be freed afterwards. Idempotent."""
        self.stream.synchronize()

    def _scopes(self) -> list[ExitStack]:
        """What the calling thread has entered and not left."""
        if not hasattr(self._entered, "scopes"):
            self._entered.scopes = []
        scopes: list[ExitStack] = self._entered.scopes
        return scopes
