"""Which grids stand for the four parts of a group: the least squared error of those tried, for many groups at once.

Numbers come as columns, a column a part, so that a processor tries a grid on many parts at a time: `lanes` is float32
[numbers a part, 4 * GROUPS_AT_ONCE], the first parts of all groups, then their second ones, and so on.

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
from flexflow_plugins.codecs.part_lanes import GROUPS_AT_ONCE, LANES, find_codes, sum_errors

_FAR = np.float32(3e38)


# Where in a room a number of each part lies: one array, because the compiler vectorises no loop over a dozen of them.
# Exponents and bits of grids are small whole numbers, which float32 holds.
_SMALLEST, _LARGEST = 0 * LANES, 1 * LANES
_COVERING = 2 * LANES  # exponent of the group's covering step; zero for a constant group
_FARTHEST = 3 * LANES  # that a number may lie outside its grid
_STEP, _INVERSE_STEP = 4 * LANES, 5 * LANES  # tried at the moment; zero where there is no such step
_SCALE, _INVERSE, _LOW, _TRIED = 6 * LANES, 7 * LANES, 8 * LANES, 9 * LANES  # the grid tried, and its six bits
_SUM = 10 * LANES  # of its squared errors
_ERROR, _BITS = 11 * LANES, 12 * LANES  # of the best grid with this step
_LEAST = 13 * LANES  # error of the group's grids so far, at its first part
_ROOM = 14 * LANES


@kernel
def make_room() -> Any:
    """What `find_grids` and `quantise` work in."""
    return np.zeros(_ROOM, np.float32)


@kernel
def find_grids(lanes: Any, count: Any, words: Any, room: Any, reach: Any) -> None:
    """The word of each group, of whose parts so many numbers are looked at, into `words`, uint32 [GROUPS_AT_ONCE]."""
    below, above, scales, lows = reach
    _extremes(lanes, count, room)
    _cover(room, words)
    for change in range(-below, above + 1):
        _set_steps(room, change)
        room[_ERROR : _ERROR + LANES] = _FAR
        for wider in range(-scales, scales + 1):
            for deeper in range(-lows, lows + 1):
                _try(room, np.float32(wider), np.float32(deeper))
                sum_errors(lanes, count, room, (_LOW, _INVERSE, _SCALE, _SUM))
                _keep_better(room)
        _keep_best(room, words, change)


@kernel
def quantise(lanes: Any, count: Any, words: Any, room: Any, codes: Any) -> None:
    """The codes of the places next to the numbers, on the grids of `words`; see `find_codes`. Groups that are constant,
    or no numbers, have zeros.
    """
    for q in range(NUM_PARTS):
        for k in range(GROUPS_AT_ONCE):
            lane, bits = q * GROUPS_AT_ONCE + k, np.uint32(words[k] >> np.uint32(8 + 6 * q))
            scale, low = grid_of(step_of(words[k]), bits)
            usable = scale > 0
            room[_LOW + lane] = low if usable else np.float32(0)
            room[_INVERSE + lane] = np.float32(1) / scale if usable else np.float32(0)
    find_codes(lanes, count, room, (_LOW, _INVERSE), codes)


@kernel
def _cover(room: Any, words: Any) -> None:
    """Begin with grids that cover the parts, if a step is enough; else they end at the last place."""
    for k in range(GROUPS_AT_ONCE):
        exponent = exponent_at_least(_needed_step(room, k))
        room[_COVERING + k], room[_FARTHEST + k], room[_LEAST + k] = exponent, step_of(exponent), _FAR
        words[k] = exponent if exponent > 0 else constant_word(room[_SMALLEST + k])
    for q in range(NUM_PARTS):
        for k in range(GROUPS_AT_ONCE):
            lane, step = q * GROUPS_AT_ONCE + k, room[_FARTHEST + k]
            unit, eighth = step * LOW_UNIT, step * np.float32(0.125)
            depth = max(np.float32(0), min(np.float32(DEEPEST), np.ceil(-room[_SMALLEST + lane] / unit)))
            span = room[_LARGEST + lane] + depth * unit
            c = max(np.float32(1), min(np.float32(8), np.ceil(span / (LEVELS * eighth))))
            bits = np.uint32(np.int32(c + np.float32(8) * depth - np.float32(1))) if step > 0 else np.uint32(0)
            words[k] |= np.uint32(bits << np.uint32(8 + 6 * q))
            room[_FARTHEST + lane] = step


@kernel
def _set_steps(room: Any, change: Any) -> None:
    """`change` exponents from the covering one, where there is such a step."""
    for k in range(GROUPS_AT_ONCE):
        covering = np.int32(room[_COVERING + k])
        exponent = np.int32(covering + change)
        usable = covering > 0 and 0 < exponent <= np.int32(MAX_EXPONENT)
        step = step_of(np.uint32(exponent)) if usable else np.float32(0)
        inverse = np.float32(1) / max(step, np.float32(1e-30))
        for q in range(NUM_PARTS):
            lane = q * GROUPS_AT_ONCE + k
            room[_STEP + lane], room[_INVERSE_STEP + lane] = step, inverse


@finite_kernel
def _try(room: Any, wider: Any, deeper: Any) -> None:
    """A grid of each part, some scales and lows from the middle one."""
    for lane in range(LANES):
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
def _keep_better(room: Any) -> None:
    """Take the grids that err less than those before, and leave no number farther outside than allowed."""
    for lane in range(LANES):
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
        error, word = np.float32(0), np.uint32(np.int32(room[_COVERING + k]) + change)
        for q in range(NUM_PARTS):
            lane = q * GROUPS_AT_ONCE + k
            error += room[_ERROR + lane]
            word = np.uint32(word | (np.uint32(room[_BITS + lane]) << np.uint32(8 + 6 * q)))
        better = room[_STEP + k] > 0 and error < room[_LEAST + k]
        room[_LEAST + k] = error if better else room[_LEAST + k]
        words[k] = word if better else words[k]


@finite_kernel
def _extremes(lanes: Any, count: Any, room: Any) -> None:
    for i in range(count):
        row = lanes[i]
        for lane in range(LANES):
            smallest, largest = (room[_SMALLEST + lane], room[_LARGEST + lane]) if i else (row[lane], row[lane])
            room[_SMALLEST + lane], room[_LARGEST + lane] = min(smallest, row[lane]), max(largest, row[lane])


@kernel
def _needed_step(room: Any, k: Any) -> Any:
    """The least step with which grids cover the parts of group k: lows are rounded down by up to a unit.

    Zero for numbers that are all the same.
    """
    needed, constant = np.float32(0), True
    for q in range(NUM_PARTS):
        lane = q * GROUPS_AT_ONCE + k
        smallest, largest = room[_SMALLEST + lane], room[_LARGEST + lane]
        below = min(smallest, np.float32(0))
        levels = LEVELS - LOW_UNIT if below < 0 else LEVELS
        needed = max(needed, (max(largest, np.float32(0)) - below) / levels, -below / LOWEST)
        constant &= smallest == largest == room[_SMALLEST + k]
    return np.float32(0) if constant else needed
