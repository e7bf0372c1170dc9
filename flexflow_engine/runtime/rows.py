"""Rows of a matrix put to their places, by the processor that both are in the memory of."""

from __future__ import annotations

import torch

from flexflow_engine.abc.tier import HOST, HostBytes


def put_rows(rows: torch.Tensor, which: torch.Tensor, target: torch.Tensor, places: torch.Tensor) -> None:
    """Rows `which` [n] of `rows` [m, width] to `places` [n] of `target` [N, width], of the same dtype.

    All four on one device; `which` and `places` int64.
    """
    assert (rows.dtype, rows.shape[1]) == (target.dtype, target.shape[1]), (rows.dtype, rows.shape, target.dtype)
    if target.device.type == HOST:
        assert len(which) == len(places)
        assert _are_rows(which, rows), (which, len(rows))
        assert _are_rows(places, target), (places, len(target))
        from flexflow_engine.cpu.pieces import copy_rows  # noqa: PLC0415  # Numba takes half a second to import

        copy_rows(_bytes(rows), which.numpy(), _bytes(target), places.numpy())
    else:
        target[places] = rows[which]


def _are_rows(numbers: torch.Tensor, matrix: torch.Tensor) -> bool:
    return not len(numbers) or bool(numbers.numpy().min() >= 0 and numbers.numpy().max() < matrix.shape[0])


def _bytes(matrix: torch.Tensor) -> HostBytes:
    view: HostBytes = matrix.view(torch.uint8).numpy()
    return view
