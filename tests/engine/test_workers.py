"""Threads that share a kernel's work do all of it, once, and end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from flexflow_engine.cpu.workers import Workers
from watched import no_thread_left


@pytest.fixture
def workers() -> Iterator[Workers]:
    with closing(Workers(3)) as workers:
        yield workers


def test_every_part_is_worked_on_once_and_the_first_in_the_caller(workers: Workers) -> None:
    threads: dict[int, str] = {}
    workers.share(lambda part: threads.update({part: threading.current_thread().name}), 3)
    assert sorted(threads) == [0, 1, 2]
    assert threads[0] == threading.current_thread().name


def test_items_are_drawn_once_each_and_a_thread_that_is_held_up_takes_fewer(workers: Workers) -> None:
    drawn: list[tuple[int, int]] = []
    held_up, others_done = threading.Event(), threading.Event()

    def work(thread: int, item: int, stop: int) -> None:
        drawn.append((thread, item))
        if thread == 0:
            held_up.set()
            assert others_done.wait(10)
        else:
            assert held_up.wait(10)
            if len(drawn) == 20:
                others_done.set()

    workers.draw(work, 20)
    assert sorted(item for _, item in drawn) == list(range(20))
    assert sum(thread == 0 for thread, _ in drawn) == 1


def test_what_is_drawn_in_steps_covers_everything_once(workers: Workers) -> None:
    drawn: list[tuple[int, int]] = []
    workers.draw(lambda _, first, stop: drawn.append((first, stop)), 20, step=6)
    assert sorted(drawn) == [(0, 6), (6, 12), (12, 18), (18, 20)]


def test_what_a_part_raises_reaches_the_caller(workers: Workers) -> None:
    def fail(part: int) -> None:
        if part == 1:
            raise ValueError("part 1")

    with pytest.raises(ValueError, match="part 1"):
        workers.share(fail, 2)


def test_workers_leave_no_thread_behind() -> None:
    with no_thread_left():
        workers = Workers(3)
        workers.share(lambda part: None, 3)
        workers.close()
        workers.close()
