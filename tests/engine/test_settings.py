"""Settings of the process: what a run changes while it lasts, and how they come back."""

from __future__ import annotations

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from flexflow_engine.cpu.settings import (
    SWITCH_SECONDS,
    one_torch_thread,
    quick_switches,
    standing_heap,
    take_over_torch_threads,
    torch_team,
)
from flexflow_engine.cpu.workers import Workers


def test_torch_gets_its_threads_back_in_whatever_order_they_are_left() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        first, second = one_torch_thread(), one_torch_thread()
        first.__enter__()
        second.__enter__()
        with closing(Workers()) as workers:
            assert (torch.get_num_threads(), workers.threads) == (1, 3)
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_team_is_the_calling_threads_alone() -> None:
    """Threads that begin meanwhile keep to one: two teams would hinder each other."""
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=take_over_torch_threads) as threads, one_torch_thread():
        with torch_team(3):
            assert threads.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
        with pytest.raises(RuntimeError, match="shapes"), torch_team(3):
            torch.mm(torch.ones(2, 3), torch.ones(2, 3))
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_switches_stay_quick_until_the_last_that_asked_for_them_leaves() -> None:
    usual, (first, second) = sys.getswitchinterval(), (quick_switches(), quick_switches())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == usual


def test_what_was_there_is_passed_over_by_the_collector_until_the_last_run_ends() -> None:
    assert gc.get_freeze_count() == 0
    first, second = standing_heap(), standing_heap()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_freeze_count() > 10_000
    gc.collect()
    cycle: list[object] = []
    cycle.append(cycle)
    del cycle
    assert gc.collect() > 0, "what is new is still looked at"
    second.__exit__(None, None, None)
    assert gc.get_freeze_count() == 0


def test_garbage_of_before_does_not_live_on_with_what_stands() -> None:
    class Node:
        pass

    node = Node()
    node.itself, gone = node, weakref.ref(node)  # type: ignore[attr-defined]  # a cycle
    del node
    with standing_heap():
        assert gone() is None


def test_a_host_program_that_froze_its_heap_keeps_it_as_it_is() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        made_since = [[] for _ in range(1000)]  # type: ignore[var-annotated]  # empty ones
        with standing_heap():
            assert gc.get_freeze_count() <= frozen
        assert gc.get_freeze_count() <= frozen
        del made_since
    finally:
        gc.unfreeze()
