"""Which grids stand for the four parts of a group: the least squared error of those tried, for many groups at once.

Numbers come as columns, a column a part and four a group, so that a processor tries a grid on eight parts at a time:
`lanes` is float32 [numbers a part, 4 * GROUPS_AT_ONCE].

The *covering* step is the least with which every part has a grid from its smallest number, or below, to its largest.
Steps around it are tried; with each, for each part, the scales around the one that leaves a little of the range
outside, and with each of them the lows around the one that puts the grid in the middle. Squared error is what chooses:
it knows what rounding has made of scale and low. No number is ever further than one covering step from its place.

`reach` says how many are tried: steps below and above the covering one, scales and lows at either side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flexflow_engine.cpu.jit import finite_kernel, kernel
from flexflow_plugins.codecs.part_grids import (
    DEEPEST,
    LEVELS,
    LOW_UNIT,
    LOWEST,
    MAX_EXPONENT,
    NUM_PARTS,
    constant_word,
    exponent_at_least,
    step_of,
)

GROUPS_AT_ONCE = 32
_LANES = NUM_PARTS * GROUPS_AT_ONCE
_INSIDE = np.float32(0.95)
"""Share of a part's range that the scale in the middle of those tried covers."""
_FAR = np.float32(3e38)


@kernel
def rooms() -> Any:
    """What `find_grids` works in: of floats, of words."""
    return np.empty((10, _LANES), np.float32), np.empty((3, _LANES), np.uint32)


