"""Two executors of the same graphs: by dataflow in parallel lanes, and one task after another for reference.

A lane takes its tasks in the order of emission. A task is *issued* when its call has returned; its completion tells
when its work is done. A task starts when all its predecessors have been issued, after its lane's context was told to
wait for their completions: on the host that blocks the lane's worker, on CUDA it queues an event on the lane's stream.

    changing state, guarded by one lock
        _waiting     task -> predecessors not yet issued
        _followers   task -> tasks that wait for it
        _gates       taken task -> where its worker sleeps until the last of its predecessors has been issued
        _completions issued tasks of the steps in flight; a task missing here ended with a step that is over
        _left        step -> its tasks not yet issued
        _failure     the first exception; ends every lane
        _progress_at when a task started or ended last; written without the lock, too
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import NoReturn

import torch

from flexflow_engine.abc.tier import Completion, LaneContext
from flexflow_engine.cpu.settings import take_over_torch_threads
from flexflow_engine.errors import StalledError, TaskError
from flexflow_engine.graph.builder import TaskGraph
from flexflow_engine.graph.task import HOST_OPERATIONS, TOKENS_LANE, Task
from flexflow_engine.runtime.trace import TaskEvent, Trace

RunTask = Callable[[Task], None]
ContextFor = Callable[[str], LaneContext]


class Executor(ABC):
    """Runs the steps' graphs in the order in which they are submitted. Used from one thread."""

    @abstractmethod
    def submit(self, graph: TaskGraph) -> None:
        """Take a step's graph on, with at most the step before it not waited for: its edges reach no further back.
        Returns at once, or when it is done. Raises TaskError if a task has failed.
        """

    @abstractmethod
    def wait(self, step: int) -> None:
        """Block until every task of a submitted step has run. Raises TaskError with the cause if one failed,
        StalledError if no task runs and none starts for too long.
        """

    @abstractmethod
    def close(self) -> None:
        """End every thread and release every context, finished or not: tasks that run are waited for, as they use what
        the caller releases next; a second Ctrl-C ends the waiting. Idempotent.
        """


class SequentialExecutor(Executor):
    """One task after another, in the order of emission: what the dataflow executor must agree with, bit for bit."""

    def __init__(self, run: RunTask, widths: Mapping[str, int], context_for: ContextFor, trace: Trace) -> None:
        self._run, self._trace = run, trace
        self._contexts = {lane: context_for(lane) for lane in widths}

    def submit(self, graph: TaskGraph) -> None:
        with torch.inference_mode():
            for task in graph.tasks:
                context = self._contexts[task.lane]
                with _naming(task), context:
                    self._trace.events.append(_run_in(context, self._run, task, worker=0))
                    self._trace.events[-1].completion.wait()

    def wait(self, step: int) -> None:
        return

    def close(self) -> None:
        with ExitStack() as stack:
            for context in self._contexts.values():
                stack.callback(context.close)
        self._contexts = {}


