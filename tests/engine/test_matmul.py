"""Products of 16-bit matrices through float32: right, chosen by the processor, and within what the layout counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.cpu.matmul import is_emulated, widened_linear
from flexflow_engine.cpu.widening import WIDENED_FROM, widened_nbytes
from flexflow_engine.testing.allocations import PeakAllocations

SHAPES = [(1, 7, 5), (WIDENED_FROM - 1, 64, 64), (WIDENED_FROM, 64, 3000), (1100, 96, 1500), (40, 5000, 300)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "columns", "rows"), SHAPES)
def test_products_are_those_of_float32_rounded_once(tokens: int, columns: int, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in [(tokens, columns), (rows, columns), (rows,)]
    )
    exact = F.linear(x.double(), weight.double(), bias.double())
    rounding = 2.0 * torch.finfo(dtype).eps * exact.abs() + 1e-5 * columns**0.5
    for with_bias, expected in ((bias, exact), (None, exact - bias.double())):
        product = widened_linear(x, weight, with_bias)
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
def test_nothing_is_allocated_beyond_what_is_counted(tokens: int, columns: int, rows: int) -> None:
    x, weight, bias = (torch.zeros(s, dtype=torch.bfloat16) for s in [(tokens, columns), (rows, columns), (rows,)])
    with PeakAllocations() as peak:
        widened_linear(x, weight, bias)
    assert peak.peak_bytes <= tokens * rows * 2 + widened_nbytes(tokens, columns)
