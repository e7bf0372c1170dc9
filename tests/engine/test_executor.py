"""Executors end well, and badly: order, failures with their cause, the watchdog, and nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from flexflow_engine.abc.tier import Completion, HostContext, LaneContext
from flexflow_engine.cli.exits import USER_ERROR, with_exit_status
from flexflow_engine.cpu.settings import one_torch_thread
from flexflow_engine.errors import CorruptDataError, StalledError, StorageError, TaskError
from flexflow_engine.graph.builder import TaskGraph
from flexflow_engine.graph.task import Task
from flexflow_engine.runtime.executor import DataflowExecutor, Executor, RunTask, SequentialExecutor
from flexflow_engine.runtime.trace import Trace
from harness import policy, random_prompts, run_job, save_opt
from layouts import DEVICE_FAR_DISK, disk_setups
from small_graphs import graph, task
from watched import Regions, no_thread_left, openmp_team, with_run

WIDTHS = {"one": 1, "two": 1, "wide": 2}
LONG = 60.0
"""Seconds that a blocked task would wait if nobody ended it: far more than any test takes."""

Names = list[str]
Make = Callable[[RunTask], Executor]


def dataflow(run: RunTask, *, stall_seconds: float = LONG) -> DataflowExecutor:
    return DataflowExecutor(run, WIDTHS, lambda lane: HostContext(), Trace(), stall_seconds=stall_seconds)


def sequential(run: RunTask) -> SequentialExecutor:
    return SequentialExecutor(run, WIDTHS, lambda lane: HostContext(), Trace())


def run_step(executor: Executor, graph: TaskGraph) -> None:
    executor.submit(graph)
    executor.wait(graph.step)


@pytest.fixture(autouse=True)
def every_thread_ends() -> Iterator[None]:
    with no_thread_left():
        yield


@pytest.mark.parametrize("make", [dataflow, sequential])
def test_a_failed_task_is_named_and_its_cause_chained(make: Make) -> None:
    cause = StorageError("the disk is full", where="/mnt/nvme", fix="free some space")

    def run(task: Task) -> None:
        raise cause

    with (
        closing(make(run)) as executor,
        pytest.raises(TaskError, match=r"'0/0/0/bad' of lane one failed: .*disk is full") as raised,
    ):
        run_step(executor, graph([task("bad", "one")]))
    assert raised.value.__cause__ is cause


def test_a_failure_ends_the_run_while_other_lanes_are_blocked() -> None:
    blocked, released, ended, ran = threading.Event(), threading.Event(), threading.Event(), Names()
    slow, later = task("slow", "one"), task("later", "one")
    bad, queued, after = task("bad", "two"), task("queued", "two"), task("after", "wide")

    def run(task: Task) -> None:
        ran.append(task.key)
        if task is slow:
            blocked.set()
            released.wait(LONG)
            ended.set()
        if task is bad:
            blocked.wait(LONG)
            raise RuntimeError("bad")

    with closing(dataflow(run)) as executor:
        executor.submit(graph([slow, bad, after, later, queued], [(slow, after)]))
        with pytest.raises(TaskError, match="bad"):
            executor.wait(0)
        assert not released.is_set()
        with pytest.raises(TaskError, match="bad"):
            executor.submit(graph([task("next", "one", step=1)]))
        released.set()
        ended.wait(LONG)
        time.sleep(0.05)  # for a lane that went on, to be seen
    assert sorted(ran) == sorted([slow.key, bad.key])


def test_a_lane_that_cannot_be_entered_fails_the_run() -> None:
    def context_for(lane: str) -> LaneContext:
        raise StorageError(f"no {lane}")

    executor = DataflowExecutor(lambda task: None, {"one": 1}, context_for, Trace())
    with closing(executor), pytest.raises(StorageError, match="no one"):
        run_step(executor, graph([task("any", "one")]))


def test_a_predecessors_late_failure_is_a_failure_of_the_task_that_waits_for_it() -> None:
    """On a device a task's error shows when somebody waits for its completion."""

    class LateFailure(HostContext):
        def after(self, completion: object) -> None:
            raise RuntimeError("device lost")

    first, second = task("first", "one"), task("second", "two")
    executor = DataflowExecutor(lambda task: None, WIDTHS, lambda lane: LateFailure(), Trace())
    with closing(executor), pytest.raises(TaskError, match=r"second.*device lost"):
        run_step(executor, graph([first, second], [(first, second)]))


def test_a_task_that_runs_is_no_stall_however_long_it_takes() -> None:
    """A prompt of a large model takes a processor longer than any watchdog should wait."""
    long, after = task("long", "one"), task("after", "two")
    ran = Names()

    def run(task: Task) -> None:
        if task is long:
            time.sleep(1.0)  # ten times what the watchdog waits
        ran.append(task.key)

    with closing(dataflow(run, stall_seconds=0.1)) as executor:
        run_step(executor, graph([long, after], [(long, after)]))
    assert ran == [long.key, after.key]


