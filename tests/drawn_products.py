"""What holds of kernels whose threads draw parts of products, whatever they multiply."""

from __future__ import annotations

import threading
from contextlib import closing
from types import ModuleType
from typing import Any

import pytest
import torch

from flexflow_engine.cpu.workers import Workers
from flexflow_engine.products.matmul import HostProducts, Rows


def check_that_threads_change_no_bit(matrix: Rows, x: torch.Tensor) -> None:
    results = []
    for threads in (1, 2, 5):
        with closing(Workers(threads)) as workers:
            results += [_products(workers).linear(x, matrix) for _ in range(20 if threads > 1 else 1)]
    assert all(torch.equal(result, results[0]) for result in results)


def check_that_every_thread_multiplies(
    kernels: ModuleType, matrix: Rows, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads that wait for each other before they draw. kernels: the module whose `multiply` they call."""
    met, rooms, multiply = threading.Barrier(2, timeout=60), list[object](), kernels.multiply

    def together(*arguments: Any) -> None:
        rooms.append(arguments[3])
        met.wait()
        multiply(*arguments)

    with closing(Workers(2)) as workers:
        products = _products(workers)
        expected = products.linear(x, matrix)
        monkeypatch.setattr(kernels, "multiply", together)
        for _ in range(20):
            assert torch.equal(products.linear(x, matrix), expected)
    assert len(set(rooms)) == 2


def check_that_what_another_thread_does_not_end_is_made_once_more(
    kernels: ModuleType, matrix: Rows, x: torch.Tensor, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tokens. kernels: as above."""
    multiply, products = kernels.multiply, _products(workers)

    def all_taken(tokens: Any, made: Any, table: Any, room: Any, drawn: Any) -> None:
        drawn[0] = len(drawn)
        multiply(tokens, made, table, room, drawn)

    expected = products.linear(x, matrix)
    products.linear(2 * x, matrix)
    monkeypatch.setattr(kernels, "multiply", all_taken)
    assert torch.equal(products.linear(x, matrix), expected)


def _products(workers: Workers) -> HostProducts:
    return HostProducts(workers, torch.bfloat16, None, kept_nbytes=0)
