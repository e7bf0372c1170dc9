"""One new token a row on pages in a GPU's memory: cached, and attended to, by kernels that Triton compiles.

A tile's pages lie in parts, rectangles of plain or encoded pages [pages, rows, page_nbytes]. A table, int64, has a line
for each: address of its keys, of its values, first_row, stop_row, first_token, stop_token, whether tokens are written
in place. Tail pages are plain: [tail rows, num_kv_heads, page_tokens, head_dim]. Of each row of the step, int64 [n],
`rows` has the place in the GPU batch, `paged` and `tails` how many tokens it sees in pages and in its tail page, the
new one among them: the last in the tail page, if it sees any there.

A program has one head of one row. What lies in pages behind a row's last token is not read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flexflow_engine.abc.codec import DeviceDecoder
from flexflow_engine.gpu.launching import Launcher

LINE = 7
"""Numbers of the table for each part."""
TOKENS = 16
"""That a program takes at a time."""
FULL_GPU = 8192
"""From so many programs on, one warp each keeps a large GPU at work; of fewer ones each has four. These are two
kernels to compile.
"""
_EIGHT = tl.constexpr(8)
"""Adjoining numbers that are read at once."""
_LEAST = tl.constexpr(-1e30)
"""Below any score, and still a number: two of them can be subtracted."""
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
    decode: Any
    """A `DeviceDecoder`'s; None where pages are plain."""
    settings: tuple[int, ...]
    tailed: bool
    """Whether there are tail pages."""
    block: int


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
        *,
        num_heads: int,
        page: tuple[int, int, int],
        page_nbytes: int,
        decoder: DeviceDecoder | None,
        tails: tuple[torch.Tensor, torch.Tensor] | None,
        first_tail_row: int,
    ) -> None:
        """table: int64 [parts, LINE], on the GPU. page: num_kv_heads, page_tokens, head_dim. decoder: None where pages
        are plain. tails: keys and values.
        """
        num_kv_heads, page_tokens, head_dim = page
        decode, settings = (None, ()) if decoder is None else (decoder.function, decoder.settings)
        self._table, self._tails = table, tails
        self._numbers = table.shape[0], first_tail_row
        self._attending = AttendingShape(
            num_heads=num_heads,
            group=num_heads // num_kv_heads,
            page_tokens=page_tokens,
            head_dim=head_dim,
            runs=triton.next_power_of_2(-(-head_dim // 8)),
            page_nbytes=page_nbytes,
            decode=decode,
            settings=settings,
            tailed=tails is not None,
            block=TOKENS,
        )
        self._appending = num_kv_heads, page_tokens, head_dim, triton.next_power_of_2(head_dim), page_nbytes

    def attend(self, query: torch.Tensor, output: torch.Tensor, places: Places, scale: float) -> None:
        """query and output [n, num_heads, head_dim], contiguous, of one dtype; they may be the same memory."""
        vectors, tails = query.shape[0] * query.shape[1], self._tails or (query, query)
        _ATTEND(
            (vectors, 1, 1),
            (query, output, *tails, self._table, *places),
            (*self._numbers, scale),
            self._attending,
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
    decode: tl.constexpr,
    settings: tl.constexpr,
    tailed: tl.constexpr,
    block: tl.constexpr,
):
    """softmax(scale * q k^T) v, in one pass: each of `block` places keeps the sums of the tokens that it took, and its
    largest score, as long as there are more (Milakov, Gimelshein 2018, arXiv 1805.02867); at the end they are joined.
    """
    vector = tl.program_id(0).to(tl.int64)
    n, head = vector // num_heads, (vector % num_heads) // group
    run, within = tl.arange(0, runs) * _EIGHT, tl.arange(0, _EIGHT)
    number = run[:, None] + within[None, :]
    inside = number < head_dim
    q = tl.load(query + vector * head_dim + number, mask=inside, other=0).to(tl.float32) * scale
    row, seen = tl.load(rows + n), tl.load(paged + n)
    largest = tl.full((block,), _LEAST, tl.float32)
    total = tl.zeros((block,), tl.float32)
    sums = tl.zeros((block, runs, _EIGHT), tl.float32)
    for part in range(num_parts):
        keys, values, first_row, stop_row, first_token, stop_token, _ = _line(table, part)
        visible = tl.where((row >= first_row) & (row < stop_row), tl.minimum(seen, stop_token) - first_token, 0)
        for start in range(0, visible, block):
            token = start + tl.arange(0, block)
            real = token < visible
            page = ((token // page_tokens) * (stop_row - first_row) + row - first_row) * page_nbytes
            first = ((head * page_tokens + token % page_tokens) * head_dim)[:, None] + run[None, :]
            mask = real[:, None] & (run < head_dim)[None, :]
            key = _numbers(keys, page, first, mask, inside, query.dtype.element_ty, decode, settings)
            value = _numbers(values, page, first, mask, inside, query.dtype.element_ty, decode, settings)
            largest, total, sums = _take(largest, total, sums, q, key, value, real)
    if tailed:
        visible = tl.load(tails + n)
        base = ((row - first_tail_row) * (num_heads // group) + head) * page_tokens * head_dim
        for start in range(0, visible, block):
            token = start + tl.arange(0, block)
            real = token < visible
            place = base + (token * head_dim)[:, None, None] + number[None, :, :]
            mask = real[:, None, None] & inside[None, :, :]
            key = tl.load(tail_keys + place, mask=mask, other=0).to(tl.float32)
            value = tl.load(tail_values + place, mask=mask, other=0).to(tl.float32)
            largest, total, sums = _take(largest, total, sums, q, key, value, real)
    weight = tl.exp(largest - tl.max(largest, 0))
    attended = tl.sum(sums * weight[:, None, None], 0) / tl.sum(total * weight, 0)
    tl.store(output + vector * head_dim + number, attended.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _line(table, part):
    line = table + part * 7
    keys, values = tl.load(line), tl.load(line + 1)
    first_row, stop_row = tl.load(line + 2), tl.load(line + 3)
    return keys, values, first_row, stop_row, tl.load(line + 4), tl.load(line + 5), tl.load(line + 6)


@triton.jit
def _numbers(address, page, first, mask, inside, dtype: tl.constexpr, decode: tl.constexpr, settings: tl.constexpr):
    """Eight numbers each from number `first` on of pages that lie `page` bytes behind an address: float32
    [tokens, runs, 8]. page [tokens]; first, mask [tokens, runs]; inside [runs, 8].
    """
    if decode is None:
        pointer = address.to(tl.pointer_type(dtype)) + (page // (dtype.primitive_bitwidth // 8))[:, None] + first
        number = pointer[:, :, None] + tl.arange(0, 8)[None, None, :]
        return tl.load(number, mask=mask[:, :, None] & inside[None, :, :], other=0).to(tl.float32)
    else:  # noqa: RET505  # Triton compiles no other return behind one
        pointer = address.to(tl.pointer_type(tl.uint8)) + page[:, None]
        return decode(pointer, first, mask, settings)


@triton.jit
def _take(largest, total, sums, q, key, value, real):
    """Each place takes one more token, if that is real."""
    score = tl.where(real, tl.sum(tl.sum(key * q[None, :, :], 2), 1), float("-inf"))
    larger = tl.maximum(largest, score)
    before, weight = tl.exp(largest - larger), tl.exp(score - larger)
    return larger, total * before + weight, sums * before[:, None, None] + value * weight[:, None, None]


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