def test_lanes_that_wait_for_each_other_are_named_by_the_watchdog() -> None:
    """one: a, b   two: c, d; a waits for d and c for b, which are queued behind them."""
    a, b, c, d = task("a", "one"), task("b", "one"), task("c", "two"), task("d", "two")
    ran = Names()
    with closing(dataflow(lambda task: ran.append(task.key), stall_seconds=0.2)) as executor:
        executor.submit(graph([a, b, c, d], [(d, a), (b, c)]))
        with pytest.raises(StalledError, match=f"{a.key}, {c.key}"):
            executor.wait(0)
    assert ran == []


@pytest.mark.parametrize("make", [dataflow, sequential])
def test_a_lane_of_width_one_keeps_the_order_of_emission(make: Make) -> None:
    ran = Names()
    tasks = [task(f"{n}", "one" if n % 2 else "two") for n in range(40)]
    with closing(make(lambda task: ran.append(task.key))) as executor:
        run_step(executor, graph(tasks))
    for lane in ("one", "two"):
        keys = [t.key for t in tasks if t.lane == lane]
        assert [key for key in ran if key in keys] == keys


@pytest.mark.parametrize("slow", ["a", "b", "c"])
def test_a_task_starts_after_all_its_predecessors(slow: str) -> None:
    ran, begun = Names(), threading.Event()
    before, last = [task("a", "one"), task("b", "wide"), task("c", "wide")], task("last", "two")

    def run(task: Task) -> None:
        if task.key.endswith(slow):
            begun.wait(0.1)  # by "last", if it did not wait
        if task is last:
            begun.set()
        ran.append(task.key)

    with closing(dataflow(run)) as executor:
        run_step(executor, graph([*before, last], [(first, last) for first in before]))
    assert ran[-1] == last.key
    assert len(ran) == 4


def test_a_blas_starts_no_team_of_its_own_in_a_lane() -> None:
    teams: list[int] = []
    with one_torch_thread(), closing(dataflow(lambda task: teams.append(openmp_team()))) as executor:
        run_step(executor, graph([task("product", "one")]))
    assert teams == [1]


def test_a_wide_lane_runs_as_many_tasks_at_once_as_it_is_wide() -> None:
    together = threading.Barrier(2)
    with closing(dataflow(lambda task: _meet(together))) as executor:
        run_step(executor, graph([task("a", "wide"), task("b", "wide")]))


def _meet(barrier: threading.Barrier) -> None:
    barrier.wait(LONG)


def test_the_next_steps_tasks_start_while_the_step_runs() -> None:
    """The first step can end only because the second one's task runs: there is no barrier between steps."""
    second_ran = threading.Event()

    def run(task: Task) -> None:
        if task.tile.step == 0:
            assert second_ran.wait(LONG)
        else:
            second_ran.set()

    with closing(dataflow(run)) as executor:
        executor.submit(graph([task("a", "one")]))
        executor.submit(graph([task("b", "two", step=1)]))
        executor.wait(0)
        executor.wait(1)


def test_edges_from_a_step_that_is_over_hold_nothing_up() -> None:
    old, new = task("old", "one"), task("new", "two", step=1)
    ran = Names()
    with closing(dataflow(lambda task: ran.append(task.key))) as executor:
        run_step(executor, graph([old]))
        run_step(executor, graph([new], [(old, new)]))
    assert ran == [old.key, new.key]


def test_edges_from_the_step_in_flight_are_kept() -> None:
    old, new = task("old", "one"), task("new", "two", step=1)
    submitted, ran = threading.Event(), Names()

    def run(task: Task) -> None:
        if task is old:
            submitted.wait(LONG)
        ran.append(task.key)

    with closing(dataflow(run)) as executor:
        executor.submit(graph([old]))
        executor.submit(graph([new], [(old, new)]))
        submitted.set()
        executor.wait(0)
        executor.wait(1)
    assert ran == [old.key, new.key]


def test_a_third_step_in_flight_is_refused() -> None:
    with closing(dataflow(lambda task: None)) as executor:
        executor.submit(graph([task("a", "one")]))
        executor.submit(graph([task("b", "one", step=1)]))
        with pytest.raises(AssertionError, match="wait for the oldest step"):
            executor.submit(graph([task("c", "one", step=2)]))


