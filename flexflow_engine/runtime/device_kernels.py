"""One new token a row on pages in a GPU's memory: cached, and attended to, by kernels that Triton compiles.

A tile's pages lie in parts, rectangles of plain or encoded pages [pages, rows, page_nbytes]. A table, int64, has a line
for each: address of its keys, of its values, first_row, stop_row, first_token, stop_token, whether tokens are written
in place. Tail pages are plain: [tail rows, num_kv_heads, page_tokens, head_dim]. Of each row of the step, int64 [n],
`rows` has the place in the GPU batch, `paged` and `tails` how many tokens it sees in pages and in its tail page, the
new one among them: the last in the tail page, if it sees any there.

A program has one head of one row. What lies in pages behind a row's last token is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flexflow_engine.abc.codec import DeviceDecoder
from flexflow_engine.gpu.launching import Launcher

LINE = tl.constexpr(7)
"""Numbers of the table for each part."""
FULL_GPU = 8192
"""From so many programs on, one warp each keeps a large GPU at work; of fewer ones each has four. These are two
kernels to compile.
"""
_EIGHT = tl.constexpr(8)
"""Adjoining numbers that are read at once."""
_LOG2_E = tl.constexpr(1.4426950408889634)
_LEAST = tl.constexpr(-3.4e38)
"""Of scores, and still a number: two of them can be subtracted."""
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float16, torch.bfloat16)}

Places = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""`rows`, `paged` and `tails`."""


class AttendingShape(NamedTuple):
    """What attending is compiled for."""

    num_heads: int
    group: int
    """Heads that share keys."""
    page_tokens: int
    head_dim: int
    runs: int
    """Of eight numbers that a head has, rounded up to a power of two."""
    page_nbytes: int
    alignment: int
    """Bytes that addresses of pages are multiples of."""
    tail_alignment: int
    decode: Any
    """A `DeviceDecoder`'s; None where pages are plain."""
    settings: tuple[int, ...]
    tailed: bool
    """Whether there are tail pages."""
    lanes: int
    """Tokens that a program takes side by side."""


class AppendingShape(NamedTuple):
    """What appending is compiled for."""

    num_kv_heads: int
    page_tokens: int
    head_dim: int
    width: int
    page_nbytes: int
    largest: float
    """Number of the dtype."""


