"""Executors on a virtual clock: the graphs, lanes and rules of `runtime.executor`, with the cost model's seconds.

A lane takes its tasks in the order of emission, as many at once as it is wide; a taken task starts once all its
predecessors have ended. While it runs, its `fixed_s` passes by the clock, then its `shared_s` at a rate that the others
decide: tasks of one lane are served in turn, and `Beside` says what neighbours leave. Rates change only when a task
starts or ends, so the clock goes from one such event to the next.

    disk.read, width 2    a: latency |= 1 page =| latency |= 1 page =|            a latency passes while the other
                          b: latency             |= 1 page =| latency |= 1 page =|  page is served

    changing state    now        seconds since the job began
                      _waiting   task not yet ended -> how many of its predecessors have not
                      _left      step -> its tasks not yet ended
                      _running   of a lane's tasks in their second part the first one is served
                      _coming    (when, graph): submitted, and not yet in the lanes
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexflow_engine.abc.tier import Done
from flexflow_engine.graph.builder import TaskGraph
from flexflow_engine.graph.task import Task
from flexflow_engine.planning.cost import Work
from flexflow_engine.runtime.trace import TaskEvent

Price = Callable[[Task], Work]
RateBeside = Callable[[str, frozenset[str]], float]
"""(lane, lanes that work beside it) -> the fraction of its rate that is left."""

ROUNDING = 1e-12
"""Relative; tasks that end this close together end at once."""


class VirtualExecutor(ABC):
    """Carries graphs out in the order in which they are submitted; `events` are what happened."""

    warm_up_steps: ClassVar[int]
    """How many steps before it a step's time depends on."""

    def __init__(self, widths: Mapping[str, int], price: Price, rate_beside: RateBeside) -> None:
        self._widths, self._price, self._rate_beside = widths, price, rate_beside
        self.now = 0.0
        self.events: list[TaskEvent] = []

    @abstractmethod
    def submit(self, graph: TaskGraph, at: float) -> None:
        """Give a step's tasks to the lanes at a time not before `now`; at most two steps at once."""

    @abstractmethod
    def wait(self, step: int) -> None:
        """Let the clock run until every task of a submitted step has ended."""


class VirtualSequential(VirtualExecutor):
    """One task after another, as `SequentialExecutor`: nothing overlaps, nothing is shared."""

    warm_up_steps = 0

    def submit(self, graph: TaskGraph, at: float) -> None:
        self.now = max(self.now, at)
        for task in graph.tasks:
            start = self.now
            self.now += self._price(task).seconds
            self.events.append(TaskEvent(task, 0, start, self.now, Done()))

    def wait(self, step: int) -> None:
        return


class VirtualDataflow(VirtualExecutor):
    """Lanes side by side, as `DataflowExecutor`."""

    warm_up_steps = 1

    def __init__(self, widths: Mapping[str, int], price: Price, rate_beside: RateBeside) -> None:
        super().__init__(widths, price, rate_beside)
        self._lanes = {lane: _Lane(width) for lane, width in widths.items()}
        self._waiting: dict[str, int] = {}
        self._followers: dict[str, list[Task]] = defaultdict(list)
        self._taken: dict[str, int] = {}
        self._running: list[_Running] = []
        self._left: dict[int, int] = {}
        self._coming: deque[tuple[float, TaskGraph]] = deque()
        self._rates: dict[tuple[str, frozenset[str]], float] = {}

    def submit(self, graph: TaskGraph, at: float) -> None:
        assert len(self._left) < 2, "wait for the oldest step first"
        self._left[graph.step] = len(graph.tasks)
        self._coming.append((max(at, self.now), graph))

    def wait(self, step: int) -> None:
        while self._left[step]:
            self._go_on()
        del self._left[step]

    def _go_on(self) -> None:
        """To the next moment at which something starts or ends."""
        seconds = [running.left_s / rate for running, rate in self._with_rates() if rate]
        ends = self.now + min(seconds, default=float("inf"))
        if self._coming and self._coming[0][0] <= ends:
            self._pass(self._coming[0][0])
            self._enlist(self._coming.popleft()[1])
            return
        assert seconds, "nothing runs and nothing is coming: the graph is no legal one"
        self._pass(ends)

    def _pass(self, until: float) -> None:
        """Let time pass; tasks that end by then end."""
        elapsed = until - self.now
        tolerance = ROUNDING * max(until, 1e-9)
        still: list[_Running] = []
        queued: list[_Running] = []
        ended: list[_Running] = []
        for running, rate in self._with_rates():
            running.left_s = max(0.0, running.left_s - elapsed * rate)
            if rate and running.left_s / rate <= tolerance:
                running.next_phase()
                (ended if running.over else queued).append(running)
            else:
                still.append(running)
        self.now, self._running = until, still + queued
        for running in ended:
            self._end(running)

    def _with_rates(self) -> Iterator[tuple[_Running, float]]:
        served: dict[str, _Running] = {}
        for running in self._running:
            if running.shares:
                served.setdefault(running.task.lane, running)
        working = frozenset(served)
        for running in self._running:
            lane = running.task.lane
            if not running.shares:
                yield running, 1.0
            else:
                yield running, self._rate(lane, working) if served[lane] is running else 0.0

    def _rate(self, lane: str, working: frozenset[str]) -> float:
        key = lane, working
        if key not in self._rates:
            self._rates[key] = self._rate_beside(lane, working - {lane})
        return self._rates[key]

    def _enlist(self, graph: TaskGraph) -> None:
        self._waiting.update(dict.fromkeys((task.key for task in graph.tasks), 0))
        for task in graph.tasks:
            unended = [key for key in graph.digraph.predecessors(task.key) if key in self._waiting]
            for key in unended:
                self._followers[key].append(task)
            self._waiting[task.key] = len(unended)
            self._lanes[task.lane].queue.append(task)
        for name in self._lanes:
            self._take(name)

    def _take(self, name: str) -> None:
        """The lane's free workers take its next tasks, and start those that wait for nothing."""
        lane = self._lanes[name]
        while lane.queue and lane.free:
            task = lane.queue.popleft()
            self._taken[task.key] = lane.free.pop(0)
            if not self._waiting[task.key]:
                self._start(task)

    def _start(self, task: Task) -> None:
        work = self._price(task)
        running = _Running(task, self._taken.pop(task.key), self.now, work.shared_s, work.fixed_s)
        if not running.left_s and running.shared_s:
            running.next_phase()
        self._running.append(running)

    def _end(self, running: _Running) -> None:
        task = running.task
        self.events.append(TaskEvent(task, running.worker, running.start, self.now, Done()))
        del self._waiting[task.key]
        self._left[task.tile.step] -= 1
        for follower in self._followers.pop(task.key, ()):
            self._waiting[follower.key] -= 1
            if not self._waiting[follower.key] and follower.key in self._taken:
                self._start(follower)
        lane = self._lanes[task.lane]
        lane.free = sorted([*lane.free, running.worker])
        self._take(task.lane)


class _Lane:
    """The tasks that no worker has taken, in order, and the workers that have none."""

    def __init__(self, width: int) -> None:
        self.queue: deque[Task] = deque()
        self.free = list(range(width))


@dataclass(slots=True)
class _Running:
    """A task in its first part, which passes by the clock, or in its second, for which it is served."""

    task: Task
    worker: int
    start: float
    shared_s: float
    left_s: float
    shares: bool = False
    over: bool = False

    def next_phase(self) -> None:
        self.over = self.shares or not self.shared_s
        self.left_s, self.shares = self.shared_s, True
