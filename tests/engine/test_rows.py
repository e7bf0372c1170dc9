"""Rows are put where they are wanted, whatever their dtype, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from flexflow_engine.runtime.rows import put_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_put_to_their_places_bit_for_bit(dtype: torch.dtype) -> None:
    rows = torch.arange(35, dtype=torch.float32).view(7, 5).to(dtype)
    rows[3, 2] = float("nan")
    target = torch.full((6, 5), -1.0, dtype=dtype)
    put_rows(rows, torch.tensor([6, 3, 3]), target, torch.tensor([4, 0, 5]))
    expected = torch.full((6, 5), -1.0, dtype=dtype)
    expected[4], expected[0], expected[5] = rows[6], rows[3], rows[3]
    assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8))


def test_rows_of_a_part_of_a_larger_buffer_are_put() -> None:
    """As units of a slot and rows of a region lie."""
    buffer, region = torch.arange(40.0), torch.zeros(64)
    put_rows(buffer[8:32].view(6, 4), torch.tensor([5, 0]), region[16:32].view(4, 4), torch.tensor([1, 3]))
    assert region[20:24].tolist() == [28.0, 29.0, 30.0, 31.0]
    assert region[28:32].tolist() == [8.0, 9.0, 10.0, 11.0]
    assert region.count_nonzero() == 8


def test_no_rows_are_no_work() -> None:
    target = torch.ones(2, 3)
    put_rows(torch.zeros(4, 3), torch.tensor([], dtype=torch.int64), target, torch.tensor([], dtype=torch.int64))
    assert torch.equal(target, torch.ones(2, 3))


@pytest.mark.parametrize(("which", "place"), [(7, 0), (-1, 0), (0, 6), (0, -1)])
def test_rows_that_are_not_there_are_refused_before_anything_is_written(which: int, place: int) -> None:
    rows, target = torch.ones(7, 5), torch.zeros(6, 5)
    with pytest.raises(AssertionError):
        put_rows(rows, torch.tensor([1, which]), target, torch.tensor([1, place]))
    assert not target.any()


def test_rows_of_another_dtype_are_refused() -> None:
    with pytest.raises(AssertionError):
        put_rows(torch.ones(7, 5), torch.tensor([1]), torch.zeros(6, 10, dtype=torch.bfloat16), torch.tensor([1]))
