"""What `on_device` does in many passes over the device's memory, in one. Imported where Triton is.

Decoding gives the very numbers that torch's operators give; of two grids that are about as good, encoding may take the
other one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flexflow_engine.gpu.launching import Launcher
from flexflow_plugins.codecs import part_format
from flexflow_plugins.codecs.part_format import part_size

BYTES = 1024
"""Of codes that one program decodes, about."""
GROUP_SIZE, GROUPS = 64, 16
"""Numbers of a group, and groups that one program encodes."""

ALIGNMENT = tl.constexpr(16)
"""Bytes of addresses, and of sizes that these are made of, for wide accesses."""
MAX_HALF = tl.constexpr(part_format.MAX_HALF)
FIRST_EXPONENT, LAST_EXPONENT = tl.constexpr(part_format.FIRST_EXPONENT), tl.constexpr(part_format.MAX_EXPONENT)
NO_NUMBER = tl.constexpr(part_format.NO_NUMBER)
LEVELS, LOW_UNIT = tl.constexpr(part_format.LEVELS), tl.constexpr(part_format.LOW_UNIT)
DEEPEST = tl.constexpr(float(part_format.DEEPEST))
INSIDE, HUGE = tl.constexpr(part_format.INSIDE), tl.constexpr(part_format.HUGE)


def decodes(encoded: torch.Tensor, start: int, *, words: bool) -> bool:
    """Whether `decode` takes encoded tensors whose settings begin at byte `start`: they must be aligned."""
    return (encoded.data_ptr() + start | encoded.stride(0)) % (4 if words else 2) == 0


def decode(encoded: torch.Tensor, out: torch.Tensor, *, start: int, group_size: int, bits: int, words: bool) -> None:
    """encoded uint8 [n, bytes] into out [n, numbers], contiguous.

    words: whether settings, from byte `start` of a tensor on, are an int32 for each group of group_size numbers
    (version 2), or float16, first all scales and then all lows (version 1).
    """
    count, numbers = out.shape
    form = decoding_constants(group_size, bits, words=words, half=out.dtype == torch.float16)
    groups = -(-numbers // group_size)
    blocks = -(-groups * form.runs // form.block)
    _DECODE((count * blocks, 1, 1), (encoded, out), (start, encoded.stride(0), numbers, groups, blocks), form)


def decoding(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, group_size: int, bits: int, words: bool
) -> Callable[[], None] | None:
    """What decodes all pairs of encoded and out, as `decode` takes them, with one kernel; None where one of them is not
    aligned, or of another dtype.
    """
    target = pairs[0][1]
    form = decoding_constants(group_size, bits, words=words, half=target.dtype == torch.float16)
    lines, first = list[tuple[int, ...]](), 0
    for encoded, out in pairs:
        count, numbers = out.shape
        start, groups = -(-numbers * bits // 8), -(-numbers // group_size)
        blocks = -(-groups * form.runs // form.block)
        line = encoded.data_ptr(), out.data_ptr(), start, encoded.stride(0), numbers
        if out.dtype != target.dtype or any(x % ALIGNMENT.value for x in line):
            return None
        lines.append((*line, groups, blocks, first))
        first += count * blocks
    table = torch.tensor(lines)
    if target.is_cuda:  # from plain memory the caller would wait for all kernels before the copy
        table = table.pin_memory().to(target.device, non_blocking=True)

    tensors = (
        table,
        target,
        *(tensor for pair in pairs for tensor in pair),
    )  # those whose addresses are in the table too

    def decode_all() -> None:
        _DECODE_ALL((first, 1, 1), tensors[:2], (len(lines),), form)

    return decode_all


class DecodingConstants(NamedTuple):
    """Of `_decode`, in its order: how a group's codes are cut into runs that share a grid, and how many runs a program
    has.
    """

    runs: int
    group_nbytes: int
    run_nbytes: int
    width: int
    words: bool
    bits: int
    block: int
    half: bool


@cache
def decoding_constants(group_size: int, bits: int, *, words: bool, half: bool) -> DecodingConstants:
    """half: whether numbers are decoded to float16."""
    run_nbytes = (part_size(group_size) if words else group_size) * bits // 8
    width = triton.next_power_of_2(run_nbytes)
    return DecodingConstants(
        runs=4 if words else 1,
        group_nbytes=group_size * bits // 8,
        run_nbytes=run_nbytes,
        width=width,
        words=words,
        bits=bits,
        block=max(1, BYTES // width),
        half=half,
    )


def fits(values: torch.Tensor, out: torch.Tensor, group_size: int) -> bool:
    """Whether `fit` takes them."""
    whole = group_size == GROUP_SIZE and values.shape[1] % GROUP_SIZE == 0 and values.numel() > 0
    in_words = out.is_contiguous() and out.data_ptr() % 4 == out.stride(0) % 4 == out.storage_offset() % 4 == 0
    return whole and in_words and values.is_contiguous()


def fit(values: torch.Tensor, out: torch.Tensor) -> None:
    """values [n, numbers] into out uint8 [n, nbytes], as group-int4 of version 2."""
    count = values.numel() // GROUP_SIZE
    numbers = count, values.shape[1] // GROUP_SIZE, out.shape[1]
    _FIT((-(-count // GROUPS), 1, 1), (values, out), numbers, (GROUPS,))


@triton.jit
def _decode(
    encoded,
    out,
    start,
    stride,
    numbers,
    groups,
    blocks,
    runs: tl.constexpr,
    group_nbytes: tl.constexpr,
    run_nbytes: tl.constexpr,
    width: tl.constexpr,
    words: tl.constexpr,
    bits: tl.constexpr,
    block: tl.constexpr,
    half: tl.constexpr,
):
    sizes = start, stride, numbers, groups, blocks
    form: tl.constexpr = (runs, group_nbytes, run_nbytes, width, words, bits, block, half)
    _decode_block(tl.program_id(0), encoded, out, sizes, form)


@triton.jit(do_not_specialize=("pairs",))
def _decode_all(
    table,
    like,
    pairs,
    runs: tl.constexpr,
    group_nbytes: tl.constexpr,
    run_nbytes: tl.constexpr,
    width: tl.constexpr,
    words: tl.constexpr,
    bits: tl.constexpr,
    block: tl.constexpr,
    half: tl.constexpr,
):
    """table: int64 [pairs, 8]: addresses of encoded and out, start, stride, numbers, groups, blocks, first program."""
    line, program = table, tl.program_id(0)
    for pair in range(1, pairs):
        line = tl.where(program >= tl.load(table + 8 * pair + 7), table + 8 * pair, line)
    encoded = tl.multiple_of(tl.load(line).to(tl.pointer_type(tl.uint8)), ALIGNMENT)
    out = tl.multiple_of(tl.load(line + 1).to(tl.pointer_type(like.dtype.element_ty)), ALIGNMENT)
    start, stride = tl.multiple_of(tl.load(line + 2), ALIGNMENT), tl.multiple_of(tl.load(line + 3), ALIGNMENT)
    numbers, groups = tl.multiple_of(tl.load(line + 4), ALIGNMENT).to(tl.int32), tl.load(line + 5).to(tl.int32)
    sizes = start.to(tl.int32), stride, numbers, groups, tl.load(line + 6).to(tl.int32)
    form: tl.constexpr = (runs, group_nbytes, run_nbytes, width, words, bits, block, half)
    _decode_block(program - tl.load(line + 7).to(tl.int32), encoded, out, sizes, form)


@triton.jit
def _decode_block(program, encoded, out, sizes, form: tl.constexpr):
    """A program has some runs of codes that share a grid: groups, or the parts of groups; the last may be shorter."""
    start, stride, numbers, groups, blocks = sizes
    runs: tl.constexpr = form[0]
    group_nbytes: tl.constexpr = form[1]
    run_nbytes: tl.constexpr = form[2]
    width: tl.constexpr = form[3]
    words: tl.constexpr = form[4]
    bits: tl.constexpr = form[5]
    block: tl.constexpr = form[6]
    half: tl.constexpr = form[7]
    row, run = (program // blocks).to(tl.int64), program % blocks * block + tl.arange(0, block)
    group, part = run // runs, run % runs
    tensor = encoded + row * stride
    scale, low = _grid(_settings(tensor + start, words), group, part, group < groups, groups, words)
    begin, column = group * group_nbytes + part * run_nbytes, tl.arange(0, width)
    at = begin[:, None] + column[None, :]
    inside = at < start
    end = tl.minimum(group_nbytes - part * run_nbytes, run_nbytes)
    if width * runs != group_nbytes:
        inside = inside & (column[None, :] < end[:, None])
    code = tl.load(tensor + at, mask=inside, other=0)
    if bits == 4:
        even = low[:, None] + (code & 15).to(tl.float32) * scale[:, None]
        odd = low[:, None] + (code >> 4).to(tl.float32) * scale[:, None]
        number, column = tl.interleave(even, odd), tl.arange(0, 2 * width)
        at = 2 * begin[:, None] + column[None, :]
        inside = at < numbers
        if width * runs != group_nbytes:
            inside = inside & (column[None, :] < 2 * end[:, None])
    else:
        number = low[:, None] + code.to(tl.float32) * scale[:, None]
    if half:
        number = tl.where(number > MAX_HALF, MAX_HALF, tl.where(number < -MAX_HALF, -MAX_HALF, number))
    tl.store(out + row * numbers + at, number.to(out.dtype.element_ty), mask=inside)


@triton.jit
def eight_numbers(encoded, first, mask, settings: tl.constexpr):
    """What a `DeviceDecoder` calls, where each eight numbers share a grid and their codes are aligned."""
    bits: tl.constexpr = settings[0]
    group_size: tl.constexpr = settings[1]
    words: tl.constexpr = settings[2]
    numbers: tl.constexpr = settings[3]
    part_size: tl.constexpr = settings[4]
    within = tl.arange(0, 8)[None, None, :]
    if bits == 4:
        word = tl.load((encoded + first // 2).to(tl.pointer_type(tl.int32)), mask=mask, other=0)
        code = _eight_codes(word)
    else:
        code = tl.load((encoded + first)[:, :, None] + within, mask=mask[:, :, None], other=0)
    group, part = first // group_size, first % group_size // part_size
    scale, low = _grid_of(encoded, group, part, mask, bits, group_size, words, numbers)
    return low[:, :, None] + code.to(tl.float32) * scale[:, :, None]


@triton.jit
def _eight_codes(word):
    """The codes of 4 bits in words [tokens, runs]: [tokens, runs, 8], joined so that a thread keeps its words' own."""
    even = tl.join(tl.join(word & 15, (word >> 16) & 15), tl.join((word >> 8) & 15, (word >> 24) & 15))
    odd = tl.join(tl.join((word >> 4) & 15, (word >> 20) & 15), tl.join((word >> 12) & 15, (word >> 28) & 15))
    return tl.reshape(tl.join(even, odd), (word.shape[0], word.shape[1], 8))