def test_close_waits_for_the_tasks_that_run_however_long_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller releases the memory that they use: threads that are waited for by the clock may go on in it."""
    join = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", lambda thread, timeout=None: join(thread, timeout and 0.0))
    started, released, ended = threading.Event(), threading.Event(), threading.Event()

    def run(task: Task) -> None:
        started.set()
        released.wait(LONG)
        ended.set()

    executor = dataflow(run)
    executor.submit(graph([task("long", "one")]))
    started.wait(LONG)
    threading.Timer(0.2, released.set).start()
    executor.close()
    assert ended.is_set()


class CountedContext(HostContext):
    """Counts the contexts that are open."""

    open = 0

    def __init__(self) -> None:
        type(self).open += 1

    def close(self) -> None:
        type(self).open -= 1


@pytest.mark.parametrize("executor", [DataflowExecutor, SequentialExecutor])
def test_close_ends_what_is_queued_closes_every_context_and_may_be_repeated(
    executor: Callable[..., Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountedContext, "open", 0)
    opened = executor(lambda task: None, WIDTHS, lambda lane: CountedContext(), Trace())
    opened.submit(graph([task("a", "one")]))
    opened.close()
    opened.close()
    assert CountedContext.open == 0


class EnteredContext(HostContext):
    """Tells what was called outside of it."""

    def __init__(self, entered: set[int], outside: list[str]) -> None:
        self._entered, self._outside = entered, outside

    def __enter__(self) -> EnteredContext:
        self._entered.add(threading.get_ident())
        return self

    def __exit__(self, *exc: object) -> None:
        self._entered.remove(threading.get_ident())

    def after(self, completion: Completion) -> None:
        self.look("after")

    def record(self) -> Completion:
        self.look("record")
        return super().record()

    def close(self) -> None:
        assert threading.get_ident() not in self._entered, "closed before it was left"

    def look(self, call: str) -> None:
        self._outside += [call] * (threading.get_ident() not in self._entered)


@pytest.mark.parametrize("executor", [DataflowExecutor, SequentialExecutor])
def test_all_that_a_lane_does_is_done_inside_its_context(executor: Callable[..., Executor]) -> None:
    entered, outside, ran = set[int](), list[str](), list[bool]()
    first, second = task("first", "one"), task("second", "two")

    def run(task: Task) -> None:
        ran.append(threading.get_ident() in entered)

    lanes = executor(run, WIDTHS, lambda lane: EnteredContext(entered, outside), Trace())
    with closing(lanes):
        run_step(lanes, graph([first, second], [(first, second)]))
    assert (ran, outside, entered) == ([True, True], [], set())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_opt(tmp_path_factory.mktemp("executor") / "checkpoint", num_hidden_layers=2)


@pytest.mark.parametrize("failing", ["compute decoder.1", "load kv.0.0", "store hidden", "gather", "fetch"])
@pytest.mark.parametrize("executor", [DataflowExecutor, SequentialExecutor])
def test_a_failed_job_leaves_no_region_and_no_file(
    tmp_path: Path, checkpoint: Path, failing: str, executor: Callable[..., Executor]
) -> None:
    regions = Regions()
    tiers = {name: regions.watch(setup) for name, setup in disk_setups(DEVICE_FAR_DISK, tmp_path / "disk").items()}
    shares = {"device": 20.0, "far": 40.0, "disk": 40.0}

    def failing_run(run: RunTask) -> RunTask:
        def checked(task: Task) -> None:
            if task.tile.step == 2 and failing in task.key:
                raise StorageError(f"no {failing}")
            run(task)

        return checked

    with pytest.raises(TaskError, match=failing) as raised:
        run_job(
            checkpoint,
            tiers,
            policy(tiers, weights=shares, kv_cache=shares, activations=shares),
            random_prompts(8, longest=12),
            store=tmp_path / "store",
            executor=with_run(executor, failing_run),
        )
    assert isinstance(raised.value.__cause__, StorageError)
    assert regions.live == {}
    assert regions.left_at_close == []
    assert list((tmp_path / "disk" / "runs").iterdir()) == []


@pytest.mark.parametrize("executor", [DataflowExecutor, SequentialExecutor])
def test_a_flipped_byte_is_told_on_the_command_line_with_its_tensor_and_file(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], executor: Callable[..., Executor]
) -> None:
    tiers = disk_setups(DEVICE_FAR_DISK, tmp_path / "disk")

    def job() -> None:
        chosen = policy(tiers, weights={"disk": 100})
        run_job(checkpoint, tiers, chosen, [(5, 6)], store=tmp_path / "store", max_new_tokens=2, executor=executor)

    job()
    (shard,) = (tmp_path / "store").rglob("model.decoder.layers.1.fc1.weight/**/c/0/0")
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(SystemExit) as exited:
        with_exit_status(job)()
    assert exited.value.code == USER_ERROR
    message = capsys.readouterr().err
    assert "model.decoder.layers.1.fc1.weight" in message
    assert str(shard) in message
    with pytest.raises(TaskError) as raised:
        job()
    assert isinstance(raised.value.__cause__, CorruptDataError)
