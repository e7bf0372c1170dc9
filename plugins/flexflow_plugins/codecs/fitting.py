"""The grid that covers a group of numbers: low + code * scale, code 0 ... levels; low and scale in float16.

From the smallest to the largest number: no number is further than half a step from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flexflow_engine.cpu.jit import finite_kernel, kernel
from flexflow_engine.cpu.numbers import MAX_HALF, half_at_least, half_at_most, half_to_float


@kernel
def cover(numbers: Any, levels: Any) -> Any:
    """The covering grid of `numbers`, float32 [n], finite: bits of low and of scale.

    low is rounded down and scale up, so that the grid covers the numbers. Beyond float16 both stop at its largest.
    """
    smallest, largest = _extremes(numbers)
    low = half_at_most(max(smallest, -MAX_HALF))
    largest = min(largest, half_to_float(low) + levels * MAX_HALF)
    span = np.float32(largest - half_to_float(low))
    return low, half_at_least(max(np.float32(0), np.float32(span / levels)))


@finite_kernel
def quantise(numbers: Any, low: Any, scale: Any, levels: Any, codes: Any) -> None:
    """The code of the grid's place next to each number into `codes`, uint8."""
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    for i in range(len(numbers)):
        codes[i] = np.uint8(_code((numbers[i] - low) * inverse, levels))


@finite_kernel
def _code(place: Any, levels: Any) -> Any:
    """The whole number next to `place` among 0 ... levels."""
    inside = place if place > np.float32(0) else np.float32(0)
    return np.floor((inside if inside < levels else levels) + np.float32(0.5))


@finite_kernel
def _extremes(numbers: Any) -> Any:
    smallest = largest = numbers[0]
    for i in range(len(numbers)):
        smallest, largest = min(smallest, numbers[i]), max(largest, numbers[i])
    return smallest, largest
