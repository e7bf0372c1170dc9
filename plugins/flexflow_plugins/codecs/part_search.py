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
from flexflow_plugins.codecs.part_format import DEEPEST, NUM_PARTS
from flexflow_plugins.codecs.part_grids import (
    INSIDE,
    LEVELS,
    LOW_UNIT,
    LOWEST,
    MAX_EXPONENT,
    constant_word,
    exponent_at_least,
    grid_of,
    step_of,
)

GROUPS_AT_ONCE = 32
_LANES = NUM_PARTS * GROUPS_AT_ONCE
_FAR = np.float32(3e38)


# Where in a room a number of each part lies: one array, because the compiler vectorises no loop over a dozen of them.
# Exponents and bits of grids are small whole numbers, which float32 holds.
_SMALLEST, _LARGEST = 0 * _LANES, 1 * _LANES
_COVERING = 2 * _LANES  # exponent of the group's covering step; zero for a constant group
_FARTHEST = 3 * _LANES  # that a number may lie outside its grid
_STEP, _INVERSE_STEP = 4 * _LANES, 5 * _LANES  # tried at the moment; zero where there is no such step
_SCALE, _INVERSE, _LOW, _TRIED = 6 * _LANES, 7 * _LANES, 8 * _LANES, 9 * _LANES  # the grid tried, and its six bits
_SUM = 10 * _LANES  # of its squared errors
_ERROR, _BITS = 11 * _LANES, 12 * _LANES  # of the best grid with this step
_LEAST = 13 * _LANES  # error of the group's grids so far, at its first part
_ROOM = 14 * _LANES


@kernel
def make_room() -> Any:
    """What `find_grids` and `quantise` work in."""
    return np.zeros(_ROOM, np.float32)


@kernel
def find_grids(lanes: Any, words: Any, room: Any, reach: Any) -> None:
    """The word of each group into `words`, uint32 [GROUPS_AT_ONCE]."""
    below, above, scales, lows = reach
    _extremes(lanes, room)
    _cover(room, words)
    for change in range(-below, above + 1):
        _set_steps(room, change)
        room[_ERROR : _ERROR + _LANES] = _FAR
        for wider in range(-scales, scales + 1):
            for deeper in range(-lows, lows + 1):
                _try(room, np.float32(wider), np.float32(deeper))
                _sum_errors(lanes, room)
                _keep_better(room)
        _keep_best(room, words, change)


@kernel
def quantise(lanes: Any, words: Any, room: Any, pairs: Any) -> None:
    """The codes of the places next to the numbers, on the grids of `words`, those of two rows in a byte.

    pairs: uint8 [numbers a part / 2, 4 * GROUPS_AT_ONCE]. Groups that are constant, or no numbers, have zeros.
    """
    for k in range(GROUPS_AT_ONCE):
        step, bits = step_of(words[k]), np.uint32(words[k] >> np.uint32(8))
        for lane in range(NUM_PARTS * k, NUM_PARTS * (k + 1)):
            scale, low = grid_of(step, bits)
            usable = scale > 0
            room[_LOW + lane] = low if usable else np.float32(0)
            room[_INVERSE + lane] = np.float32(1) / scale if usable else np.float32(0)
            bits = np.uint32(bits >> np.uint32(6))
    for i in range(len(pairs)):
        _pair(lanes[2 * i], lanes[2 * i + 1], room, pairs[i])


@finite_kernel
def _pair(first: Any, second: Any, room: Any, pairs: Any) -> None:
    for lane in range(_LANES):
        low, inverse = room[_LOW + lane], room[_INVERSE + lane]
        a, b = _code_of((first[lane] - low) * inverse), _code_of((second[lane] - low) * inverse)
        pairs[lane] = np.uint8(np.int32(a) | (np.int32(b) << 4))


@kernel
def _cover(room: Any, words: Any) -> None:
    """Begin with the grids of the covering step."""
    for k in range(GROUPS_AT_ONCE):
        exponent = exponent_at_least(_needed_step(room, k))
        words[k] = _covering_word(room, exponent, k)
        room[_LEAST + NUM_PARTS * k] = _FAR
        for lane in range(NUM_PARTS * k, NUM_PARTS * (k + 1)):
            room[_COVERING + lane], room[_FARTHEST + lane] = exponent, step_of(exponent)


@kernel
def _set_steps(room: Any, change: Any) -> None:
    """`change` exponents from the covering one, where there is such a step."""
    for k in range(GROUPS_AT_ONCE):
        covering = np.int64(room[_COVERING + NUM_PARTS * k])
        usable = covering > 0 and 0 < covering + change <= np.int64(MAX_EXPONENT)
        step = step_of(np.uint32(covering + change)) if usable else np.float32(0)
        for lane in range(NUM_PARTS * k, NUM_PARTS * (k + 1)):
            room[_STEP + lane], room[_INVERSE_STEP + lane] = step, np.float32(1) / max(step, np.float32(1e-30))


