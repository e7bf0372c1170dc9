"""What happened when: one event for each task, and what follows from them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexflow_engine.abc.tier import Completion
from flexflow_engine.errors import StorageError
from flexflow_engine.graph.task import Task


@dataclass(frozen=True, slots=True)
class TaskEvent:
    """One task as it ran. Times are seconds of `time.perf_counter`."""

    task: Task
    worker: int
    """Which of its lane's workers ran it."""
    start: float
    returned: float
    """When the call returned; on an asynchronous device the work may have gone on."""
    completion: Completion

    @property
    def end(self) -> float:
        self.completion.wait()
        finished = self.completion.finished_at()
        return self.returned if finished is None else max(self.start, finished)


@dataclass(frozen=True, slots=True)
class LaneUse:
    """One lane over a whole run. Busy time is the union of its tasks' intervals, in seconds."""

    busy_s: float
    nbytes: int
    flops: float


class Trace:
    """Events in the order in which tasks ended; appended to by the executor."""

    def __init__(self) -> None:
        self.events: list[TaskEvent] = []

    def lanes(self, names: Iterable[str]) -> dict[str, LaneUse]:
        """Use of every lane named, idle ones included, in the order given."""
        by_lane: dict[str, list[TaskEvent]] = defaultdict(list)
        for event in self.events:
            by_lane[event.task.lane].append(event)
        return {
            name: LaneUse(
                busy_s=union_seconds([(event.start, event.end) for event in by_lane[name]]),
                nbytes=sum(event.task.nbytes for event in by_lane[name]),
                flops=sum(event.task.flops for event in by_lane[name]),
            )
            for name in names
        }

    def step_ends(self) -> dict[int, float]:
        """When each step's last computation ended."""
        ends: dict[int, float] = {}
        for event in self.events:
            if event.task.kind == "compute":
                step = event.task.tile.step
                ends[step] = max(ends.get(step, event.end), event.end)
        return ends

    def write(self, path: Path, tiers: Mapping[str, str]) -> None:
        """Write Chrome trace events (Perfetto opens them); pid is what `tiers` maps a lane to, tid the lane."""
        origin = min((event.start for event in self.events), default=0.0)
        events = [_chrome_event(event, tiers[event.task.lane], origin) for event in self.events]
        try:
            partial = path.with_name(path.name + ".partial")
            partial.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
            partial.replace(path)
        except OSError as error:
            raise StorageError(f"the trace can't be written: {error.strerror}", where=str(path)) from error


def union_seconds(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _chrome_event(event: TaskEvent, process: str, origin: float) -> dict[str, object]:
    task = event.task
    return {
        "name": task.key.split("/", 3)[3],
        "cat": task.kind,
        "ph": "X",
        "ts": (event.start - origin) * 1e6,
        "dur": (event.end - event.start) * 1e6,
        "pid": process,
        "tid": task.lane if event.worker == 0 else f"{task.lane} {event.worker + 1}",
        "args": {
            "key": task.key,
            "step": task.tile.step,
            "layer": task.tile.layer,
            "gpu_batch": task.tile.gpu_batch,
            "bytes": task.nbytes,
            "flops": task.flops,
        },
    }
