"""What `on_device` does in many passes over the device's memory, in one. Imported where Triton is.

Decoding gives the very numbers that torch's operators give; of two grids that are about as good, encoding may take the
other one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flexflow_plugins.codecs import part_format
from flexflow_plugins.codecs.part_format import part_size

BYTES = 1024
"""Of codes that one program decodes, about."""
GROUP_SIZE, GROUPS = 64, 16
"""Numbers of a group, and groups that one program encodes."""

MAX_HALF = tl.constexpr(part_format.MAX_HALF)
FIRST_EXPONENT, LAST_EXPONENT = tl.constexpr(part_format.FIRST_EXPONENT), tl.constexpr(part_format.MAX_EXPONENT)
NO_NUMBER = tl.constexpr(part_format.NO_NUMBER)
LEVELS, LOW_UNIT = tl.constexpr(part_format.LEVELS), tl.constexpr(part_format.LOW_UNIT)
DEEPEST = tl.constexpr(float(part_format.DEEPEST))
INSIDE, HUGE = tl.constexpr(part_format.INSIDE), tl.constexpr(part_format.HUGE)


def decode(codes: torch.Tensor, settings: torch.Tensor, out: torch.Tensor, *, group_size: int, bits: int) -> None:
    """codes uint8 [n, bytes] into out [n, numbers]; the bytes, settings and numbers of a tensor adjoin.

    settings: of groups of group_size numbers each, int32 [n, groups] with a word of version 2, or float16
    [n, 2 * groups] with the scales and then the lows of version 1.
    """
    numbers, code_nbytes, words = out.shape[1], codes.shape[1], settings.dtype == torch.int32
    form = decoding_constants(group_size, bits, words=words)
    groups = triton.cdiv(numbers, group_size)
    blocks = triton.cdiv(groups * form["runs"], form["block"])
    _decode[(len(out) * blocks,)](
        codes,
        settings,
        out,
        codes.stride(0),
        settings.stride(0),
        out.stride(0),
        code_nbytes,
        numbers,
        groups,
        blocks,
        **form,
        half=out.dtype == torch.float16,
    )


def decoding_constants(group_size: int, bits: int, *, words: bool) -> dict[str, int]:
    """Of `_decode`: how a group's codes are cut into runs that share a grid, and how many runs a program has."""
    run_nbytes = (part_size(group_size) if words else group_size) * bits // 8
    width = triton.next_power_of_2(run_nbytes)
    return {
        "runs": 4 if words else 1,
        "group_nbytes": group_size * bits // 8,
        "run_nbytes": run_nbytes,
        "width": width,
        "words": words,
        "bits": bits,
        "block": max(1, BYTES // width),
    }


def fits(values: torch.Tensor, out: torch.Tensor, group_size: int) -> bool:
    """Whether `fit` takes them."""
    whole = group_size == GROUP_SIZE and values.shape[1] % GROUP_SIZE == 0 and values.numel() > 0
    in_words = out.is_contiguous() and out.data_ptr() % 4 == out.stride(0) % 4 == out.storage_offset() % 4 == 0
    return whole and in_words and values.is_contiguous()


def fit(values: torch.Tensor, out: torch.Tensor) -> None:
    """values [n, numbers] into out uint8 [n, nbytes], as group-int4 of version 2."""
    count = values.numel() // GROUP_SIZE
    _fit[(triton.cdiv(count, GROUPS),)](
        values, out, out.view(torch.int32), count, values.shape[1] // GROUP_SIZE, out.shape[1], num_groups=GROUPS
    )


@triton.jit
def _decode(
    codes,
    settings,
    out,
    code_stride,
    setting_stride,
    out_stride,
    code_nbytes,
    numbers,
    groups,
    blocks,
    runs: tl.constexpr,
    group_nbytes: tl.constexpr,
    run_nbytes: tl.constexpr,
    width: tl.constexpr,
    words: tl.constexpr,
    bits: tl.constexpr,
    half: tl.constexpr,
    block: tl.constexpr,
):
    """A program has some runs of codes that share a grid: groups, or the parts of groups; the last may be shorter."""
    row, run = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * block + tl.arange(0, block)
    group, part = run // runs, run % runs
    scale, low = _grid(settings + row * setting_stride, group, part, groups, words)
    start, column = group * group_nbytes + part * run_nbytes, tl.arange(0, width)
    at = start[:, None] + column[None, :]
    inside = at < code_nbytes
    end = tl.minimum(group_nbytes - part * run_nbytes, run_nbytes)
    if width * runs != group_nbytes:
        inside = inside & (column[None, :] < end[:, None])
    code = tl.load(codes + row * code_stride + at, mask=inside, other=0)
    if bits == 4:
        even = low[:, None] + (code & 15).to(tl.float32) * scale[:, None]
        odd = low[:, None] + (code >> 4).to(tl.float32) * scale[:, None]
        number, column = tl.interleave(even, odd), tl.arange(0, 2 * width)
        at = 2 * start[:, None] + column[None, :]
        inside = at < numbers
        if width * runs != group_nbytes:
            inside = inside & (column[None, :] < 2 * end[:, None])
    else:
        number = low[:, None] + code.to(tl.float32) * scale[:, None]
    if half:
        number = tl.where(number > MAX_HALF, MAX_HALF, tl.where(number < -MAX_HALF, -MAX_HALF, number))
    tl.store(out + row * out_stride + at, number.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _grid(settings, group, part, groups, words: tl.constexpr):
    """Scale and low, float32, of parts of groups; NaN where a group is damaged."""
    real = group < groups
    if words:
        word = tl.load(settings + group, mask=real, other=0)
        exponent = word & 0xFF
        step = ((exponent + FIRST_EXPONENT) << 20).to(tl.float32, bitcast=True)
        step = tl.where(exponent == 0, 0.0, tl.where(exponent == NO_NUMBER, float("nan"), step))
        six = (word >> (8 + 6 * part)) & 63
        scale = ((six & 7) + 1).to(tl.float32) * (step * 0.125)
        low = (six >> 3).to(tl.float32) * (step * -LOW_UNIT)
        low = tl.where(exponent == 0, (word & ~0xFF).to(tl.float32, bitcast=True), low)
    else:
        scale = tl.load(settings + group, mask=real, other=0).to(tl.float32)
        low = tl.load(settings + groups + group, mask=real, other=0).to(tl.float32)
    return scale, low


@triton.jit
def _fit(values, out, out_words, count, row_groups, row_nbytes, num_groups: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * num_groups + tl.arange(0, num_groups)
    real = group < count
    numbers = tl.load(values + group[:, None] * 64 + tl.arange(0, 64)[None, :], mask=real[:, None], other=0).to(
        tl.float32
    )
    damaged = tl.max((tl.abs(numbers) < float("inf")).to(tl.int32) ^ 1, 1) > 0
    numbers = tl.where(damaged[:, None], 0.0, numbers)
    numbers = tl.minimum(tl.maximum(numbers, -HUGE), HUGE)
    columns = tl.reshape(numbers, (num_groups * 4, 16))
    smallest, largest = tl.min(columns, 1), tl.max(columns, 1)  # of the four parts of each group
    constant = _of_group(smallest, num_groups, False) == _of_group(largest, num_groups, True)
    below = tl.minimum(smallest, 0.0)
    levels = tl.where(below < 0, LEVELS - LOW_UNIT, LEVELS)
    needed = tl.maximum((tl.maximum(largest, 0.0) - below) / levels, -below / (DEEPEST * LOW_UNIT))
    needed = tl.where(constant, 0.0, _of_group(needed, num_groups, True))
    exponent = ((needed.to(tl.int32, bitcast=True) + 0xFFFFF) >> 20) - FIRST_EXPONENT
    exponent = tl.where(needed > 0, tl.minimum(tl.maximum(exponent, 1), LAST_EXPONENT), 0)
    farthest = _step(exponent, num_groups)
    depth = _within(tl.ceil(-smallest / (farthest * LOW_UNIT)), 0.0, DEEPEST)
    steps = _within(tl.ceil((largest + depth * (farthest * LOW_UNIT)) / (LEVELS * farthest * 0.125)), 1.0, 8.0)
    chosen, fewest = exponent, tl.full((num_groups,), float("inf"), tl.float32)
    for above in tl.static_range(-1, 1):
        tried = exponent + above
        step = _step(tried, num_groups)
        best_depth, best_steps, least = _best_parts(columns, smallest, largest, step, farthest)
        error = tl.sum(tl.reshape(least, (num_groups, 4)), 1)
        fewer = (tried > 0) & (error < fewest)
        of_parts = _for_parts(fewer.to(tl.int32), num_groups) > 0
        depth, steps = tl.where(of_parts, best_depth, depth), tl.where(of_parts, best_steps, steps)
        chosen, fewest = tl.where(fewer, tried, chosen), tl.where(fewer, error, fewest)
    step = _step(chosen, num_groups)
    scale, low = steps * (step * 0.125), -depth * (step * LOW_UNIT)
    places = tl.floor(_within((columns - low[:, None]) / scale[:, None], 0.0, LEVELS) + 0.5)
    code = tl.reshape(places.to(tl.int32), (num_groups, 64))
    code = tl.where((exponent == 0)[:, None], 0, code)
    even, odd = tl.split(tl.reshape(code, (num_groups, 32, 2)))
    row, at = group // row_groups, group % row_groups
    target = out + (row * row_nbytes + at * 32)[:, None] + tl.arange(0, 32)[None, :]
    tl.store(target, (even | (odd << 4)).to(tl.uint8), mask=real[:, None])
    six = tl.reshape((steps - 1 + 8 * depth).to(tl.int32), (num_groups, 4)) << (8 + 6 * tl.arange(0, 4))[None, :]
    word = chosen + tl.sum(six, 1)
    first = tl.sum(tl.where(tl.arange(0, 64)[None, :] == 0, numbers, 0.0), 1)
    word = tl.where(exponent == 0, first.to(tl.int32, bitcast=True) & ~0xFF, word)
    word = tl.where(damaged, NO_NUMBER, word)
    tl.store(out_words + (row * row_nbytes + row_groups * 32) // 4 + at, word, mask=real)


@triton.jit
def _of_group(parts, num_groups: tl.constexpr, of_largest: tl.constexpr):
    four = tl.reshape(parts, (num_groups, 4))
    return tl.max(four, 1) if of_largest else tl.min(four, 1)


@triton.jit
def _best_parts(columns, smallest, largest, step, farthest):
    """Of three grids a part the one that errs least: how deep it begins, eighths of the step, squared error."""
    depth, steps, least = smallest * 0, smallest * 0 + 1, smallest * 0 + float("inf")
    nearest = tl.floor((largest - smallest) / step * (8 * INSIDE / LEVELS) + 0.5)
    for change in tl.static_range(-1, 2):
        c = _within(nearest + change, 1.0, 8.0)
        scale = c * (step * 0.125)
        deep = tl.floor((scale * (LEVELS / 2) - 0.5 * (smallest + largest)) / (step * LOW_UNIT) + 0.5)
        deep = _within(deep, 0.0, DEEPEST)
        low = -deep * (step * LOW_UNIT)
        places = tl.floor(_within((columns - low[:, None]) / scale[:, None], 0.0, LEVELS) + 0.5)
        missed = low[:, None] + places * scale[:, None] - columns
        error = tl.sum(missed * missed, 1)
        outside = tl.maximum(low - smallest, largest - (low + LEVELS * scale))
        better = (outside <= farthest) & (error < least)
        depth, steps = tl.where(better, deep, depth), tl.where(better, c, steps)
        least = tl.where(better, error, least)
    return depth, steps, least


@triton.jit
def _step(exponent, num_groups: tl.constexpr):
    """Of each part of the groups with these exponents; some step for those that have none."""
    return _for_parts(((tl.maximum(exponent, 1) + FIRST_EXPONENT) << 20).to(tl.float32, bitcast=True), num_groups)


@triton.jit
def _for_parts(values, num_groups: tl.constexpr):
    return tl.reshape(tl.broadcast_to(values[:, None], (num_groups, 4)), (num_groups * 4,))


@triton.jit
def _within(numbers, least, most):
    return tl.minimum(tl.maximum(numbers, least), most)