@finite_kernel
def _try(room: Any, wider: Any, deeper: Any) -> None:
    """A grid of each part, some scales and lows from the middle one."""
    for lane in range(_LANES):
        step, inverse_step = max(room[_STEP + lane], np.float32(1e-30)), room[_INVERSE_STEP + lane]
        smallest, largest = room[_SMALLEST + lane], room[_LARGEST + lane]
        span, middle = largest - smallest, np.float32(0.5) * (largest + smallest)
        c = np.floor(span * inverse_step * (np.float32(8) * INSIDE / LEVELS) + np.float32(0.5)) + wider
        c = min(max(c, np.float32(1)), np.float32(8))
        scale = c * (step * np.float32(0.125))
        down = (scale * (LEVELS / np.float32(2)) - middle) * (inverse_step / LOW_UNIT)
        depth = min(max(np.floor(down + np.float32(0.5)) + deeper, np.float32(0)), np.float32(DEEPEST))
        room[_SCALE + lane], room[_INVERSE + lane] = scale, np.float32(1) / scale
        room[_LOW + lane] = -depth * (step * LOW_UNIT)
        room[_TRIED + lane] = c + np.float32(8) * depth - np.float32(1)


@finite_kernel
def _sum_errors(lanes: Any, room: Any) -> None:
    """The squared errors of each column with the grid that is tried."""
    for lane in range(_LANES):
        room[_SUM + lane] = np.float32(0)
    for i in range(len(lanes)):
        row = lanes[i]
        for lane in range(_LANES):
            offset = row[lane] - room[_LOW + lane]
            difference = _code_of(offset * room[_INVERSE + lane]) * room[_SCALE + lane] - offset
            room[_SUM + lane] += difference * difference


@finite_kernel
def _keep_better(room: Any) -> None:
    """Take the grids that err less than those before, and leave no number farther outside than allowed."""
    for lane in range(_LANES):
        low, top = room[_LOW + lane], room[_LOW + lane] + LEVELS * room[_SCALE + lane]
        outside = max(low - room[_SMALLEST + lane], room[_LARGEST + lane] - top)
        error = room[_SUM + lane] if outside <= room[_FARTHEST + lane] else _FAR
        best, tried, bits = room[_ERROR + lane], room[_TRIED + lane], room[_BITS + lane]
        room[_ERROR + lane] = min(error, best)
        room[_BITS + lane] = tried if error < best else bits


@kernel
def _keep_best(room: Any, words: Any, change: Any) -> None:
    """Take the grids of these steps where a group errs less with them."""
    for k in range(GROUPS_AT_ONCE):
        first, error = NUM_PARTS * k, np.float32(0)
        for lane in range(first, first + NUM_PARTS):
            error += room[_ERROR + lane]
        if room[_STEP + first] > 0 and error < room[_LEAST + first]:
            room[_LEAST + first] = error
            words[k] = _word(room, np.int64(room[_COVERING + first]) + change, k)


@finite_kernel
def _code_of(place: Any) -> Any:
    """The whole number next to `place` among 0 ... 15."""
    inside = place if place > np.float32(0) else np.float32(0)
    return np.floor((inside if inside < LEVELS else LEVELS) + np.float32(0.5))


@finite_kernel
def _extremes(lanes: Any, room: Any) -> None:
    for i in range(len(lanes)):
        row = lanes[i]
        for lane in range(_LANES):
            smallest, largest = (room[_SMALLEST + lane], room[_LARGEST + lane]) if i else (row[lane], row[lane])
            room[_SMALLEST + lane], room[_LARGEST + lane] = min(smallest, row[lane]), max(largest, row[lane])


@kernel
def _needed_step(room: Any, k: Any) -> Any:
    """The least step with which grids cover the parts of group k: lows are rounded down by up to a unit.

    Zero for numbers that are all the same.
    """
    needed, constant = np.float32(0), True
    for lane in range(NUM_PARTS * k, NUM_PARTS * (k + 1)):
        smallest, largest = room[_SMALLEST + lane], room[_LARGEST + lane]
        below = min(smallest, np.float32(0))
        levels = LEVELS - LOW_UNIT if below < 0 else LEVELS
        needed = max(needed, (max(largest, np.float32(0)) - below) / levels, -below / LOWEST)
        constant &= smallest == largest == room[_SMALLEST + NUM_PARTS * k]
    return np.float32(0) if constant else needed


@kernel
def _covering_word(room: Any, exponent: Any, k: Any) -> Any:
    """The word of group k with grids that cover its parts, if the step is enough; else they end at the last place."""
    word = np.uint32(exponent)
    if exponent == 0:
        return constant_word(room[_SMALLEST + NUM_PARTS * k])
    unit, eighth = step_of(exponent) * LOW_UNIT, step_of(exponent) * np.float32(0.125)
    for q in range(NUM_PARTS):
        smallest, largest = room[_SMALLEST + NUM_PARTS * k + q], room[_LARGEST + NUM_PARTS * k + q]
        depth = np.int64(max(np.float32(0), min(np.float32(DEEPEST), np.ceil(-smallest / unit))))
        span = largest + np.float32(depth) * unit
        c = np.int64(max(np.float32(1), min(np.float32(8), np.ceil(span / (LEVELS * eighth)))))
        word = np.uint32(word | (np.uint32((c - 1) | (depth << 3)) << np.uint32(8 + 6 * q)))
    return word


@kernel
def _word(room: Any, exponent: Any, k: Any) -> Any:
    word = np.uint32(exponent)
    for q in range(NUM_PARTS):
        word = np.uint32(word | (np.uint32(room[_BITS + NUM_PARTS * k + q]) << np.uint32(8 + 6 * q)))
    return word
