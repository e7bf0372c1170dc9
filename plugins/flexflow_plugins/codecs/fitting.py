"""Which grid stands for a group of numbers: low + code * scale, code 0 ... levels; low and scale in float16.

`cover` takes the grid from the smallest to the largest number: no number is further than half a step from it.
`search` takes the grid of least error that it finds. A grid that leaves the outermost numbers outside has smaller
steps for all the others; and for given codes the best low and scale are a line fitted by least squares (Lloyd's
iteration, as in k-means, with centres on a line). No number is ever further than one covering step from the grid, and
no group has more squared error than on the covering one.

The error that is made small is a weighted sum of squares. A number's weight is 2 + its distance from the group's mean,
in standard deviations. Plain least squares draws decoded numbers together: their variance is the numbers' less the
squared error. The weights keep them as far apart as they were, which costs little of the squared error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flexflow_engine.cpu.jit import finite_kernel, kernel
from flexflow_engine.cpu.numbers import MAX_HALF, float_to_half, half_at_least, half_at_most, half_to_float

_NEAR = np.float32(2.0)
"""Weight of a number at the group's mean, against 1 for each standard deviation from it."""
_ROUNDS = 2
_LAST_ROUNDS = 3
"""From the best of all starts."""


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


@kernel
def search(numbers: Any, room: Any, levels: Any, cuts: Any, covering: Any) -> Any:
    """A grid of less error than `covering`, or that; grids are the bits of low and of scale.

    Starts from `cuts` cuts at either end, between none and one covering step; 1 starts from the covering grid alone.
    room: float32 [n] twice, for the numbers less their mean (sums of squares then keep their digits) and their weights.
    """
    smallest, largest = _extremes(numbers)
    step = np.float32((largest - smallest) / levels)
    if smallest < -MAX_HALF or largest > MAX_HALF or step < np.float32(2.0**-24):
        return covering
    mean, total = _centre(numbers, room)
    points = room[0], room[1], total
    fitted_low, fitted_scale = _best_line(points, smallest - mean, step, levels, cuts)
    new_scale = float_to_half(fitted_scale)
    new_low = float_to_half(mean + _refit(points, fitted_low, half_to_float(new_scale), levels))
    bottom, width = half_to_float(new_low), half_to_float(new_scale)
    bounded = bottom - smallest <= step and largest - (bottom + width * levels) <= step and width <= 2 * step
    if not bounded or width == 0:
        return covering
    most = squared_error(numbers, half_to_float(covering[0]), half_to_float(covering[1]), levels)
    return (new_low, new_scale) if squared_error(numbers, bottom, width, levels) < most else covering


@finite_kernel
def quantise(numbers: Any, low: Any, scale: Any, levels: Any, codes: Any) -> None:
    """The code of the grid's place next to each number into `codes`, uint8."""
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    for i in range(len(numbers)):
        codes[i] = np.uint8(_code((numbers[i] - low) * inverse, levels))


@finite_kernel
def squared_error(numbers: Any, low: Any, scale: Any, levels: Any) -> Any:
    """Sum of the squared differences between `numbers` and their places on the grid."""
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    total = np.float32(0)
    for i in range(len(numbers)):
        code = _code((numbers[i] - low) * inverse, levels)
        difference = low + code * scale - numbers[i]
        total += difference * difference
    return total


@finite_kernel
def _best_line(points: Any, smallest: Any, step: Any, levels: Any, cuts: Any) -> Any:
    """low and scale, float32, of the least squares that any start ends at.

    points: numbers whose weighted mean is zero, their weights, the weights' sum.
    """
    best, best_low, best_scale = np.float32(-1), smallest, step
    part = np.float32(1) / np.float32(max(cuts - 1, 1))
    for bottom in range(cuts):
        for top in range(cuts):
            low = smallest + step * np.float32(bottom) * part
            scale = step - step * np.float32(bottom + top) * part / levels
            for _ in range(_ROUNDS):
                low, scale, explained = _line(points, low, scale, levels)
            if explained > best:
                best, best_low, best_scale = explained, low, scale
    for _ in range(_LAST_ROUNDS):
        best_low, best_scale, explained = _line(points, best_low, best_scale, levels)
    return best_low, best_scale


@finite_kernel
def _line(points: Any, low: Any, scale: Any, levels: Any) -> Any:
    """The weighted least-squares line through (code, number) for the codes that `low` and `scale` give.

    Also the sum of squares that it explains: what is left of the numbers' own is the error.
    """
    numbers, weights, total = points
    inverse = np.float32(1) / scale
    codes, squares, products = np.float32(0), np.float32(0), np.float32(0)
    for i in range(len(numbers)):
        code = _code((numbers[i] - low) * inverse, levels)
        weighted = code * weights[i]
        codes += weighted
        squares += weighted * code
        products += weighted * numbers[i]
    variance = squares - codes * codes / total
    if variance < np.float32(0.5):  # one code for all
        return low, scale, np.float32(-1)
    slope = products / variance
    if slope <= 0:
        return low, scale, np.float32(-1)
    return -slope * codes / total, slope, products * slope


@finite_kernel
def _refit(points: Any, low: Any, scale: Any, levels: Any) -> Any:
    """The best low for a scale that has been rounded."""
    numbers, weights, total = points
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    rest = np.float32(0)
    for i in range(len(numbers)):
        rest += weights[i] * (numbers[i] - scale * _code((numbers[i] - low) * inverse, levels))
    return rest / total


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


@finite_kernel
def _centre(numbers: Any, room: Any) -> Any:
    """`numbers` less their weighted mean, and the weights, into `room`; that mean, and the weights' sum."""
    centred, weights = room
    mean, squares = np.float32(0), np.float32(0)
    for i in range(len(numbers)):
        mean += numbers[i] / np.float32(len(numbers))
    for i in range(len(numbers)):
        centred[i] = numbers[i] - mean
        squares += centred[i] * centred[i]
    inverse = np.sqrt(np.float32(len(numbers)) / squares)
    total, offset = np.float32(0), np.float32(0)
    for i in range(len(numbers)):
        weights[i] = _NEAR + abs(centred[i]) * inverse
        total += weights[i]
        offset += weights[i] * centred[i]
    offset = offset / total
    for i in range(len(numbers)):
        centred[i] -= offset
    return mean + offset, total
