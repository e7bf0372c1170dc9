"""Compiled forms are told apart by all that Triton tells them apart by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flexflow_engine.gpu.launching import Launcher

GRID = (4, 1, 1)


class Kernel:
    """What Triton makes of a function: a call compiles a form, and gives it back; forms are called in the same way."""

    def __init__(self) -> None:
        self.compiled = 0
        self.started: list[tuple[int, tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Form]:
        def compile_and_start(*arguments: Any, num_warps: int) -> Form:
            self.compiled += 1
            return Form(self, self.compiled)

        return compile_and_start


class Form:
    def __init__(self, kernel: Kernel, number: int) -> None:
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid == GRID
        return lambda *arguments: self.kernel.started.append((self.number, arguments))


@pytest.fixture
def memory() -> torch.Tensor:
    """Aligned."""
    return torch.zeros(64, dtype=torch.uint8)


def test_a_form_is_started_with_addresses(memory: torch.Tensor) -> None:
    kernel = Kernel()
    launcher = Launcher(kernel)
    launcher(GRID, (memory,), (3, 0.5), (7, None))
    launcher(GRID, (memory[16:],), (5, 1.5), (7, None))
    assert kernel.compiled == 1
    assert kernel.started == [(1, (memory[16:].data_ptr(), 5, 1.5, 7, None))]


@pytest.mark.parametrize(
    "other",
    [
        {"offset": 1},
        {"dtype": torch.bfloat16},
        {"number": 1},
        {"number": 32},
        {"number": 2**31 + 1},
        {"constant": 8},
        {"num_warps": 1},
    ],
    ids=str,
)
def test_whatever_triton_tells_apart_is_another_form(memory: torch.Tensor, other: dict[str, Any]) -> None:
    kernel = Kernel()
    launcher = Launcher(kernel)

    def start(
        offset: int = 0, dtype: torch.dtype = torch.uint8, number: int = 3, constant: int = 7, **warps: int
    ) -> None:
        launcher(GRID, (memory[offset:].view(dtype),), (number,), (constant,), **warps)

    start()
    start(**other)
    start(**other)
    assert kernel.compiled == 2
    assert [form for form, _ in kernel.started] == [2]
