"""Decode steps of a trace: how long they took, and how long each lane worked in that time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexflow_engine.runtime.trace import union_seconds

MICROSECONDS = 1e-6


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a run that ends with the end of a step, and begins with that of an earlier one."""

    seconds: float
    busy_s: Mapping[str, float]
    """By lane: the union of its tasks' intervals, cut to the window."""

    @property
    def busiest(self) -> str:
        return max(self.busy_s, key=lambda lane: self.busy_s[lane])

    @property
    def ratio(self) -> float:
        """Wall time over the busiest lane's busy time: 1 where that lane never waits."""
        return self.seconds / self.busy_s[self.busiest]


def decode_window(events: Sequence[Mapping[str, Any]], first_step: int) -> Window:
    """From the end of the step before `first_step` to the end of the last. events: Chrome trace events.

    A step ends with its last computation. Loads of a step begin while the step before it computes, so a lane's work is
    counted by when it was done and not by the step that it was for.
    """
    ends: dict[int, float] = defaultdict(float)
    for event in events:
        if event["cat"] == "compute":
            step = event["args"]["step"]
            ends[step] = max(ends[step], event["ts"] + event["dur"])
    begin, end = ends[first_step - 1], max(ends.values())
    lanes: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        start, stop = max(event["ts"], begin), min(event["ts"] + event["dur"], end)
        if start < stop:
            lanes[event["tid"].split(" ")[0]].append((start, stop))  # workers of a lane are "disk.read", "disk.read 2"
    busy = {lane: union_seconds(intervals) * MICROSECONDS for lane, intervals in sorted(lanes.items())}
    return Window((end - begin) * MICROSECONDS, busy)
