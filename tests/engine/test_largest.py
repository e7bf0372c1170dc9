"""The largest numbers of rows are those that torch finds."""

from __future__ import annotations

import pytest
import torch

from flexflow_engine.cpu.largest import largest_in_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 255, 256, 257, 1000])
def test_the_first_of_the_largest_is_found(dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    for values in (
        torch.randn((9, columns), generator=generator),
        torch.randint(-2, 2, (9, columns), generator=generator).float(),
    ):
        check(values.to(dtype))
        check((values.abs() + 1).to(dtype) * -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [torch.inf, torch.nan, -torch.nan, 0.0, -0.0, 1e-40])
def test_numbers_out_of_the_common_are_ordered(dtype: torch.dtype, largest: float) -> None:
    values = torch.full((3, 600), -torch.inf)
    values[1, :] = -1.0
    values[:, 300], values[:, 400] = largest, torch.nan if largest == torch.inf else -largest
    values[2, 500] = largest
    check(values.to(dtype))


def test_rows_may_lie_apart() -> None:
    check(torch.randn((5, 900), generator=torch.Generator().manual_seed(0)).bfloat16()[:, 3:830])


def check(matrix: torch.Tensor) -> None:
    values, places = largest_in_rows(matrix)
    expected, first = matrix.max(dim=1)
    assert (values.dtype, places.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(values, expected.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(places, first)