@kernel
def find_grids(lanes: Any, words: Any, room: Any, reach: Any) -> None:
    """The word of each group into `words`, uint32 [GROUPS_AT_ONCE]."""
    floats, integers = room
    smallest, largest, steps, errors = floats[0], floats[1], floats[2], floats[3]
    covering, bits, least = integers[0], integers[1], floats[4][:GROUPS_AT_ONCE]
    _extremes(lanes, smallest, largest)
    for k in range(GROUPS_AT_ONCE):
        covering[k] = exponent_at_least(_needed_step(smallest, largest, k))
        words[k] = _covering_word(smallest, largest, covering[k], k)
        least[k] = _FAR
        floats[9][NUM_PARTS * k : NUM_PARTS * (k + 1)] = step_of(covering[k])
    below, above, scales, lows = reach
    for change in range(-below, above + 1):
        for lane in range(_LANES):
            exponent = np.int64(covering[lane // NUM_PARTS]) + change
            usable = covering[lane // NUM_PARTS] > 0 and 0 < exponent <= np.int64(MAX_EXPONENT)
            steps[lane] = step_of(np.uint32(exponent)) if usable else np.float32(0)
        _find_parts(lanes, floats, integers, (scales, lows))
        for k in range(GROUPS_AT_ONCE):
            error = np.float32(0)
            for q in range(NUM_PARTS):
                error += errors[NUM_PARTS * k + q]
            if steps[NUM_PARTS * k] > 0 and error < least[k]:
                least[k] = error
                words[k] = _word(np.uint32(np.int64(covering[k]) + change), bits, k)


@kernel
def _find_parts(lanes: Any, floats: Any, integers: Any, reach: Any) -> None:
    """Six bits of each part, and its error, with the steps as they are; a part without a grid near enough errs far."""
    errors, sums, bits, tried = floats[3], floats[7], integers[1], integers[2]
    for lane in range(_LANES):
        errors[lane] = _FAR
    for change in range(-reach[0], reach[0] + 1):
        for deeper in range(-reach[1], reach[1] + 1):
            _try(floats, (np.float32(change), np.float32(deeper)), tried)
            _squared_errors(lanes, floats[5], floats[6], floats[8], sums)
            _keep_better(floats, bits, tried)


@finite_kernel
def _try(floats: Any, change: Any, tried: Any) -> None:
    """A grid of each part, some scales and lows from the middle one, into `floats` and, as six bits, into `tried`."""
    smallest, largest, steps = floats[0], floats[1], floats[2]
    scale, low, inverse = floats[5], floats[6], floats[8]
    for lane in range(_LANES):
        step = max(steps[lane], np.float32(1e-30))
        span, middle = largest[lane] - smallest[lane], np.float32(0.5) * (largest[lane] + smallest[lane])
        inverse_step = np.float32(1) / step
        c = np.floor(span * inverse_step * (np.float32(8) * _INSIDE / LEVELS) + np.float32(0.5)) + change[0]
        c = min(max(c, np.float32(1)), np.float32(8))
        scale[lane] = c * (step * np.float32(0.125))
        inverse[lane] = np.float32(1) / scale[lane]
        down = (scale[lane] * (LEVELS / np.float32(2)) - middle) * (inverse_step / LOW_UNIT)
        depth = min(max(np.floor(down + np.float32(0.5)) + change[1], np.float32(0)), np.float32(DEEPEST))
        low[lane] = -depth * (step * LOW_UNIT)
        tried[lane] = np.uint32(np.int32(c + np.float32(8) * depth) - np.int32(1))


@finite_kernel
def _squared_errors(lanes: Any, scale: Any, low: Any, inverse: Any, sums: Any) -> None:
    """Of each column with its grid."""
    for lane in range(_LANES):
        sums[lane] = np.float32(0)
    for i in range(len(lanes)):
        row = lanes[i]
        for lane in range(_LANES):
            offset = row[lane] - low[lane]
            difference = code_of(offset * inverse[lane]) * scale[lane] - offset
            sums[lane] += difference * difference


@finite_kernel
def _keep_better(floats: Any, bits: Any, tried: Any) -> None:
    """Take the grids that err less than those before, and leave no number farther outside than allowed."""
    smallest, largest, errors, farthest = floats[0], floats[1], floats[3], floats[9]
    scale, low, sums = floats[5], floats[6], floats[7]
    for lane in range(_LANES):
        outside = max(low[lane] - smallest[lane], largest[lane] - (low[lane] + LEVELS * scale[lane]))
        better = outside <= farthest[lane] and sums[lane] < errors[lane]
        errors[lane] = sums[lane] if better else errors[lane]
        bits[lane] = tried[lane] if better else bits[lane]


@finite_kernel
def code_of(place: Any) -> Any:
    """The whole number next to `place` among 0 ... 15."""
    inside = place if place > np.float32(0) else np.float32(0)
    return np.floor((inside if inside < LEVELS else LEVELS) + np.float32(0.5))


@finite_kernel
def _extremes(lanes: Any, smallest: Any, largest: Any) -> None:
    for lane in range(_LANES):
        smallest[lane] = largest[lane] = lanes[0, lane]
    for i in range(1, len(lanes)):
        for lane in range(_LANES):
            smallest[lane], largest[lane] = min(smallest[lane], lanes[i, lane]), max(largest[lane], lanes[i, lane])


@kernel
def _needed_step(smallest: Any, largest: Any, k: Any) -> Any:
    """The least step with which grids cover the parts of group k: lows are rounded down by up to a unit.

    Zero for numbers that are all the same.
    """
    needed, constant = np.float32(0), True
    for lane in range(NUM_PARTS * k, NUM_PARTS * (k + 1)):
        below = min(smallest[lane], np.float32(0))
        levels = LEVELS - LOW_UNIT if below < 0 else LEVELS
        needed = max(needed, (max(largest[lane], np.float32(0)) - below) / levels, -below / LOWEST)
        constant &= smallest[lane] == largest[lane] == smallest[NUM_PARTS * k]
    return np.float32(0) if constant else needed


@kernel
def _covering_word(smallest: Any, largest: Any, exponent: Any, k: Any) -> Any:
    """The word of group k with grids that cover its parts, if the step is enough; else they end at the last place."""
    word = np.uint32(exponent)
    if exponent == 0:
        return constant_word(smallest[NUM_PARTS * k])
    unit, eighth = step_of(exponent) * LOW_UNIT, step_of(exponent) * np.float32(0.125)
    for q in range(NUM_PARTS):
        lane = NUM_PARTS * k + q
        depth = np.int64(max(np.float32(0), min(np.float32(DEEPEST), np.ceil(-smallest[lane] / unit))))
        span = largest[lane] + np.float32(depth) * unit
        c = np.int64(max(np.float32(1), min(np.float32(8), np.ceil(span / (LEVELS * eighth)))))
        word = np.uint32(word | (np.uint32((c - 1) | (depth << 3)) << np.uint32(8 + 6 * q)))
    return word


@kernel
def _word(exponent: Any, bits: Any, k: Any) -> Any:
    word = np.uint32(exponent)
    for q in range(NUM_PARTS):
        word = np.uint32(word | (bits[NUM_PARTS * k + q] << np.uint32(8 + 6 * q)))
    return word
