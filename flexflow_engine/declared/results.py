"""What functions of models give back."""

from __future__ import annotations

import torch

from flexflow_engine.errors import PluginError


def check_result(result: object, shape: tuple[int, ...], dtype: torch.dtype, *, of: str) -> torch.Tensor:
    """The tensor. Raises PluginError where it has another shape or dtype. of: model and function, for messages."""
    if isinstance(result, torch.Tensor) and result.shape == shape and result.dtype == dtype:
        return result
    raise PluginError(f"{of} gave {_described(result)}, and {_named(dtype)} {list(shape)} is needed")


def check_results(
    results: object, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, *, of: str
) -> tuple[torch.Tensor, ...]:
    """The same of several."""
    if not isinstance(results, list | tuple) or len(results) != len(shapes):
        raise PluginError(f"{of} gave {_described(results)}, and {len(shapes)} tensors are needed")
    return tuple(check_result(result, shape, dtype, of=of) for result, shape in zip(results, shapes, strict=True))


def _described(result: object) -> str:
    if isinstance(result, torch.Tensor):
        return f"{_named(result.dtype)} {list(result.shape)}"
    return f"{len(result)} results" if isinstance(result, list | tuple) else f"{result!r:.80}"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