@triton.jit
def any_eight_numbers(encoded, first, mask, settings: tl.constexpr):
    """The same wherever the numbers and their codes lie."""
    bits: tl.constexpr = settings[0]
    group_size: tl.constexpr = settings[1]
    words: tl.constexpr = settings[2]
    numbers: tl.constexpr = settings[3]
    part_size: tl.constexpr = settings[4]
    number = first[:, :, None] + tl.arange(0, 8)[None, None, :]
    real = mask[:, :, None] & (number < numbers)
    code = tl.load(encoded[:, :, None] + number * bits // 8, mask=real, other=0).to(tl.int32)
    if bits == 4:
        code = (code >> (number % 2 * 4).to(tl.int32)) & 15
    group, part = number // group_size, number % group_size // part_size
    scale, low = _grid_of(encoded[:, :, None], group, part, real, bits, group_size, words, numbers)
    return low + code.to(tl.float32) * scale


@triton.jit
def _grid_of(
    encoded,
    group,
    part,
    mask,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    words: tl.constexpr,
    numbers: tl.constexpr,
):
    """Scale and low of parts of groups of encoded tensors."""
    settings = _settings(encoded + (numbers * bits + 7) // 8, words)
    return _grid(settings, group, part, mask, (numbers + group_size - 1) // group_size, words)


@triton.jit
def _settings(address, words: tl.constexpr):
    return address.to(tl.pointer_type(tl.int32 if words else tl.float16))


@triton.jit
def _grid(settings, group, part, real, groups, words: tl.constexpr):
    """Scale and low, float32, of parts of groups; NaN where a group is damaged, 0 where it is not real."""
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
def _fit(values, out, count, row_groups, row_nbytes, num_groups: tl.constexpr):
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
    words = out.to(tl.pointer_type(tl.int32))
    tl.store(words + (row * row_nbytes + row_groups * 32) // 4 + at, word, mask=real)


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


_DECODE, _DECODE_ALL, _FIT = Launcher(_decode), Launcher(_decode_all), Launcher(_fit)
