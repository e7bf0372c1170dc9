"""The trace tells what ran when; and on a slow link it shows loads running beside computations.

Weights of three decoder layers lie behind a link that takes 0.3 s a layer, while a tile computes for a few ms:

    far.read | w1 | w2 ··· | w3 ··· | head ··· | w1 of the next step ···
    compute               | 1,k0 k1 k2 | 2,k0 k1 k2 | 3,… |
                            w2 loads     w3 loads     head loads

So whenever layer j computes, be it for the first or for the last GPU batch, layer j+1 is on its way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexflow_engine.abc.prediction import LaneUse
from flexflow_engine.abc.step import BatchStep
from flexflow_engine.abc.tier import Done
from flexflow_engine.errors import StorageError
from flexflow_engine.graph.builder import TaskGraph
from flexflow_engine.graph.task import COMPUTE_LANE, FetchTokens, Task, TaskKind, Tile
from flexflow_engine.runtime.trace import FoldedTrace, TaskEvent, Trace, union_seconds
from flexflow_engine.testing.tiers import LinkOptions, ThrottledTier
from flexflow_tiers.cpu import CpuTier
from harness import JobResult, TierSetup, policy, run_job, save_opt

LAYER_NBYTES = 12 * 64 * 64 * 4
NUM_GPU_BATCHES = 3


class Finishing(Done):
    """Work that ended at a time of its own, as on a device."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def finished_at(self) -> float:
        return self._seconds


class Unfinished(Done):
    """Work that must not be waited for."""

    def wait(self) -> None:
        raise AssertionError("the step is in flight")


def event(
    lane: str,
    start: float,
    returned: float,
    *,
    kind: TaskKind = "load",
    step: int = 0,
    nbytes: int = 0,
    flops: float = 0.0,
    worker: int = 0,
    name: str = "some task/part 1",
    completion: Done | None = None,
) -> TaskEvent:
    task = Task(
        key=f"{step}/2/1/{name}",
        kind=kind,
        tile=Tile(step, 2, 1),
        lane=lane,
        operation=FetchTokens(BatchStep(1, ())),
        reads=(),
        writes=(),
        nbytes=nbytes,
        flops=flops,
    )
    return TaskEvent(task, worker, start, returned, completion or Done())


def trace_of(*events: TaskEvent) -> Trace:
    trace = Trace()
    trace.events += events
    return trace


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_the_union_of_intervals_counts_every_second_once(spans: list[tuple[int, int]]) -> None:
    intervals = [(float(start), float(start + length)) for start, length in spans]
    covered = {second for start, length in spans for second in range(start, start + length)}
    assert union_seconds(intervals) == len(covered)


def test_lanes_sum_up_their_own_tasks_and_idle_lanes_are_there() -> None:
    trace = trace_of(
        event("far.read", 1.0, 3.0, nbytes=10, worker=1),
        event("far.read", 2.0, 4.0, nbytes=5),
        event("compute", 2.5, 3.0, kind="compute", flops=7.0),
        event("far.read", 6.0, 7.0, nbytes=1),
    )
    assert trace.lanes(["compute", "far.read", "far.write"]) == {
        "compute": LaneUse(0.5, 0, 7.0),
        "far.read": LaneUse(4.0, 16, 0.0),
        "far.write": LaneUse(0.0, 0, 0.0),
    }
    assert list(trace.lanes(["far.write", "compute"])) == ["far.write", "compute"]


def test_an_event_ends_when_its_work_does() -> None:
    assert event("compute", 1.0, 2.0).end == 2.0
    assert event("compute", 1.0, 2.0, completion=Finishing(5.0)).end == 5.0


def test_a_step_ends_with_its_last_computation() -> None:
    trace = trace_of(
        event("compute", 1.0, 2.0, kind="compute"),
        event("compute", 2.0, 4.0, kind="compute"),
        event("far.write", 4.0, 9.0, kind="store"),
        event("compute", 4.0, 5.0, kind="compute", step=1),
    )
    assert trace.step_ends() == {0: 4.0, 1: 5.0}


