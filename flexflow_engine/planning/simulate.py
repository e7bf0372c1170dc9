"""A run on the virtual clock: the session's loop, the compiler's graphs, the cost model's seconds.

As in `runtime.session`, a step is compiled while the one before it runs, and submitted once the one before that has
ended. The host's time to compile it counts.
"""

from __future__ import annotations

import gc
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from flexflow_engine.abc.hardware import HardwareProfile
from flexflow_engine.abc.policy import Policy, WorkloadShape
from flexflow_engine.abc.prediction import LaneUse
from flexflow_engine.abc.step import NextTokens, Step
from flexflow_engine.graph.builder import Frontier
from flexflow_engine.graph.compile import StepCompiler
from flexflow_engine.jobs.batching import LAG, Batcher
from flexflow_engine.placement.layout import Layout
from flexflow_engine.planning.clock import VirtualExecutor
from flexflow_engine.planning.contention import Contention
from flexflow_engine.planning.cost import CostModel
from flexflow_engine.runtime.trace import TaskEvent, union_seconds


@dataclass(frozen=True, slots=True)
class StepRun:
    """What one step took: from the end of the step before it to its own, and the work of its own tasks."""

    seconds: float
    lanes: Mapping[str, LaneUse]


@dataclass(frozen=True, slots=True)
class Simulator:
    """Runs steps of one layout."""

    layout: Layout
    costs: CostModel
    profile: HardwareProfile
    executor: type[VirtualExecutor]

    def run(self, steps: Sequence[Step]) -> list[StepRun]:
        """What each of these adjoining steps takes, the first beginning with empty lanes."""
        events = self.events(steps)
        ends: dict[int, float] = defaultdict(float)
        by_step: dict[int, list[TaskEvent]] = defaultdict(list)
        for event in events:
            by_step[event.task.tile.step].append(event)
            if event.task.kind == "compute":
                ends[event.task.tile.step] = max(ends[event.task.tile.step], event.end)
        starts = [0.0, *(ends[step.index] for step in steps)]
        return [
            StepRun(ends[step.index] - start, lane_use(by_step[step.index]))
            for step, start in zip(steps, starts, strict=False)
        ]

    def events(self, steps: Sequence[Step]) -> list[TaskEvent]:
        """Every task of these adjoining steps, in the order in which they ended."""
        with _uncollected():
            return self._events(steps)

    def _events(self, steps: Sequence[Step]) -> list[TaskEvent]:
        compiler, frontier = StepCompiler(self.layout), Frontier()
        contention = Contention(self.layout.tiers, self.profile)
        executor = self.executor(compiler.widths, self.costs.work, contention.left)
        flying, handed_over = deque[int](), 0.0
        for step in steps:
            if len(flying) == LAG:
                executor.wait(flying.popleft())
            graph, frontier = compiler.compile(step, frontier)
            handed_over = max(handed_over, executor.now) + len(graph.tasks) * self.profile.host.compile_task_s
            executor.submit(graph, handed_over)
            flying.append(step.index)
        for index in flying:
            executor.wait(index)
        return executor.events


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without searches for cycles of references: hundreds of thousands of tasks live on and form none. On OPT-175B
    they took 22 % of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def compose(workload: WorkloadShape, policy: Policy) -> list[Step]:
    """The steps of a job whose sequences all run to their last token."""
    batcher = Batcher(
        workload.prompt_tokens,
        max_new_tokens=workload.new_tokens,
        eos_token_ids=(),
        gpu_batch_size=policy.gpu_batch_size,
        num_gpu_batches=policy.num_gpu_batches,
    )
    steps: list[Step] = []
    while (step := batcher.next_step()) is not None:
        steps.append(step)
        batcher.accept(step.index, {batch.gpu_batch: NextTokens([0] * len(batch.rows)) for batch in step.batches})
    return steps


def lane_use(events: Sequence[TaskEvent]) -> dict[str, LaneUse]:
    """Each lane's busy time, bytes and operations over some tasks."""
    lanes: dict[str, list[TaskEvent]] = defaultdict(list)
    for event in events:
        lanes[event.task.lane].append(event)
    return {
        lane: LaneUse(
            union_seconds([(event.start, event.end) for event in own]),
            sum(event.task.nbytes for event in own),
            sum(event.task.flops for event in own),
        )
        for lane, own in lanes.items()
    }
