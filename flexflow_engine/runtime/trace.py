"""What happened when: one event for each task, and what follows from them.

The lanes append events; `fold`, called for each step that has ended, adds its events to the totals. From then on a
`FoldedTrace` forgets them: a job of 15 million tasks keeps those of two steps.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flexflow_engine.abc.prediction import LaneUse
from flexflow_engine.abc.tier import Completion
from flexflow_engine.files import replacing
from flexflow_engine.graph.builder import TaskGraph
from flexflow_engine.graph.task import Task

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class TaskEvent:
    """One task as it ran. Times are seconds of `time.perf_counter`."""

    task: Task
    worker: int
    """Which of its lane's workers ran it."""
    start: float
    """When the call was made; once folded, on an asynchronous device, when the work could begin."""
    returned: float
    """When the call returned; on an asynchronous device the work may have gone on."""
    completion: Completion

    @property
    def end(self) -> float:
        self.completion.wait()
        finished = self.completion.finished_at()
        return self.returned if finished is None else max(self.start, finished)


class Trace:
    """Keeps every event: first those of the steps folded, then the others in the order in which tasks were issued.

    changing state    events    appended to by the executor, from its lanes' threads
                      _folded   how many of them, from the first on, are in the totals
    """

    def __init__(self) -> None:
        self.events: list[TaskEvent] = []
        self._folded = 0
        self._starts = _Starts()
        self._totals = _Totals()

    def expect(self, graph: TaskGraph) -> None:
        """Tell what waits for what in a step, before it is submitted."""
        self._starts.expect(graph)

    def fold(self, step: int) -> None:
        """Add the events of the steps up to this one, which have ended, to the totals. The step after the next is not
        submitted yet. Lanes may append meanwhile: an append and a slice are each atomic.
        """
        count = len(self.events)
        unfolded = self.events[self._folded : count]
        ended = [self._starts.settle(event) for event in unfolded if event.task.tile.step <= step]
        self.events[self._folded : count] = [*ended, *(e for e in unfolded if e.task.tile.step > step)]
        self._folded += len(ended)
        self._starts.forget(step)
        self._totals.add(ended)

    def lanes(self, names: Iterable[str]) -> dict[str, LaneUse]:
        """Use of every lane named, idle ones included, in the order given."""
        self._fold_rest()
        return {name: self._totals.lane(name) for name in names}

    def step_ends(self) -> dict[int, float]:
        """When each step's last computation ended."""
        self._fold_rest()
        return dict(self._totals.step_ends)

    def write(self, path: Path, tiers: Mapping[str, str]) -> None:
        """Write Chrome trace events (Perfetto opens them); pid is what `tiers` maps a lane to, tid the lane. Raises
        StorageError.
        """
        self._fold_rest()
        origin = min((event.start for event in self.events), default=0.0)
        events = [_chrome_event(event, tiers[event.task.lane], origin) for event in self.events]
        with replacing(path) as partial:
            partial.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def _fold_rest(self) -> None:
        for step in sorted({event.task.tile.step for event in self.events[self._folded :]}):
            self.fold(step)


class FoldedTrace(Trace):
    """Forgets the events that are in the totals, for runs of which no trace file is written."""

    def fold(self, step: int) -> None:
        super().fold(step)
        del self.events[: self._folded]
        self._folded = 0

    def write(self, path: Path, tiers: Mapping[str, str]) -> None:
        raise AssertionError(f"nothing is left to write to {path}: ask for a Trace instead")


def union_seconds(intervals: Sequence[Interval]) -> float:
    """Length of the union of intervals."""
    return sum(end - start for start, end in _merged(intervals))


class _Starts:
    """When work could begin on devices that queue what they are given.

    A call returns before its work begins; that begins once the tasks before it, and what the same worker issued
    before, have ended.
    """

    def __init__(self) -> None:
        self._graphs: dict[int, TaskGraph] = {}
        self._ends: dict[int, dict[str, float]] = defaultdict(dict)
        """step -> task -> its end; of the step before as well, whose tasks a graph carries"""
        self._workers: dict[tuple[str, int], float] = {}
        """(lane, worker) -> the end of its latest task"""

    def expect(self, graph: TaskGraph) -> None:
        self._graphs[graph.step] = graph

    def settle(self, event: TaskEvent) -> TaskEvent:
        """The event with its start. Called in the order in which tasks were issued, after the work has ended."""
        event.completion.wait()
        worker, step = (event.task.lane, event.worker), event.task.tile.step
        if event.completion.finished_at() is not None:
            earlier = [*self._before(event.task), self._workers.get(worker, event.start)]
            event = replace(event, start=max(event.start, *earlier))
        self._workers[worker] = self._ends[step][event.task.key] = event.end
        return event

    def forget(self, step: int) -> None:
        """Keep what the step after `step` is joined to."""
        self._graphs = {number: graph for number, graph in self._graphs.items() if number > step}
        for number in [number for number in self._ends if number < step]:
            del self._ends[number]

    def _before(self, task: Task) -> list[float]:
        step = task.tile.step
        if step not in self._graphs:
            return []
        ends = (self._ends[step], self._ends[step - 1])
        keys = self._graphs[step].digraph.predecessors(task.key)
        return [known[key] for key in keys for known in ends if key in known]


class _Totals:
    """What the steps folded so far add up to."""

    def __init__(self) -> None:
        self._lanes: dict[str, _LaneTotal] = defaultdict(_LaneTotal)
        self._reached = float("-inf")
        self.step_ends: dict[int, float] = {}

    def add(self, events: Sequence[TaskEvent]) -> None:
        """Events of the next step. Whatever comes later starts after the step before this one has ended, since it was
        submitted then.
        """
        intervals: dict[str, list[Interval]] = defaultdict(list)
        for event in events:
            task, end = event.task, event.end
            self._lanes[task.lane].nbytes += task.nbytes
            self._lanes[task.lane].flops += task.flops
            intervals[task.lane].append((event.start, end))
            if task.kind == "compute":
                step = task.tile.step
                self.step_ends[step] = max(self.step_ends.get(step, end), end)
        for lane, own in intervals.items():
            self._lanes[lane].add(own, until=self._reached)
        self._reached = max((end for own in intervals.values() for _, end in own), default=self._reached)

    def lane(self, name: str) -> LaneUse:
        total = self._lanes.get(name, _LaneTotal())
        return LaneUse(total.busy_s, total.nbytes, total.flops)


@dataclass(slots=True)
class _LaneTotal:
    nbytes: int = 0
    flops: float = 0.0
    closed_s: float = 0.0
    """Busy time of intervals that nothing can be added to."""
    recent: list[Interval] = field(default_factory=list)
    """The intervals after those: in order, disjoint."""

    @property
    def busy_s(self) -> float:
        return self.closed_s + sum(end - start for start, end in self.recent)

    def add(self, intervals: Sequence[Interval], until: float) -> None:
        """Add intervals; later calls have none that starts before `until`."""
        merged = _merged([*self.recent, *intervals])
        closed = [interval for interval in merged if interval[1] < until]
        self.closed_s += sum(end - start for start, end in closed)
        self.recent = merged[len(closed) :]


def _merged(intervals: Sequence[Interval]) -> list[Interval]:
    """The union of intervals as disjoint ones, in order."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


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
