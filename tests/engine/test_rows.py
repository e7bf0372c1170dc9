"""Rows are put where they are wanted, whatever their dtype, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from flexflow_engine.runtime.rows import RowMoves

HOST = torch.device("cpu")


def moves(which: Sequence[int], places: Sequence[int]) -> RowMoves:
    return RowMoves(np.array(which, np.int64), np.array(places, np.int64), HOST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_put_to_their_places_bit_for_bit(dtype: torch.dtype) -> None:
    rows = torch.arange(35, dtype=torch.float32).view(7, 5).to(dtype)
    rows[3, 2] = float("nan")
    target = torch.full((6, 5), -1.0, dtype=dtype)
    moves([6, 3, 3], [4, 0, 5]).put(rows, target)
    expected = torch.full((6, 5), -1.0, dtype=dtype)
    expected[4], expected[0], expected[5] = rows[6], rows[3], rows[3]
    assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8))


def test_rows_of_a_part_of_a_larger_buffer_are_put() -> None:
    """As units of a slot and rows of a region lie."""
    buffer, region = torch.arange(40.0), torch.zeros(64)
    moves([5, 0], [1, 3]).put(buffer[8:32].view(6, 4), region[16:32].view(4, 4))
    assert region[20:24].tolist() == [28.0, 29.0, 30.0, 31.0]
    assert region[28:32].tolist() == [8.0, 9.0, 10.0, 11.0]
    assert region.count_nonzero() == 8


def test_no_rows_are_no_work() -> None:
    target = torch.ones(2, 3)
    moves([], []).put(torch.zeros(4, 3), target)
    assert torch.equal(target, torch.ones(2, 3))


@pytest.mark.parametrize(("which", "place"), [(7, 0), (-1, 0), (0, 6), (0, -1)])
def test_rows_that_are_not_there_are_refused_before_anything_is_written(which: int, place: int) -> None:
    rows, target = torch.ones(7, 5), torch.zeros(6, 5)
    with pytest.raises(AssertionError):
        moves([1, which], [1, place]).put(rows, target)
    assert not target.any()


def test_rows_of_another_dtype_are_refused() -> None:
    with pytest.raises(AssertionError):
        moves([1], [1]).put(torch.ones(7, 5), torch.zeros(6, 10, dtype=torch.bfloat16))
