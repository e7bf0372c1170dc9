"""What the 32 bits of a group say of its four grids; see flexflow_plugins.codecs.parts."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexflow_engine.cpu.jit import kernel
from flexflow_plugins.codecs import part_format
from flexflow_plugins.codecs.part_format import DEEPEST

LEVELS, LOW_UNIT = np.float32(part_format.LEVELS), np.float32(part_format.LOW_UNIT)
LOWEST = np.float32(DEEPEST * part_format.LOW_UNIT)
INSIDE, HUGE = np.float32(part_format.INSIDE), np.float32(part_format.HUGE)
MAX_EXPONENT, NO_NUMBER = np.uint32(part_format.MAX_EXPONENT), np.uint32(part_format.NO_NUMBER)
_FIRST = np.uint32(part_format.FIRST_EXPONENT)
_CONSTANT = np.uint32(0xFFFFFF00)

part_size = kernel(part_format.part_size)


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
def has_grids(word: Any) -> Any:
    """Whether a word says grids, and not one number or none."""
    exponent = np.uint32(word & np.uint32(0xFF))
    return np.uint32(0) < exponent <= MAX_EXPONENT


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
