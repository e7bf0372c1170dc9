"""Threads that share a kernel's work do all of it, once, and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from flexflow_engine.cpu.settings import one_torch_thread
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.testing.allocations import PeakAllocations
from watched import no_thread_left, openmp_team


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


def test_a_failed_part_ends_the_others_before_the_caller_goes_on(workers: Workers) -> None:
    """Whoever called may give back the memory that they write to."""
    started, failed, done = threading.Event(), threading.Event(), list[int]()

    def work(thread: int, item: int, stop: int) -> None:
        if thread == 0:
            assert started.wait(10)
            failed.set()
            raise ValueError("thread 0")
        started.set()
        assert failed.wait(10)
        time.sleep(0.05)
        done.append(item)

    with pytest.raises(ValueError, match="thread 0"):
        workers.draw(work, 1000)
    ended = len(done)
    time.sleep(0.1)
    assert len(done) == ended < 100


def test_at_most_so_many_threads_draw(workers: Workers) -> None:
    drawn: set[int] = set()
    workers.draw(lambda thread, _, __: drawn.add(thread), 100, threads=2)
    assert drawn <= {0, 1}


def test_threads_that_have_not_begun_are_not_waited_for() -> None:
    """All of the pool's threads are held up; the caller does everything, and goes on."""
    begun, release, drawn = threading.Semaphore(0), threading.Event(), set[int]()

    def hold(part: int) -> None:
        begun.release()
        release.wait()

    with closing(Workers(2)) as workers:
        held = [threading.Thread(target=workers.share, args=(hold, 3), daemon=True) for _ in "ab"]
        for thread in held:
            thread.start()
        try:
            assert all(begun.acquire(timeout=60) for _ in range(2 * 3))
            workers.draw(lambda thread, item, _: drawn.add(item) if thread == 0 else None, 10)
            assert drawn == set(range(10))
        finally:
            release.set()
            for thread in held:
                thread.join(60)


def test_what_threads_allocate_counts_for_the_caller(workers: Workers) -> None:
    """Bounds on memory are tested with it."""
    held: dict[int, torch.Tensor] = {}
    with PeakAllocations() as peak:
        workers.share(lambda part: held.update({part: torch.empty(1000, dtype=torch.uint8)}), 3)
    assert peak.peak_bytes == 3000


def test_a_blas_starts_no_team_of_its_own_in_threads_that_work(workers: Workers) -> None:
    """OpenMP's number is a thread's own, and torch's reaches it late."""
    teams = dict[int, int]()
    with one_torch_thread():
        workers.share(lambda part: teams.update({part: openmp_team()}), 3)
    assert [teams[1], teams[2]] == [1, 1]


def test_workers_leave_no_thread_behind() -> None:
    with no_thread_left():
        workers = Workers(3)
        workers.share(lambda part: None, 3)
        workers.close()
        workers.close()
