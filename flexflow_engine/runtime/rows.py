"""Rows of a matrix put to their places, by the processor that both are in the memory of."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from flexflow_engine.abc.tier import HOST, HostBytes
from flexflow_engine.runtime.indices import indices


class RowMoves:
    """Which rows of one matrix go to which rows of another; made once, and carried out for as many as need it."""

    def __init__(self, which: NDArray[np.int64], places: NDArray[np.int64], device: torch.device) -> None:
        """Rows `which` [n] go to `places` [n], on `device`, where all matrices are."""
        assert len(which) == len(places)
        self._needed_rows, self._needed_places = _rows_needed(which), _rows_needed(places)
        self._on_host = device.type == HOST
        self._numbers = np.ascontiguousarray(which, np.int64), np.ascontiguousarray(places, np.int64)
        if not self._on_host:
            in_order = np.array_equal(which, np.arange(len(which)))
            self._chosen = slice(0, len(which)) if in_order else indices(self._numbers[0], device)
            self._into = indices(self._numbers[1], device)

    def put(self, rows: torch.Tensor, target: torch.Tensor) -> None:
        """From rows [m, width] to target [N, width], of the same dtype."""
        assert (rows.dtype, rows.shape[1]) == (target.dtype, target.shape[1]), (rows.dtype, rows.shape, target.dtype)
        assert len(rows) >= self._needed_rows, (len(rows), self._needed_rows)
        assert len(target) >= self._needed_places, (len(target), self._needed_places)
        if self._on_host:
            from flexflow_engine.cpu.pieces import copy_rows  # noqa: PLC0415  # Numba takes half a second to import

            which, places = self._numbers
            copy_rows(_bytes(rows), which, _bytes(target), places)
        else:
            target.index_copy_(0, self._into, rows[self._chosen])


def _rows_needed(numbers: NDArray[np.int64]) -> int:
    """That a matrix must have, to have rows of these numbers."""
    assert not len(numbers) or numbers.min() >= 0, numbers
    return int(numbers.max()) + 1 if len(numbers) else 0


def _bytes(matrix: torch.Tensor) -> HostBytes:
    view: HostBytes = matrix.view(torch.uint8).numpy()
    return view
