"""Grids of four parts a group (see parts.py) with torch operators: what words say, and which word to take.

As the kernels' `fit`, but for roundings: the covering step and the one below it, with each of them three scales and
the low that puts the grid in the middle.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_plugins.codecs.part_format import (
    DEEPEST,
    FIRST_EXPONENT,
    HUGE,
    INSIDE,
    LEVELS,
    LOW_UNIT,
    MAX_EXPONENT,
    NO_NUMBER,
    NUM_PARTS,
    part_size,
)


def grids(words: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and low of a group's grids, float32 [n, groups, grids, 1], each of the next `group_size / grids` numbers:
    the four parts, or each number where parts are not alike. words: int32 [n, groups].
    """
    exponent = words & 0xFF
    step = _step(exponent)[:, :, None]
    constant = (words & ~0xFF).view(torch.float32)[:, :, None]
    bits = words[:, :, None] >> torch.arange(8, 32, 6, device=words.device, dtype=torch.int32) & 63
    scale = ((bits & 7) + 1).float() * (step * 0.125)
    low = torch.where(exponent[:, :, None] == 0, constant, (bits >> 3).float() * (step * -LOW_UNIT))
    if part_size(group_size) * NUM_PARTS != group_size:
        scale, low = _for_each(scale, group_size), _for_each(low, group_size)
    return scale[..., None], low[..., None]


def find(numbers: torch.Tensor) -> torch.Tensor:
    """Words int32 [n, groups] for numbers [n, groups, group_size], finite."""
    numbers = numbers.clamp(-HUGE, HUGE)
    columns = _parts(numbers)  # [numbers a part, n, groups, 4]
    smallest, largest = columns.amin(0), columns.amax(0)
    covering = _exponent_at_least(_needed_step(smallest, largest))  # [n, groups]
    words = covering + _packed(_covering_bits(smallest, largest, _step(covering)[:, :, None]))
    least = torch.full_like(smallest[:, :, 0], torch.inf)
    for exponent in (covering - 1, covering):
        bits, errors = _best_parts(columns, (smallest, largest), _step(exponent), farthest=_step(covering))
        error = errors.sum(2)
        better = (exponent > 0) & (error < least)
        words = torch.where(better, exponent + _packed(bits), words)
        least = torch.where(better, error, least)
    constant = numbers[:, :, 0].contiguous().view(torch.int32) & ~0xFF
    return torch.where(covering == 0, constant, words)