class TileKernels:
    """The kernels for one tile's cache, and what they are told of it."""

    def __init__(
        self,
        table: torch.Tensor,
        addresses: Sequence[int],
        *,
        num_heads: int,
        page: tuple[int, int, int],
        page_nbytes: int,
        decoder: DeviceDecoder | None,
        tails: tuple[torch.Tensor, torch.Tensor] | None,
        first_tail_row: int,
    ) -> None:
        """table: int64 [parts, LINE], on the GPU. addresses: those in it. page: num_kv_heads, page_tokens, head_dim.
        decoder: None where pages are plain. tails: keys and values.
        """
        num_kv_heads, page_tokens, head_dim = page
        decode, settings = (None, ()) if decoder is None else (decoder.function, decoder.settings)
        self._table, self._tails = table, tails
        self._numbers = table.shape[0], first_tail_row
        runs = triton.next_power_of_2(-(-head_dim // 8))
        tail_nbytes = num_kv_heads * page_tokens * head_dim * (2 if tails is None else tails[0].itemsize)
        self._many, self._few = (
            AttendingShape(
                num_heads=num_heads,
                group=num_heads // num_kv_heads,
                page_tokens=page_tokens,
                head_dim=head_dim,
                runs=runs,
                page_nbytes=page_nbytes,
                alignment=gcd(16, page_nbytes, *addresses),
                tail_alignment=gcd(16, tail_nbytes, *(tensor.data_ptr() for tensor in tails or ())),
                decode=decode,
                settings=settings,
                tailed=tails is not None,
                lanes=max(1, 32 * num_warps // runs),
            )
            for num_warps in (1, 4)
        )
        self._appending = num_kv_heads, page_tokens, head_dim, triton.next_power_of_2(head_dim), page_nbytes

    def attend(self, query: torch.Tensor, output: torch.Tensor, places: Places, scale: float) -> None:
        """query and output [n, num_heads, head_dim], contiguous, of one dtype; they may be the same memory."""
        vectors, tails = query.shape[0] * query.shape[1], self._tails or (query, query)
        _ATTEND(
            (vectors, 1, 1),
            (query, output, *tails, self._table, *places),
            (*self._numbers, scale),
            self._many if vectors >= FULL_GPU else self._few,
            num_warps=1 if vectors >= FULL_GPU else 4,
        )

    def append(self, keys: torch.Tensor, values: torch.Tensor, places: Places) -> None:
        """Write keys and values [n, num_kv_heads, head_dim], contiguous, of one new token a row, made finite, to its
        tail page or into the page of a part that takes tokens.
        """
        tensors = keys, values, *(self._tails or (keys, values)), self._table, *places
        shape = AppendingShape(*self._appending, _LARGEST[keys.dtype])
        _APPEND((keys.shape[0] * keys.shape[1], 1, 1), tensors, self._numbers, shape, num_warps=1)


@triton.jit(do_not_specialize=("num_parts", "first_tail_row"))
def _attend(
    query,
    output,
    tail_keys,
    tail_values,
    table,
    rows,
    paged,
    tails,
    num_parts,
    first_tail_row,
    scale,
    num_heads: tl.constexpr,
    group: tl.constexpr,
    page_tokens: tl.constexpr,
    head_dim: tl.constexpr,
    runs: tl.constexpr,
    page_nbytes: tl.constexpr,
    alignment: tl.constexpr,
    tail_alignment: tl.constexpr,
    decode: tl.constexpr,
    settings: tl.constexpr,
    tailed: tl.constexpr,
    lanes: tl.constexpr,
):
    """softmax(scale * q k^T) v, in one pass over keys and values: each of `lanes` places takes every lanes-th token and
    keeps its largest score, and sums relative to it (Milakov, Gimelshein 2018, arXiv 1805.02867); at the end they are
    joined. Scores are of base 2.
    """
    vector = tl.program_id(0).to(tl.int64)
    n, head = vector // num_heads, ((vector % num_heads) // group).to(tl.int32)
    run, lane = tl.arange(0, runs) * _EIGHT, tl.arange(0, lanes)
    number = run[:, None] + tl.arange(0, _EIGHT)[None, :]
    inside = number < head_dim
    q = tl.load(query + vector * head_dim + number, mask=inside, other=0).to(tl.float32) * (scale * _LOG2_E)
    row, seen = tl.load(rows + n).to(tl.int32), tl.load(paged + n).to(tl.int32)
    dtype: tl.constexpr = query.dtype.element_ty
    largest = tl.full((lanes,), _LEAST, tl.float32)
    total = tl.zeros((lanes,), tl.float32)
    sums = tl.zeros((lanes, runs, _EIGHT), tl.float32)
    for part in range(num_parts):
        keys, values, first_row, stop_row, first_token, stop_token, _ = _line(table, part)
        here = (row >= first_row) & (row < stop_row)
        visible = tl.where(here, tl.minimum(seen, stop_token) - first_token, 0)
        shape: tl.constexpr = (page_tokens, head_dim, page_nbytes, dtype, decode, settings, alignment)
        for start in range(0, visible, 4 * lanes):
            place = head, start + lane, visible, row - first_row, stop_row - first_row
            largest, total, sums = _take_four(largest, total, sums, q, keys, values, place, run, shape)
    if tailed:
        visible = tl.load(tails + n).to(tl.int32)
        tail_nbytes: tl.constexpr = num_heads // group * page_tokens * head_dim * (dtype.primitive_bitwidth // 8)
        tail_shape: tl.constexpr = (page_tokens, head_dim, tail_nbytes, dtype, None, (), tail_alignment)
        keys, values = tail_keys.to(tl.int64), tail_values.to(tl.int64)
        for start in range(0, visible, 4 * lanes):
            place = head, start + lane, visible, row - first_tail_row, 0
            largest, total, sums = _take_four(largest, total, sums, q, keys, values, place, run, tail_shape)
    weight = tl.exp2(largest - tl.max(largest, 0))
    attended = tl.sum(sums * weight[:, None, None], 0) / tl.sum(total * weight, 0)
    tl.store(output + vector * head_dim + number, attended.to(dtype), mask=inside)


@triton.jit
def _line(table, part):
    """Of a part, in the order of the table: addresses are int64, rows and tokens int32."""
    line = table + part * LINE
    keys, values = tl.load(line), tl.load(line + 1)
    first_row, stop_row = tl.load(line + 2).to(tl.int32), tl.load(line + 3).to(tl.int32)
    first_token, stop_token = tl.load(line + 4).to(tl.int32), tl.load(line + 5).to(tl.int32)
    return keys, values, first_row, stop_row, first_token, stop_token, tl.load(line + 6)


@triton.jit
def _take_four(largest, total, sums, q, keys, values, place, run, shape: tl.constexpr):
    """Each place takes four more tokens, as far as there are so many: what four loads wait for is waited for once."""
    head, token, visible, row, page_rows = place
    lanes: tl.constexpr = token.shape[0]
    at_0, first_0, mask_0 = _where(head, token, visible, row, page_rows, run, shape)
    at_1, first_1, mask_1 = _where(head, token + lanes, visible, row, page_rows, run, shape)
    at_2, first_2, mask_2 = _where(head, token + 2 * lanes, visible, row, page_rows, run, shape)
    at_3, first_3, mask_3 = _where(head, token + 3 * lanes, visible, row, page_rows, run, shape)
    score_0 = _score(q, _numbers(keys, at_0, first_0, mask_0, shape), token < visible)
    score_1 = _score(q, _numbers(keys, at_1, first_1, mask_1, shape), token + lanes < visible)
    score_2 = _score(q, _numbers(keys, at_2, first_2, mask_2, shape), token + 2 * lanes < visible)
    score_3 = _score(q, _numbers(keys, at_3, first_3, mask_3, shape), token + 3 * lanes < visible)
    larger = tl.maximum(tl.maximum(score_0, score_1), tl.maximum(score_2, score_3))
    larger = tl.maximum(largest, larger)
    before = tl.exp2(largest - larger)
    weight_0, weight_1 = tl.exp2(score_0 - larger), tl.exp2(score_1 - larger)
    weight_2, weight_3 = tl.exp2(score_2 - larger), tl.exp2(score_3 - larger)
    total = total * before + ((weight_0 + weight_1) + (weight_2 + weight_3))
    sums = sums * before[:, None, None]
    sums += _numbers(values, at_0, first_0, mask_0, shape) * weight_0[:, None, None]
    sums += _numbers(values, at_1, first_1, mask_1, shape) * weight_1[:, None, None]
    sums += _numbers(values, at_2, first_2, mask_2, shape) * weight_2[:, None, None]
    sums += _numbers(values, at_3, first_3, mask_3, shape) * weight_3[:, None, None]
    return larger, total, sums


@triton.jit
def _where(head, token, visible, row, page_rows, run, shape: tl.constexpr):
    """Of tokens [lanes] of a row of a part: the bytes before their pages, int64 [lanes]; the numbers within a page at
    which the head's eights begin, int32 [lanes, runs]; and which of these there are.
    """
    page_tokens: tl.constexpr = shape[0]
    head_dim: tl.constexpr = shape[1]
    page_nbytes: tl.constexpr = shape[2]
    page = (token // page_tokens * page_rows + row).to(tl.int64) * page_nbytes
    first = ((head * page_tokens + token % page_tokens) * head_dim)[:, None] + run[None, :]
    return page, first, (token < visible)[:, None] & (run < head_dim)[None, :]


@triton.jit
def _numbers(address, page, first, mask, shape: tl.constexpr):
    """Eight numbers each from number `first` on of pages that lie `page` bytes behind an address: float32
    [lanes, runs, 8].
    """
    head_dim: tl.constexpr = shape[1]
    dtype: tl.constexpr = shape[3]
    decode: tl.constexpr = shape[4]
    settings: tl.constexpr = shape[5]
    within = tl.arange(0, _EIGHT)[None, None, :]
    alignment: tl.constexpr = shape[6]
    if decode is None:
        pointer = tl.multiple_of((address + page).to(tl.pointer_type(dtype)), alignment)
        pointer = pointer[:, None, None] + (first[:, :, None] + within)
        real = mask[:, :, None]
        if head_dim % 8 != 0:
            real = real & (first[:, :, None] % head_dim + within < head_dim)
        number = tl.load(pointer, mask=real, other=0).to(tl.float32)
    else:
        pointer = tl.multiple_of((address + page).to(tl.pointer_type(tl.uint8)), alignment)
        number = decode(pointer[:, None], first, mask, settings)
        if head_dim % 8 != 0:
            number = tl.where(first[:, :, None] % head_dim + within < head_dim, number, 0.0)
    return number


@triton.jit
def _score(q, key, real):
    score = tl.sum(tl.sum(key * q[None, :, :], 2), 1)
    return tl.where(real, tl.where(score < _LEAST, _LEAST, score), float("-inf"))


@triton.jit(do_not_specialize=("num_parts", "first_tail_row"))
def _append(
    keys,
    values,
    tail_keys,
    tail_values,
    table,
    rows,
    paged,
    tails,
    num_parts,
    first_tail_row,
    num_kv_heads: tl.constexpr,
    page_tokens: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    page_nbytes: tl.constexpr,
    largest: tl.constexpr,
):
    vector, number = tl.program_id(0).to(tl.int64), tl.arange(0, width)
    n, head, inside = vector // num_kv_heads, vector % num_kv_heads, number < head_dim
    key = _finite(tl.load(keys + vector * head_dim + number, mask=inside), largest)
    value = _finite(tl.load(values + vector * head_dim + number, mask=inside), largest)
    row, token, tail = tl.load(rows + n), tl.load(paged + n) - 1, tl.load(tails + n)
    if tail > 0:
        place = (((row - first_tail_row) * num_kv_heads + head) * page_tokens + tail - 1) * head_dim + number
        tl.store(tail_keys + place, key, mask=inside)
        tl.store(tail_values + place, value, mask=inside)
    else:
        for part in range(num_parts):
            at_keys, at_values, first_row, stop_row, first_token, stop_token, takes = _line(table, part)
            here = (row >= first_row) & (row < stop_row) & (token >= first_token) & (token < stop_token)
            if here & (takes != 0):
                page = ((token - first_token) // page_tokens * (stop_row - first_row) + row - first_row) * page_nbytes
                place = (head * page_tokens + token % page_tokens) * head_dim + number
                tl.store((at_keys + page).to(tl.pointer_type(keys.dtype.element_ty)) + place, key, mask=inside)
                tl.store((at_values + page).to(tl.pointer_type(keys.dtype.element_ty)) + place, value, mask=inside)


@triton.jit
def _finite(numbers, largest: tl.constexpr):
    """As torch.nan_to_num does."""
    number = numbers.to(tl.float32)
    within = tl.minimum(tl.maximum(number, -largest), largest)
    return tl.where(number == number, within, 0.0).to(numbers.dtype)  # noqa: PLR0124  # NaN is not


_ATTEND, _APPEND = Launcher(_attend), Launcher(_append)