class DataflowExecutor(Executor):
    """Every lane has its own worker threads; see the module's docstring for the state they share."""

    def __init__(
        self,
        run: RunTask,
        widths: Mapping[str, int],
        context_for: ContextFor,
        trace: Trace,
        stall_seconds: float = 900.0,
    ) -> None:
        """stall_seconds: after this long without a task that runs, starts or ends, `wait` gives up. A task that
        hangs is none of that: it is waited for.
        """
        self._run, self._trace, self._stall_seconds = run, trace, stall_seconds
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._lanes = {lane: _Lane(threading.Condition(self._lock)) for lane in widths}
        self._waiting: dict[str, int] = {}
        self._followers: dict[str, list[Task]] = defaultdict(list)
        self._gates: dict[str, SimpleQueue[None]] = {}
        self._predecessors: dict[str, tuple[str, ...]] = {}
        self._completions: dict[str, Completion] = {}
        self._left: dict[int, int] = {}
        self._keys: dict[int, list[str]] = {}
        self._failure: BaseException | None = None
        self._closed = False
        self._progress_at = time.monotonic()
        self._threads = [
            threading.Thread(target=self._work, args=(lane, worker, context_for), name=f"{lane}-{worker}", daemon=True)
            for lane, width in widths.items()
            for worker in range(width)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, graph: TaskGraph) -> None:
        with self._lock:
            self._raise_failure()
            assert len(self._left) < 2, "wait for the oldest step first"
            self._progress_at = time.monotonic()
            self._left[graph.step] = len(graph.tasks)
            self._keys[graph.step] = [task.key for task in graph.tasks]
            self._waiting.update(dict.fromkeys(self._keys[graph.step], 0))
            for task in graph.tasks:
                self._enlist(task, tuple(graph.digraph.predecessors(task.key)))
            for lane in self._lanes.values():
                lane.changed.notify_all()

    def wait(self, step: int) -> None:
        with self._lock:
            while self._left[step]:
                self._raise_failure()
                self._idle.wait(timeout=min(1.0, self._stall_seconds / 4))
                self._raise_stall()
            self._raise_failure()
            completions = [self._completions[key] for key in self._keys[step]]
        for completion in completions:  # issued is not done: later steps take what is forgotten here as done
            completion.wait()
        with self._lock:
            del self._left[step]
            for key in self._keys.pop(step):
                del self._completions[key], self._waiting[key], self._predecessors[key]
                self._followers.pop(key, None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._wake_all()
        for thread in self._threads:
            thread.join()

    def _enlist(self, task: Task, predecessors: tuple[str, ...]) -> None:
        unissued = [key for key in predecessors if key in self._waiting and key not in self._completions]
        for key in unissued:
            self._followers[key].append(task)
        self._waiting[task.key] = len(unissued)
        self._predecessors[task.key] = predecessors
        self._lanes[task.lane].queue.append(task)

    def _work(self, lane_name: str, worker: int, context_for: ContextFor) -> None:
        take_over_torch_threads()
        gate = SimpleQueue[None]()
        try:
            with ExitStack() as stack:
                context = context_for(lane_name)
                stack.callback(context.close)
                stack.enter_context(self._reporting())  # first, should closing the context fail as well
                stack.enter_context(torch.inference_mode())
                stack.enter_context(context)
                while task := self._next(self._lanes[lane_name], gate):
                    self._execute(task, worker, context)
        except BaseException as error:  # a thread's exception is the run's: wait() raises it
            self._fail(error)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """The first failure is the run's; it ends every lane."""
        with self._lock:
            self._failure = self._failure or error
            self._wake_all()

    def _next(self, lane: _Lane, gate: SimpleQueue[None]) -> Task | None:
        """The lane's next task once it may start; None when the run is over."""
        with self._lock:
            while not lane.queue and not self._over:
                lane.changed.wait()
            if self._over:
                return None
            task = lane.queue.popleft()
            lane.taken.append(task)
            if waits := self._waiting[task.key] > 0:
                self._gates[task.key] = gate
        if waits:
            gate.get()
        self._progress_at = time.monotonic()
        return None if self._over else task

    def _execute(self, task: Task, worker: int, context: LaneContext) -> None:
        with self._lock:
            before = [self._completions[key] for key in self._predecessors[task.key] if key in self._completions]
        with _naming(task):
            for completion in before:
                if isinstance(task.operation, HOST_OPERATIONS):
                    completion.wait()
                else:
                    context.after(completion)
            event = _run_in(context, self._run, task, worker)
        with self._lock:
            opened = self._finish(task, event)
        for gate in opened:  # whoever wakes may take this core, and must not find the lock held
            gate.put(None)

    def _finish(self, task: Task, event: TaskEvent) -> list[SimpleQueue[None]]:
        """The gates of tasks that may start now."""
        self._trace.events.append(event)
        self._progress_at = time.monotonic()
        self._completions[task.key] = event.completion
        self._lanes[task.lane].taken.remove(task)
        for follower in self._followers[task.key]:
            self._waiting[follower.key] -= 1
        self._left[task.tile.step] -= 1
        if not self._left[task.tile.step]:
            self._idle.notify_all()
        ready = [follower.key for follower in self._followers[task.key] if not self._waiting[follower.key]]
        return [self._gates.pop(key) for key in ready if key in self._gates]

    @property
    def _runs_any(self) -> bool:
        """Whether a worker carries a task out: it is taken and waits for nothing."""
        return any(not self._waiting[task.key] for lane in self._lanes.values() for task in lane.taken)

    @property
    def _over(self) -> bool:
        return self._closed or self._failure is not None

    def _wake_all(self) -> None:
        self._idle.notify_all()
        for lane in self._lanes.values():
            lane.changed.notify_all()
        while self._gates:
            self._gates.popitem()[1].put(None)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _raise_stall(self) -> None:
        if time.monotonic() - self._progress_at > self._stall_seconds and not self._runs_any:
            heads = [task.key for lane in self._lanes.values() for task in lane.heads]
            _stall(self._stall_seconds, heads)


class _Lane:
    """Tasks in order: those that workers have `taken`, to run or to wait for predecessors, then the `queue`."""

    def __init__(self, changed: threading.Condition) -> None:
        self.taken: list[Task] = []
        self.queue: deque[Task] = deque()
        self.changed = changed

    @property
    def heads(self) -> list[Task]:
        """What holds the lane up: the tasks taken; the next one if there is none."""
        return self.taken or list(self.queue)[:1]


@contextmanager
def _naming(task: Task) -> Iterator[None]:
    """An exception inside is the cause of a TaskError that names the task."""
    try:
        yield
    except Exception as error:
        raise TaskError(f"task {task.key!r} of lane {task.lane} failed: {error}") from error


def _run_in(context: LaneContext, run: RunTask, task: Task, worker: int) -> TaskEvent:
    """context: entered."""
    start = time.perf_counter()
    run(task)
    completion = context.record()
    if task.lane == TOKENS_LANE:
        completion.wait()  # the host reads the tokens as soon as the task counts as issued
    return TaskEvent(task, worker, start, time.perf_counter(), completion)


def _stall(seconds: float, heads: list[str]) -> NoReturn:
    waiting = ", ".join(heads) or "none"
    raise StalledError(f"no task ran for {seconds:g} s; at the heads of their lanes: {waiting}")
