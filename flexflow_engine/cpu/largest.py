"""The largest number of each row: torch's own maximum with its place takes half a millisecond for the logits that 32
tokens have with 8000 rows of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from numpy.typing import NDArray

from flexflow_engine.cpu.arrays import ARRAY_TYPES
from flexflow_engine.cpu.jit import kernel
from flexflow_engine.cpu.numbers import widen

_BLOCK = 256
"""Numbers among which the place of the largest is looked for, once it is known which of them have it."""
_INTEGERS = {2: torch.int16, 4: torch.int32}
_NOT_A_NUMBER, _LEAST = np.int32(2**31 - 1), np.int32(-(2**31))


def largest_in_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """matrix: [rows, n] in host memory, n at least 1. As `matrix.max(dim=1)`: of each row the largest number, as
    float32, and its place, int64, the first among equals; NaN is larger than any number.
    """
    numbers = matrix.view(_INTEGERS[matrix.itemsize]).numpy().view(ARRAY_TYPES[matrix.dtype])
    values, places = np.empty(len(matrix), np.float32), np.empty(len(matrix), np.int64)
    _largest_in_rows(numbers, values, places)
    return torch.from_numpy(values), torch.from_numpy(places)


@kernel
def _largest_in_rows(matrix: NDArray[Any], values: NDArray[np.float32], places: NDArray[np.int64]) -> None:
    for row in range(len(matrix)):
        numbers, best, place = matrix[row], _LEAST, 0
        for start in range(0, len(numbers), _BLOCK):
            highest, block = _LEAST, numbers[start : start + _BLOCK]
            for i in range(len(block)):
                highest = max(highest, _rank(block[i]))
            if highest > best:
                best, place = highest, start
        while _rank(numbers[place]) != best:
            place += 1
        values[row], places[row] = widen(numbers[place]), place


def _rank(number: Any) -> Any:
    """In a kernel: of an element of an array of numbers, int32, greater where the number is; zeros have the same."""
    raise NotImplementedError


@overload(_rank, strict=False)  # strict compares annotations too, and lambdas have none
def _rank_of(number: Any) -> Callable[[Any], Any]:
    if number == numba.float32:
        return lambda number: _rank_of_bits(np.float32(number).view(np.uint32), np.uint32(31), np.uint32(0x7F800000))
    infinite = np.uint32(0x7F80 if number == numba.uint16 else 0x7C00)
    return lambda number: _rank_of_bits(np.uint32(np.uint16(number)), np.uint32(15), infinite)


@kernel
def _rank_of_bits(bits: Any, sign: Any, infinite: Any) -> Any:
    """sign: which bit that is. infinite: the bits of infinity. Without a branch, so that loops vectorise."""
    negative = np.uint32(bits >> sign)
    magnitude = np.uint32(bits ^ np.uint32(negative << sign))
    signed = np.uint32(np.uint32(magnitude ^ np.uint32(-negative)) + negative)
    return _NOT_A_NUMBER if magnitude > infinite else np.int32(signed)
