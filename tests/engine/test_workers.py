"""Threads that share a kernel's work do all of it, once, and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from flexflow_engine.cpu import workers as workers_module
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

    def work(thread: int, item: int) -> None:
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


def test_what_a_part_raises_reaches_the_caller(workers: Workers) -> None:
    def fail(part: int) -> None:
        if part == 1:
            raise ValueError("part 1")

    with pytest.raises(ValueError, match="part 1"):
        workers.share(fail, 2)


def test_a_failed_part_ends_the_others_before_the_caller_goes_on(workers: Workers) -> None:
    """Whoever called may give back the memory that they write to."""
    started, failed, done = threading.Event(), threading.Event(), list[int]()

    def work(thread: int, item: int) -> None:
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
    workers.draw(lambda thread, _: drawn.add(thread), 100, threads=2)
    assert drawn <= {0, 1}


def test_threads_that_have_not_begun_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller does everything, and goes on."""
    release, begun, drawn = threading.Event(), threading.Event(), set[int]()

    def begin() -> None:
        release.wait(60)
        begun.set()

    monkeypatch.setattr(workers_module, "take_over_torch_threads", begin)
    with closing(Workers(2)) as workers:
        try:
            workers.draw(lambda thread, item: drawn.add(item) if thread == 0 else None, 10)
            assert not begun.is_set()
            assert drawn == set(range(10))
        finally:
            release.set()


def test_each_caller_has_threads_of_its_own_and_keeps_them() -> None:
    def helpers(shared: Workers) -> set[int]:
        """Threads that work on ten calls of this thread, besides it."""
        found = set[int]()
        for _ in range(10):
            shared.share(lambda part: found.add(threading.get_ident()) if part else None, 2)
        return found

    with closing(Workers(2)) as two, ThreadPoolExecutor(1) as other:
        own, others = helpers(two), other.submit(helpers, two).result()
        assert len(own) == len(others) == 1
        assert own != others


def test_threads_of_callers_that_have_ended_end() -> None:
    found = set[threading.Thread]()
    with closing(Workers(2)) as shared:
        for _ in range(3):
            with ThreadPoolExecutor(1) as caller:
                caller.submit(shared.share, lambda part: found.add(threading.current_thread()), 2).result()
        shared.share(lambda part: None, 2)
        assert len(found) == 2 * 3
        assert not any(thread.is_alive() for thread in found)


def test_nothing_is_shared_after_the_end() -> None:
    shared = Workers(2)
    shared.close()
    with pytest.raises(AssertionError):
        shared.share(lambda part: None, 2)


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