def _best_parts(
    columns: torch.Tensor, extremes: tuple[torch.Tensor, torch.Tensor], step: torch.Tensor, *, farthest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Six bits a part and its squared error, infinite where every grid leaves a number farther outside than allowed:
    float32 [n, groups, 4]. step, farthest: [n, groups].
    """
    (smallest, largest), step, farthest = extremes, step[:, :, None], farthest[:, :, None]
    best, least = torch.zeros_like(smallest), torch.full_like(smallest, torch.inf)
    nearest = ((largest - smallest) / step * (8 * INSIDE / LEVELS) + 0.5).floor()
    for change in (-1, 0, 1):
        c = (nearest + change).clamp(1, 8)
        scale = c * (step * 0.125)
        deep = ((scale * (LEVELS / 2) - 0.5 * (smallest + largest)) / (step * LOW_UNIT) + 0.5).floor()
        depth = deep.clamp(0, DEEPEST)
        low = -depth * (step * LOW_UNIT)
        error = _squared_error(columns, scale, low)
        outside = torch.maximum(low - smallest, largest - (low + LEVELS * scale))
        better = (outside <= farthest) & (error < least)
        best = torch.where(better, c - 1 + 8 * depth, best)
        least = torch.where(better, error, least)
    return best, least


def _packed(bits: torch.Tensor) -> torch.Tensor:
    """Six bits of each part, float32 [n, groups, 4], at their places in a word: int32 [n, groups]."""
    places = torch.arange(8, 32, 6, device=bits.device, dtype=torch.int32)
    return (bits.nan_to_num().to(torch.int32) << places).sum(2).to(torch.int32)


def damaged(words: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """`words`, but for groups that are not all `finite` that of no number."""
    return torch.where(finite, words, NO_NUMBER)


def bound(numbers: torch.Tensor) -> torch.Tensor:
    """How far numbers [n, groups, group_size] may be from their places: a covering step, and what no step covers."""
    columns = _parts(numbers)
    smallest, largest = columns.amin(0), columns.amax(0)
    needed = _needed_step(smallest, largest)
    step = _step(_exponent_at_least(needed))[:, :, None]
    constant = numbers.abs() * 2**-15 + (numbers.abs() - HUGE).clamp(min=0)
    lowest = torch.maximum(smallest - step * LOW_UNIT, -step * DEEPEST * LOW_UNIT).clamp(max=0)
    low = _for_each(lowest, numbers.shape[2])
    outside = (low - numbers).clamp(min=0) + (numbers - low - LEVELS * step).clamp(min=0)
    return torch.where(needed[:, :, None] == 0, constant, step + outside + 2**-7 * step)


def _parts(numbers: torch.Tensor) -> torch.Tensor:
    """[n, groups, group_size] as [numbers a part, n, groups, 4], the last number repeated to the end: what is done to
    all numbers of a part is done along the first dimension, where a device's threads read side by side.
    """
    n, groups, size = numbers.shape
    if padding := NUM_PARTS * part_size(size) - size:
        numbers = F.pad(numbers.flatten(0, 1)[:, None], (0, padding), mode="replicate")
    return numbers.view(n, groups, NUM_PARTS, -1).movedim(3, 0).contiguous()


def _for_each(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """Values of parts [n, groups, 4], repeated for each number: [n, groups, group_size]."""
    return values.repeat_interleave(part_size(group_size), dim=2)[:, :, :group_size]


def _step(exponent: torch.Tensor) -> torch.Tensor:
    """float32; zero for exponent 0, NaN for 255."""
    step = ((exponent + FIRST_EXPONENT) << 20).view(torch.float32)
    step = torch.where(exponent == 0, 0.0, step)
    return torch.where(exponent == NO_NUMBER, torch.nan, step)


def _exponent_at_least(step: torch.Tensor) -> torch.Tensor:
    """int32, of the smallest step that is not below `step`; the largest for what is above all."""
    largest = torch.full((), (MAX_EXPONENT + FIRST_EXPONENT) << 20, dtype=torch.int32).view(torch.float32).item()
    bits = step.nan_to_num(largest).clamp(max=largest).contiguous().view(torch.int32)
    return torch.where(step > 0, (((bits + 0xFFFFF) >> 20) - FIRST_EXPONENT).clamp(1, MAX_EXPONENT), 0).to(torch.int32)


def _needed_step(smallest: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """[n, groups]: the least with which grids cover all parts; zero for a constant group. Arguments [n, groups, 4]."""
    below = smallest.clamp(max=0)
    levels = torch.where(below < 0, LEVELS - LOW_UNIT, LEVELS)
    needed = torch.maximum((largest.clamp(min=0) - below) / levels, -below / (DEEPEST * LOW_UNIT)).amax(2)
    return torch.where(smallest.amin(2) == largest.amax(2), 0, needed)


def _covering_bits(smallest: torch.Tensor, largest: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Six bits a part, as float32 [n, groups, 4], of grids that cover the parts, if the step is enough."""
    unit = step * LOW_UNIT
    depth = (-smallest / unit).ceil().clamp(0, DEEPEST)
    c = ((largest + depth * unit) / (LEVELS * step * 0.125)).ceil().clamp(1, 8)
    return c - 1 + 8 * depth


def _squared_error(columns: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """[n, groups, 4]"""
    codes = ((columns - low) / scale).clamp_(0, LEVELS).add_(0.5).floor_()
    return (low + codes * scale - columns).square().sum(0)
