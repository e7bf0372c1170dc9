"""The figures of groups of four grids, for every backend: see parts.py. Imports nothing that takes time."""

from __future__ import annotations

NUM_PARTS = 4
LEVELS = 15.0
"""Places between the first of a grid and its last."""
LOW_UNIT = 1.25
"""Of a step: how far the places lie apart that a low may take."""
DEEPEST = 7
"""Of those places, counted down from zero."""
LOW_EIGHTHS = int(8 * LOW_UNIT)
LEAST = -DEEPEST * LOW_EIGHTHS
"""Of the multiples of an eighth of a step that numbers are; the largest is less than 256 above it."""
FIRST_EXPONENT = (127 - 18) * 8
"""What is to be added to a step's eight bits to have the upper bits of its float32."""
MAX_EXPONENT, NO_NUMBER = 254, 255
INSIDE = 0.95
"""Share of a part's range that the scale in the middle of those tried covers."""
HUGE = 1e18
"""Larger numbers are taken for it, so that squares are finite; only a constant group gets even near."""
MAX_HALF = 65504.0

GROUP_SIZE = 64
"""Of groups that a host's processor decodes by vector instructions."""


def part_size(group_size: int) -> int:
    """Numbers a part."""
    return (group_size + 2 * NUM_PARTS - 1) // (2 * NUM_PARTS) * 2
