"""A whole job's seconds: simulated task by task where that is a matter of seconds, else from a sample of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.hardware import HardwareProfile
from flexflow_engine.abc.model import Model
from flexflow_engine.abc.policy import WorkloadShape
from flexflow_engine.abc.prediction import LaneUse, Prediction
from flexflow_engine.abc.step import Step
from flexflow_engine.graph.lanes import lane_widths
from flexflow_engine.placement.layout import Layout
from flexflow_engine.planning.clock import VirtualDataflow, VirtualExecutor
from flexflow_engine.planning.cost import CostModel
from flexflow_engine.planning.layers import CHECK_LAYERS, LayerSample
from flexflow_engine.planning.sampling import StepSample, added, curvature, estimate, sample_steps
from flexflow_engine.planning.simulate import Simulator, StepRun, compose
from flexflow_engine.runtime.metrics import phase_seconds
from flexflow_engine.runtime.session import StepTime
from flexflow_engine.runtime.trace import TaskEvent

MAX_TASKS = 50_000
"""So many take about five seconds."""
TASKS_PER_TILE = 6
"""Roughly, beside pages: a computation, and its loads and stores."""


RunSteps = Callable[[Sequence[Step]], list[StepRun]]
"""What adjoining steps take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """For one model and the codec of its cache on one machine."""

    model: Model
    kv_codec: Codec
    profile: HardwareProfile
    executor: type[VirtualExecutor] = VirtualDataflow
    """VirtualSequential: as if nothing overlapped."""
    max_tasks: int = MAX_TASKS
    """A job of more tasks is sampled."""

    def predict(self, layout: Layout, workload: WorkloadShape) -> Prediction:
        """Raises HardwareError where the profile lacks what the layout needs."""
        steps = compose(workload, layout.policy)
        per_step = _tasks_per_step(layout)
        if per_step * len(steps) <= self.max_tasks:
            return _prediction(layout, workload, steps, self._simulator(layout).run(steps), error_s=0.0)
        samples = sample_steps(steps, layout.kv.page_tokens)
        layers = LayerSample(layout, self._simulator) if len(layout.kv.tiles) > CHECK_LAYERS else None
        simulated = self._simulated(layers.run if layers else self._simulator(layout).run, steps, samples)
        runs: dict[int, StepRun] = {}
        error_s = 0.0
        for sample in samples:
            chosen = [simulated[position] for _, position in sample.chosen]
            runs.update(estimate(sample, chosen))
            error_s += curvature(sample, chosen)
        if layers:
            window = self._commonest(samples)
            error_s += layers.relative_error(steps[window.start : window.stop]) * sum(x.seconds for x in runs.values())
        return _prediction(layout, workload, steps, [runs[n] for n in range(len(steps))], error_s=error_s)

    def seconds(self, layout: Layout, steps: Sequence[Step]) -> float | None:
        """What just these steps of a job take; None where they have too many tasks to be simulated one by one.

        Raises HardwareError where the profile lacks what the layout needs.
        """
        if _tasks_per_step(layout) * len(steps) > self.max_tasks:
            return None
        return sum(run.seconds for run in self._simulator(layout).run(steps))

    def first_events(self, layout: Layout, workload: WorkloadShape) -> list[TaskEvent]:
        """Every task of the job's first steps, as many whole ones as are a matter of seconds, at least two."""
        steps = compose(workload, layout.policy)
        return self._simulator(layout).events(steps[: max(2, self.max_tasks // _tasks_per_step(layout))])

    def _simulator(self, layout: Layout) -> Simulator:
        costs = CostModel(layout, self.model, self.kv_codec, self.profile)
        return Simulator(layout, costs, self.profile, self.executor)

    def _simulated(self, run: RunSteps, steps: Sequence[Step], samples: Sequence[StepSample]) -> dict[int, StepRun]:
        """What the chosen steps take, and those that warm up for them, by their positions in the job."""
        windows = [steps[window.start : window.stop] for window in self._windows(samples)]
        return {step.index: took for window in windows for step, took in zip(window, run(window), strict=True)}

    def _commonest(self, samples: Sequence[StepSample]) -> range:
        """A chosen step of the kind that has most, behind those that warm up for it."""
        kind = max(samples, key=lambda sample: len(sample.steps))
        _, position = kind.chosen[len(kind.chosen) // 2]
        return range(max(0, position - self.executor.warm_up_steps), position + 1)

    def _windows(self, samples: Sequence[StepSample]) -> list[range]:
        """The chosen steps and those that warm up for them, as runs of adjoining steps."""
        chosen = {position for sample in samples for _, position in sample.chosen}
        wanted = {n for position in chosen for n in range(position - self.executor.warm_up_steps, position + 1)}
        windows: list[range] = []
        for position in sorted(wanted - {-1}):
            if windows and windows[-1].stop == position:
                windows[-1] = range(windows[-1].start, position + 1)
            else:
                windows.append(range(position, position + 1))
        return windows


def _prediction(
    layout: Layout, workload: WorkloadShape, steps: Sequence[Step], runs: Sequence[StepRun], *, error_s: float
) -> Prediction:
    ends, end = [], 0.0
    for run in runs:
        end += run.seconds
        ends.append(end)
    prefill_s, decode_s = phase_seconds([StepTime(step, end) for step, end in zip(steps, ends, strict=True)])
    used, idle = added(runs), LaneUse(0.0, 0, 0.0)
    return Prediction(
        prefill_s=prefill_s,
        decode_s=decode_s,
        prompt_tokens=sum(workload.prompt_tokens),
        generated_tokens=sum(workload.new_tokens),
        first_tokens=len(workload.prompt_tokens),
        lanes={lane: used.get(lane, idle) for lane in lane_widths(layout)},
        relative_error=error_s / end,
    )


def _tasks_per_step(layout: Layout) -> int:
    """Roughly; tasks through a staging slot are two."""
    staged = {tier.name for tier in layout.tiers if layout.is_staged(tier.name, layout.device.name)}
    orders = [layout.weights.page_order(layer, layout.direct) for layer in layout.weights.layers]
    pages = [run.tier for order in orders for run, _, _ in order]
    tiles = len(layout.weights.layers) * layout.policy.num_gpu_batches
    return len(pages) + sum(tier in staged for tier in pages) + TASKS_PER_TILE * tiles