def test_a_written_trace_is_json_with_a_process_a_tier_and_a_thread_a_worker(tmp_path: Path) -> None:
    trace = trace_of(
        event("compute", 10.0, 10.5, kind="compute", flops=8.0),
        event("far.read", 10.25, 10.5, nbytes=64, worker=1, step=3),
    )
    trace.write(tmp_path / "trace.json", {"compute": "device", "far.read": "far"})
    computed, loaded = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {name: computed[name] for name in ("ph", "name", "cat", "ts", "dur", "pid", "tid")} == {
        "ph": "X",
        "name": "some task/part 1",
        "cat": "compute",
        "ts": 0.0,
        "dur": 5e5,
        "pid": "device",
        "tid": "compute",
    }
    assert (loaded["pid"], loaded["tid"], loaded["ts"]) == ("far", "far.read 2", 2.5e5)
    expected = {"key": "3/2/1/some task/part 1", "step": 3, "layer": 2, "gpu_batch": 1, "bytes": 64, "flops": 0.0}
    assert loaded["args"] == expected


def test_an_empty_trace_can_be_written(tmp_path: Path) -> None:
    Trace().write(tmp_path / "trace.json", {})
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == []


def test_a_trace_that_cannot_be_written_names_its_path(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no/trace\.json"):
        Trace().write(tmp_path / "no" / "trace.json", {})


Work = tuple[str, int, int]
"""(lane, seconds after the earliest possible start, length)"""


@given(st.lists(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 30), st.integers(0, 20))), max_size=6))
def test_folding_step_by_step_tells_what_all_events_together_tell(steps: list[list[Work]]) -> None:
    """Steps overlap: each begins as early as the end of the step before the last, when it is submitted."""
    kept, folded = Trace(), FoldedTrace()
    ends, every = [0.0, 0.0], list[TaskEvent]()
    for step, works in enumerate(steps):
        events = [
            event(
                lane, ends[-2] + start, ends[-2] + start + length, kind="compute", step=step, nbytes=start, name=f"{n}"
            )
            for n, (lane, start, length) in enumerate(works)
        ]
        every += events
        ends.append(max([ends[-1], *(e.returned for e in events)]))
        for trace in (kept, folded):
            trace.events += events
            if step:
                trace.fold(step - 1)
    for trace in (kept, folded):
        for lane, use in trace.lanes(["a", "b"]).items():
            own = [e for e in every if e.task.lane == lane]
            nbytes = sum(e.task.nbytes for e in own)
            assert use == LaneUse(union_seconds([(e.start, e.end) for e in own]), nbytes, 0.0)
    assert folded.step_ends() == kept.step_ends()
    assert kept.events == every
    assert folded.events == []


def test_events_of_a_step_in_flight_are_left_alone() -> None:
    ended, running = event("compute", 1.0, 2.0), event("compute", 2.0, 3.0, step=1, completion=Unfinished())
    trace = FoldedTrace()
    trace.events += [running, ended]
    trace.fold(0)
    assert trace.events == [running]


def test_a_trace_that_forgot_its_events_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ask for a Trace"):
        FoldedTrace().write(tmp_path / "trace.json", {})


def test_queued_work_starts_when_the_work_before_it_has_ended() -> None:
    """The host issues everything within a second; then

    far.read   | page 1 (0-4) | page 2 (4-6) |          | other (7-8), issued at 7
    compute                                  | (6-7) |
    """
    events = [
        event("far.read", 0.0, 0.1, name="page 1", completion=Finishing(4.0)),
        event("far.read", 0.1, 0.2, name="page 2", completion=Finishing(6.0)),
        event("compute", 0.2, 0.3, name="compute", completion=Finishing(7.0), kind="compute"),
        event("far.read", 7.0, 7.1, name="other", completion=Finishing(8.0)),
        event("far.read", 0.3, 0.4, name="beside", worker=1, completion=Finishing(1.0)),
    ]
    trace = queued(events, ("page 2", "compute"))
    assert [(e.start, e.end) for e in trace.events] == [(0.0, 4.0), (4.0, 6.0), (6.0, 7.0), (7.0, 8.0), (0.3, 1.0)]
    assert trace.lanes(["far.read", "compute"]) == {"far.read": LaneUse(7.0, 0, 0.0), "compute": LaneUse(1.0, 0, 0.0)}


