"""Which steps of a long job are simulated, and what the others are taken to need.

Steps of one kind (about as many rows in the same phases, after a step of the same phases, pages filling in none, some
or all of them) differ in how much is computed and cached; between simulated steps seconds are linear in that:

    kind: 48 rows decode, no page fills      simulated    first        middle        last
    kind: 48 rows decode, every page fills   simulated    first        middle        last
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log2

from flexflow_engine.abc.prediction import LaneUse
from flexflow_engine.abc.step import BatchStep, Step
from flexflow_engine.planning.simulate import StepRun


@dataclass(frozen=True, slots=True)
class StepKind:
    """What must be equal for one step's time to tell of another's; rows as `_about` counts them."""

    prompt_rows: int
    token_rows: int
    batches: int
    after: tuple[bool, bool]
    """Whether the step before had prompts, and tokens: what it left its links time to load ahead."""
    filling: str
    """Pages filled by this step's tokens: none, some, all."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """A kind's steps, and which of them are simulated; positions in the job, in order of load."""

    steps: tuple[tuple[float, int], ...]
    """(load, position in the job)"""
    chosen: tuple[tuple[float, int], ...]


def sample_steps(steps: Sequence[Step], page_tokens: int) -> list[StepSample]:
    """The kinds, each with its lightest, middle and heaviest step chosen."""
    kinds: dict[StepKind, list[tuple[float, int]]] = defaultdict(list)
    after = (False, False)
    for position, step in enumerate(steps):
        kind = _kind(step, after, page_tokens)
        kinds[kind].append((_load(step), position))
        after = bool(kind.prompt_rows), bool(kind.token_rows)
    return [StepSample(tuple(ordered), _spread(ordered)) for ordered in map(sorted, kinds.values())]


def estimate(sample: StepSample, runs: Sequence[StepRun]) -> list[tuple[int, StepRun]]:
    """(position, run) of every step of a kind; `runs` are those of the chosen ones."""
    loads = [load for load, _ in sample.chosen]
    return [(position, _between(loads, runs, load)) for load, position in sample.steps]


def curvature(sample: StepSample, runs: Sequence[StepRun]) -> float:
    """How far off, in seconds over all steps of the kind, the straight lines between chosen steps may be.

    A parabola through three points leaves a chord over half of them by at most a quarter of what it leaves the chord
    over all, and by two thirds of that on average.
    """
    if len(runs) < 3 or len(sample.steps) == len(runs):
        return 0.0
    (first, _), (middle, _), (last, _) = sample.chosen
    chord = _between([first, last], [runs[0], runs[2]], middle).seconds
    return abs(runs[1].seconds - chord) / 4 * 2 / 3 * len(sample.steps)


def on_line(a: StepRun, b: StepRun, along: float) -> StepRun:
    """a + along * (b - a), of seconds and of every lane's use."""

    def at(x: float, y: float) -> float:
        return x + along * (y - x)

    lanes = {}
    for lane in a.lanes.keys() | b.lanes.keys():
        x, y = a.lanes.get(lane, _IDLE), b.lanes.get(lane, _IDLE)
        lanes[lane] = LaneUse(at(x.busy_s, y.busy_s), round(at(x.nbytes, y.nbytes)), at(x.flops, y.flops))
    return StepRun(at(a.seconds, b.seconds), lanes)


def added(runs: Iterable[StepRun]) -> dict[str, LaneUse]:
    """Each lane's use over some steps."""
    totals: dict[str, LaneUse] = {}
    for run in runs:
        for lane, use in run.lanes.items():
            total = totals.get(lane, _IDLE)
            totals[lane] = LaneUse(total.busy_s + use.busy_s, total.nbytes + use.nbytes, total.flops + use.flops)
    return totals


_IDLE = LaneUse(0.0, 0, 0.0)


def _kind(step: Step, after: tuple[bool, bool], page_tokens: int) -> StepKind:
    prompts = sum(len(batch.rows) for batch in step.batches if batch.phase == "prefill")
    rows = [row for batch in step.batches if batch.phase == "decode" for row in batch.rows]
    filled = sum((row.context + 1) % page_tokens == 0 for row in rows)
    filling = "none" if not filled else "all" if filled == len(rows) else "some"
    return StepKind(_about(prompts), _about(len(rows)), len(step.batches), after, filling)


def _about(rows: int) -> int:
    """In half octaves: a job of completions of many lengths has few steps of exactly the same rows."""
    return round(2 * log2(rows + 1))


def _load(step: Step) -> float:
    """Positions computed, and those that attention goes through: what seconds are linear in, other things equal."""
    return float(sum(_batch_load(batch) for batch in step.batches))


def _batch_load(batch: BatchStep) -> int:
    return sum(row.new_tokens * (1 + row.context) for row in batch.rows)


def _spread(ordered: Sequence[tuple[float, int]]) -> tuple[tuple[float, int], ...]:
    last = len(ordered) - 1
    return tuple(ordered[index] for index in sorted({0, last // 2, last}))


def _between(loads: Sequence[float], runs: Sequence[StepRun], load: float) -> StepRun:
    """On the straight line between the two chosen steps around this load."""
    index = min(max(bisect_left(loads, load), 1), len(loads) - 1)
    if len(loads) == 1 or loads[index] == loads[index - 1]:
        return runs[min(index, len(runs) - 1)]
    return on_line(runs[index - 1], runs[index], (load - loads[index - 1]) / (loads[index] - loads[index - 1]))
