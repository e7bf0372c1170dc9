"""Products on the host: right, chosen by the processor, and within what the layout counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.cpu.matmul import HostProducts, PlainRows, is_emulated
from flexflow_engine.cpu.widening import WIDENED_FROM, widened_nbytes, widened_rows
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.testing.allocations import PeakAllocations

SHAPES = [(1, 7, 5), (WIDENED_FROM - 1, 64, 64), (WIDENED_FROM, 64, 3000), (1100, 96, 1500), (40, 5000, 300)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "columns", "rows"), SHAPES)
def test_products_are_those_of_float32_rounded_once(
    workers: Workers, tokens: int, columns: int, rows: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in [(tokens, columns), (rows, columns), (rows,)]
    )
    exact = F.linear(x.double(), weight.double(), bias.double())
    rounding = 2.0 * torch.finfo(dtype).eps * exact.abs() + 1e-5 * columns**0.5
    products = HostProducts(workers, dtype)
    for with_bias, expected in ((bias, exact), (None, exact - bias.double())):
        product = products.linear(x, PlainRows(weight), with_bias)
        assert product.dtype == dtype
        assert ((product.double() - expected).abs() <= rounding + torch.finfo(dtype).eps * bias.abs()).all()


@pytest.mark.parametrize(
    ("dtype", "capabilities", "emulated"),
    [
        (torch.bfloat16, {"avx2": True, "avx512_bf16": False}, True),
        (torch.bfloat16, {"avx512_bf16": True}, False),
        (torch.float16, {"avx512_bf16": True}, True),
        (torch.float16, {"amx_fp16": True}, False),
        (torch.float32, {}, False),
    ],
)
def test_what_a_processor_multiplies_itself(dtype: torch.dtype, capabilities: dict[str, bool], emulated: bool) -> None:
    assert is_emulated(dtype, capabilities) == emulated


@pytest.mark.parametrize(("tokens", "columns", "rows"), SHAPES)
def test_nothing_is_allocated_beyond_what_is_counted(workers: Workers, tokens: int, columns: int, rows: int) -> None:
    x, weight, bias = (torch.zeros(s, dtype=torch.bfloat16) for s in [(tokens, columns), (rows, columns), (rows,)])
    products = HostProducts(workers, torch.bfloat16)
    with PeakAllocations() as peak:
        products.linear(x, PlainRows(weight), bias)
    assert peak.peak_bytes <= tokens * rows * 2 + widened_nbytes(tokens, [(rows, columns)])


def test_what_is_kept_of_one_matrix_is_counted_beside_the_next_one(workers: Workers) -> None:
    shapes = [(3000, 64), (40, 5000)]
    products = HostProducts(workers, torch.bfloat16)
    inputs = [
        (torch.zeros((100, c), dtype=torch.bfloat16), torch.zeros((r, c), dtype=torch.bfloat16)) for r, c in shapes
    ]
    with PeakAllocations() as peak:
        for x, weight in inputs:
            products.linear(x, PlainRows(weight))
    assert peak.peak_bytes <= 100 * 3000 * 2 + widened_nbytes(100, shapes)


def test_rooms_are_kept_from_product_to_product(workers: Workers) -> None:
    x, weight = torch.zeros((WIDENED_FROM, 64), dtype=torch.bfloat16), torch.zeros((3000, 64), dtype=torch.bfloat16)
    products, room_nbytes = HostProducts(workers, torch.bfloat16), widened_rows(64, workers.threads) * 64 * 4
    products.linear(x, PlainRows(weight))
    with PeakAllocations() as peak:
        products.linear(x, PlainRows(weight))
    assert peak.peak_bytes < 3000 * WIDENED_FROM * 2 + workers.threads * room_nbytes
