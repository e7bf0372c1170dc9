"""What the 32 bits of a group say of its four grids; see flexflow_plugins.codecs.parts."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexflow_engine.cpu.jit import kernel

NUM_PARTS = 4
LEVELS = np.float32(15)
LOW_UNIT = np.float32(1.25)
"""Of a step: how far the places lie apart that a low may take."""
DEEPEST = 7
"""Of those places, counted down from zero."""
LOWEST = np.float32(DEEPEST * 1.25)
HUGE = np.float32(1e18)
"""Larger numbers are taken for it, so that squares are finite; only a constant group gets even near."""
MAX_EXPONENT = np.uint32(254)
NO_NUMBER = np.uint32(255)
_FIRST = np.uint32((127 - 18) * 8)
"""What is to be added to a step's eight bits to have the upper bits of its float32."""
_CONSTANT = np.uint32(0xFFFFFF00)


@kernel
def part_size(group_size: Any) -> Any:
    return (group_size + 2 * NUM_PARTS - 1) // (2 * NUM_PARTS) * 2


@kernel
def step_of(word: Any) -> Any:
    """The step, float32, that a word's lowest eight bits say; zero for a constant group."""
    exponent = np.uint32(word & np.uint32(0xFF))
    if exponent == np.uint32(0):
        return np.float32(0)
    if exponent == NO_NUMBER:
        return np.float32(np.nan)
    return np.uint32(np.uint32(exponent + _FIRST) << np.uint32(20)).view(np.float32)


@kernel
def constant_of(word: Any) -> Any:
    """The number that a constant group consists of."""
    return np.uint32(word & _CONSTANT).view(np.float32)


@kernel
def constant_word(number: Any) -> Any:
    """The word of a group that consists of `number`, which loses what the last eight bits of its float32 say."""
    return np.uint32(np.float32(number).view(np.uint32) & _CONSTANT)


@kernel
def grid_of(step: Any, word: Any) -> Any:
    """Scale and low, float32, of the part whose six bits are the lowest of `word`."""
    scale = np.float32(np.int32((word & np.uint32(7)) + np.uint32(1))) * (step * np.float32(0.125))
    low = np.float32(np.int32((word >> np.uint32(3)) & np.uint32(7))) * (step * -LOW_UNIT)
    return scale, low


@kernel
def exponent_at_least(step: Any) -> Any:
    """The eight bits of the smallest step that is not below `step`; the largest for what is above all."""
    if step <= 0:
        return np.uint32(0)
    if step >= step_of(MAX_EXPONENT):
        return MAX_EXPONENT
    bits = np.uint32(np.uint32(np.float32(step).view(np.uint32) + np.uint32(0xFFFFF)) >> np.uint32(20))
    return np.uint32(bits - _FIRST) if bits > _FIRST else np.uint32(1)
