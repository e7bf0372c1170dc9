"""Memory that results of products are cut from: never twice at once, and never more than is kept."""

from __future__ import annotations

import threading

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexflow_engine.cpu import arena
from flexflow_engine.cpu.arena import SMALLEST_NBYTES, Arena

ROWS = SMALLEST_NBYTES // 4
"""Of one float32, of which tensors are cut."""


def test_a_place_is_given_again_once_nobody_holds_its_tensor() -> None:
    results = Arena(8 * SMALLEST_NBYTES)
    both = [results.empty((ROWS, 1), torch.float32) for _ in range(2)]
    del both
    first = results.empty((ROWS, 1), torch.float32)
    address, view = first.data_ptr(), first.view(1, ROWS)[:, 3:]
    del first
    assert results.empty((ROWS, 1), torch.float32).data_ptr() != address, "a view holds the memory"
    del view
    assert results.empty((ROWS, 1), torch.float32).data_ptr() == address


def test_it_grows_to_what_lived_at_once_and_no_further_than_its_limit() -> None:
    results = Arena(5 * SMALLEST_NBYTES)
    for _ in range(3):
        alive = [results.empty((ROWS, 1), torch.float32) for _ in range(4)]
        del alive
    assert results.nbytes == 4 * SMALLEST_NBYTES
    alive = [results.empty((ROWS, 1), torch.float32) for _ in range(9)]
    assert len({tensor.data_ptr() for tensor in alive}) == 9
    del alive
    results.empty((ROWS, 1), torch.float32)
    assert results.nbytes == 5 * SMALLEST_NBYTES
    results.empty((6 * ROWS, 1), torch.float32)
    assert results.nbytes == 5 * SMALLEST_NBYTES


def test_what_is_given_back_grows_again_from_nothing() -> None:
    results = Arena(8 * SMALLEST_NBYTES)
    held = [results.empty((ROWS, 1), torch.float32) for _ in range(4)]
    results.clear()
    assert results.nbytes == SMALLEST_NBYTES, "a tensor lies there"
    del held
    results.clear()
    assert results.nbytes == 0
    results.empty((2 * ROWS, 1), torch.float32)
    assert results.nbytes == 2 * SMALLEST_NBYTES


def test_tensors_end_in_any_thread_and_are_aligned() -> None:
    results = Arena(8 * SMALLEST_NBYTES)
    held = [results.empty((size, 1), torch.uint8) for size in (SMALLEST_NBYTES + 1, SMALLEST_NBYTES + 7)]
    addresses = [tensor.data_ptr() for tensor in held]
    assert all(address % 64 == 0 for address in addresses)
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert results.empty((SMALLEST_NBYTES, 1), torch.uint8).data_ptr() != addresses[1]
    assert results.nbytes > 2 * SMALLEST_NBYTES


def test_small_results_take_none_of_it() -> None:
    results = Arena(2**30)
    results.empty((ROWS - 1, 1), torch.float32)
    assert results.nbytes == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2 * arena.SMALLEST_NBYTES), st.integers(0, 5)), max_size=40))
def test_tensors_that_live_at_once_share_nothing(steps: list[tuple[int, int]]) -> None:
    """Each step makes a tensor and drops one of those there are."""
    results, alive = Arena(4 * SMALLEST_NBYTES), list[tuple[int, torch.Tensor]]()
    for number, (size, dropped) in enumerate(steps):
        tensor = results.empty((size,), torch.uint8)
        tensor.fill_(number)
        alive.append((number, tensor))
        del tensor
        if dropped < len(alive):
            alive.pop(dropped)
        assert all(bool((kept == n).all()) for n, kept in alive)
