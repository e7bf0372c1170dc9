"""Small graphs on the virtual clock; the intervals are worked out by hand and drawn in each test."""

from __future__ import annotations

from collections.abc import Mapping

from flexflow_engine.planning.clock import VirtualDataflow, VirtualExecutor, VirtualSequential
from flexflow_engine.planning.cost import Work
from small_graphs import graph, task

WIDTHS = {"compute": 1, "read": 1, "wide": 2}


def clock(
    kind: type[VirtualExecutor], seconds: Mapping[str, Work], rate_beside: Mapping[tuple[str, str], float] | None = None
) -> VirtualExecutor:
    """seconds: by the task's name. rate_beside: (lane, lane beside it) -> fraction that is left."""
    fractions = rate_beside or {}

    def left(lane: str, working: frozenset[str]) -> float:
        rate = 1.0
        for other in sorted(working):
            rate *= fractions.get((lane, other), 1.0)
        return rate

    return kind(WIDTHS, lambda task: seconds[task.key.rpartition("/")[2]], left)


def intervals(executor: VirtualExecutor) -> dict[str, tuple[float, float]]:
    return {e.task.key.rpartition("/")[2]: (round(e.start, 9), round(e.end, 9)) for e in executor.events}


def test_lanes_run_side_by_side_and_wait_for_predecessors() -> None:
    """
    read     |--a 2--|--b 3-----|
    compute          |--x 1-|   |--y 1-|       x needs a, y needs b and x
    """
    a, b, x, y = task("a", "read"), task("b", "read"), task("x", "compute"), task("y", "compute")
    executor = clock(VirtualDataflow, {"a": Work(0, 2), "b": Work(0, 3), "x": Work(0, 1), "y": Work(1, 0)})
    executor.submit(graph([a, x, b, y], [(a, x), (b, y), (x, y)]), at=0.0)
    executor.wait(0)
    assert intervals(executor) == {"a": (0, 2), "x": (2, 3), "b": (2, 5), "y": (5, 6)}


def test_a_lane_keeps_its_order_even_when_a_later_task_could_start() -> None:
    """
    compute |--x 4----------|
    read                    |-late 1-|-free 1-|     late needs x; free needs nothing and is behind it
    """
    x, late, free = task("x", "compute"), task("late", "read"), task("free", "read")
    executor = clock(VirtualDataflow, {"x": Work(0, 4), "late": Work(0, 1), "free": Work(0, 1)})
    executor.submit(graph([x, late, free], [(x, late)]), at=0.0)
    executor.wait(0)
    assert intervals(executor) == {"x": (0, 4), "late": (4, 5), "free": (5, 6)}


def test_tasks_of_a_wide_lane_are_served_in_turn_and_their_latencies_overlap() -> None:
    """
    wide  1  |. a: 1 + 2 |. c: 1, 1 waiting, 2 |       0-1 latencies, 1-3 a is served, 3-5 b, 5-7 c
    wide  2  |. b: 1, 2 waiting, 2 |
    """
    tasks = [task(name, "wide") for name in "abc"]
    executor = clock(VirtualDataflow, dict.fromkeys("abc", Work(1, 2)))
    executor.submit(graph(tasks), at=0.0)
    executor.wait(0)
    assert intervals(executor) == {"a": (0, 3), "b": (0, 5), "c": (3, 7)}
    assert {e.task.key: e.worker for e in executor.events} == {"0/0/0/a": 0, "0/0/0/b": 1, "0/0/0/c": 0}


def test_neighbours_take_part_of_a_rate_while_they_work() -> None:
    """
    read    |--r 2----|             compute runs at half its rate beside a read:
    compute |--x 2--------------|   1 s of work done at 2, the other at full rate until 3
    """
    executor = clock(VirtualDataflow, {"r": Work(0, 2), "x": Work(0, 2)}, {("compute", "read"): 0.5})
    executor.submit(graph([task("r", "read"), task("x", "compute")]), at=0.0)
    executor.wait(0)
    assert intervals(executor) == {"r": (0, 2), "x": (0, 3)}


def test_a_step_begins_when_it_is_handed_over_and_beside_the_one_before() -> None:
    """
    read    |--a 1--|  |--b 1--|          b, of the next step, is handed over at 1.5
    compute         |--x 4-----------|
    """
    a, x, b = task("a", "read"), task("x", "compute"), task("b", "read", step=1)
    executor = clock(VirtualDataflow, {"a": Work(0, 1), "x": Work(0, 4), "b": Work(0, 1)})
    executor.submit(graph([a, x], [(a, x)]), at=0.0)
    executor.submit(graph([b]), at=1.5)
    executor.wait(0)
    assert executor.now == 5
    executor.wait(1)
    assert intervals(executor) == {"a": (0, 1), "x": (1, 5), "b": (1.5, 2.5)}


def test_without_overlap_every_task_waits_for_the_one_before() -> None:
    tasks = [task("a", "wide"), task("b", "wide"), task("x", "compute")]
    executor = clock(VirtualSequential, {"a": Work(1, 1), "b": Work(0, 3), "x": Work(0, 1)}, {("compute", "wide"): 0.1})
    executor.submit(graph(tasks), at=1.0)
    executor.wait(0)
    assert intervals(executor) == {"a": (1, 3), "b": (3, 6), "x": (6, 7)}


def test_a_task_that_takes_no_time_ends_when_it_starts() -> None:
    a, b = task("a", "read"), task("b", "compute")
    executor = clock(VirtualDataflow, {"a": Work(0, 0), "b": Work(0, 0)})
    executor.submit(graph([a, b], [(a, b)]), at=0.0)
    executor.wait(0)
    assert intervals(executor) == {"a": (0, 0), "b": (0, 0)}
