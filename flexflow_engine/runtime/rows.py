"""Rows of a matrix put to their places, by the processor that both are in the memory of."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from flexflow_engine.abc.tier import HOST, HostBytes
from flexflow_engine.runtime.indices import indices


def put_rows(rows: torch.Tensor, which: NDArray[np.int64], target: torch.Tensor, places: NDArray[np.int64]) -> None:
    """Rows `which` [n] of `rows` [m, width] to `places` [n] of `target` [N, width], of the same dtype and device."""
    assert (rows.dtype, rows.shape[1]) == (target.dtype, target.shape[1]), (rows.dtype, rows.shape, target.dtype)
    if target.device.type == HOST:
        assert len(which) == len(places)
        assert _are_rows(which, rows), (which, len(rows))
        assert _are_rows(places, target), (places, len(target))
        from flexflow_engine.cpu.pieces import copy_rows  # noqa: PLC0415  # Numba takes half a second to import

        copy_rows(_bytes(rows), which, _bytes(target), places)
    else:
        target[indices(places, target.device)] = rows[indices(which, target.device)]


def _are_rows(numbers: NDArray[np.int64], matrix: torch.Tensor) -> bool:
    return not len(numbers) or bool(numbers.min() >= 0 and numbers.max() < matrix.shape[0])


def _bytes(matrix: torch.Tensor) -> HostBytes:
    view: HostBytes = matrix.view(torch.uint8).numpy()
    return view