def test_queued_work_starts_after_what_the_step_before_left_to_it() -> None:
    trace = Trace()
    for step, begin in enumerate((0.0, 0.5)):
        trace.expect(TaskGraph(step, (), nx.DiGraph([("0/2/1/store", "1/2/1/load")])))
        name, lane = ("load", "far.read") if step else ("store", "far.write")
        completion = Finishing(9.0 if step else 5.0)
        trace.events.append(event(lane, begin, begin + 0.1, step=step, name=name, completion=completion))
    trace.fold(0)
    trace.fold(1)
    assert [(e.start, e.end) for e in trace.events] == [(0.0, 5.0), (5.0, 9.0)]


def test_work_of_the_host_starts_when_it_was_called() -> None:
    events = [event("compute", 0.0, 0.1, completion=Finishing(4.0)), event("far.read", 1.0, 2.0, name="load")]
    assert [e.start for e in queued(events, ("some task/part 1", "load")).events] == [0.0, 1.0]


def queued(events: Sequence[TaskEvent], edge: tuple[str, str]) -> Trace:
    """One step of these events in order of issue, with an edge between two of them, folded."""
    trace = Trace()
    digraph: nx.DiGraph[str] = nx.DiGraph()
    digraph.add_nodes_from(e.task.key for e in events)
    digraph.add_edge(*(f"0/2/1/{name}" for name in edge))
    trace.expect(TaskGraph(0, tuple(e.task for e in events), digraph))
    trace.events += events
    trace.fold(0)
    return trace


@pytest.fixture(scope="module")
def slow_job(tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    """Three GPU batches, two steps; all weights behind the slow link, everything else on the device."""
    folder = tmp_path_factory.mktemp("trace")
    rate = LinkOptions(bytes_per_second=LAYER_NBYTES / 0.3)
    tiers = {"device": TierSetup(CpuTier), "far": TierSetup(ThrottledTier, options=rate)}
    chosen = policy(tiers, gpu_batch_size=1, num_gpu_batches=NUM_GPU_BATCHES, weights={"far": 100})
    prompts = [(5, 6, 7)] * NUM_GPU_BATCHES
    return run_job(save_opt(folder / "checkpoint"), tiers, chosen, prompts, store=folder / "store", max_new_tokens=2)


def loads(result: JobResult, step: int, layer: int) -> list[TaskEvent]:
    """Loads of a layer's pages."""
    tiles = [event for event in result.trace.events if event.task.kind == "load" and "load model" in event.task.key]
    return [event for event in tiles if (event.task.tile.step, event.task.tile.layer) == (step, layer)]


def computations(result: JobResult, step: int, layer: int) -> list[TaskEvent]:
    """In the order of GPU batches."""
    events = [event for event in result.trace.events if event.task.lane == COMPUTE_LANE]
    return [event for event in events if (event.task.tile.step, event.task.tile.layer) == (step, layer)]


def overlap(one: TaskEvent, others: Sequence[TaskEvent]) -> bool:
    return any(other.start < one.end and one.start < other.end for other in others)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("layer", [1, 2])
def test_the_next_layer_loads_during_the_computations_of_every_gpu_batch(
    slow_job: JobResult, step: int, layer: int
) -> None:
    computed = computations(slow_job, step, layer)
    assert [event.task.tile.gpu_batch for event in computed] == list(range(NUM_GPU_BATCHES))
    for event in computed:
        assert overlap(event, loads(slow_job, step, layer + 1)), event.task.key


@pytest.mark.parametrize("step", [0, 1])
def test_loads_of_the_next_layer_belong_to_every_gpu_batch(slow_job: JobResult, step: int) -> None:
    batches = [event.task.tile.gpu_batch for event in loads(slow_job, step, 3)]
    assert set(batches) == set(range(NUM_GPU_BATCHES))
    counts = [batches.count(k) for k in range(NUM_GPU_BATCHES)]
    assert max(counts) - min(counts) <= 1


def test_the_next_step_loads_before_the_last_computation_of_this_one(slow_job: JobResult) -> None:
    end = slow_job.trace.step_ends()[0]
    assert min(event.start for event in loads(slow_job, 1, 1)) < end


def test_the_slow_link_is_the_busiest_lane(slow_job: JobResult) -> None:
    lanes = slow_job.trace.lanes(["compute", "tokens", "far.read", "far.write"])
    assert max(lanes, key=lambda name: lanes[name].busy_s) == "far.read"
    assert lanes["far.read"].nbytes > 2 * 3 * LAYER_NBYTES
    assert lanes["far.write"] == LaneUse(0.0, 0, 0.0)
