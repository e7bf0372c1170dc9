"""Attention of one new token a row over some pages, compiled by Triton. Imported where Triton is.

A piece is pages of adjoining rows, keys or values [pages, rows, num_kv_heads, page_tokens, head_dim], whose tokens have
adjoining columns of scores. A program has one head of one row of the step, and leaves columns that the row does not see
as they are; what lies in pages behind a row's last token is not read. Sums are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

TOKENS = 16
"""That a program takes at a time."""
FULL_GPU = 8192
"""From so many programs on, one warp each keeps a large GPU at work; of fewer ones each has four. These are two
kernels to compile.
"""
_VARYING = ("first_end", "first_row", "num_rows", "tokens", "columns", "column")
"""Arguments that differ from call to call: no reason to compile anew."""


class Seen(NamedTuple):
    """Which of a piece's tokens the step's rows see."""

    rows: torch.Tensor
    """int64 [n], the rows' places in the GPU batch."""
    ends: torch.Tensor
    """int64 [n], tokens that each row sees, counted from the one that has number -`first_end` in the piece."""
    first_end: int
    first_row: int
    """Of the piece, in the GPU batch."""
    column: int
    """Of the piece's first token."""


def score(query: torch.Tensor, keys: torch.Tensor, scores: torch.Tensor, seen: Seen, scale: float) -> None:
    """query [n, num_heads, head_dim] times a piece's keys, scaled, into scores, float32 [n, num_heads, columns]."""
    count, num_heads, head_dim = query.shape
    grid = (count * num_heads, triton.cdiv(keys.shape[0] * keys.shape[3], TOKENS))
    _score[grid](
        query,
        keys,
        scores,
        scale,
        *_arguments(keys, scores, seen),
        **_constants(keys, num_heads, head_dim),
        num_warps=_num_warps(count * num_heads),
    )


def accumulate(weights: torch.Tensor, values: torch.Tensor, output: torch.Tensor, seen: Seen) -> None:
    """Add weights, float32 [n, num_heads, columns], times the values of a piece to output, float32 [n, num_heads,
    head_dim].
    """
    count, num_heads, head_dim = output.shape
    _accumulate[(count * num_heads,)](
        weights,
        values,
        output,
        *_arguments(values, weights, seen),
        **_constants(values, num_heads, head_dim),
        num_warps=_num_warps(count * num_heads),
    )


def _num_warps(vectors: int) -> int:
    """vectors: heads of all rows, with a program or more each."""
    return 1 if vectors >= FULL_GPU else 4


def _arguments(piece: torch.Tensor, scores: torch.Tensor, seen: Seen) -> tuple[torch.Tensor | int, ...]:
    assert piece.is_contiguous(), piece.stride()
    assert scores.is_contiguous(), scores.stride()
    tokens, columns = piece.shape[0] * piece.shape[3], scores.shape[2]
    return seen.rows, seen.ends, seen.first_end, seen.first_row, piece.shape[1], tokens, columns, seen.column


def _constants(piece: torch.Tensor, num_heads: int, head_dim: int) -> dict[str, int]:
    return {
        "num_heads": num_heads,
        "group": num_heads // piece.shape[2],
        "page_tokens": piece.shape[3],
        "head_dim": head_dim,
        "width": triton.next_power_of_2(head_dim),
        "block": TOKENS,
    }


@triton.jit
def _row_and_tokens(n, rows, ends, first_end, first_row, num_rows, tokens):
    """The row of the piece that the step's row n is, and how many of its tokens that sees; none where it is no row."""
    row = tl.load(rows + n) - first_row
    visible = tl.minimum(tl.load(ends + n) - first_end, tokens)
    return row, tl.where((row >= 0) & (row < num_rows), visible, 0)


@triton.jit
def _place(token, row, num_rows, kv_head, kv_heads: tl.constexpr, page_tokens: tl.constexpr, head_dim: tl.constexpr):
    """Where the numbers of a piece's tokens begin."""
    page = ((token // page_tokens).to(tl.int64) * num_rows + row) * kv_heads + kv_head
    return (page * page_tokens + token % page_tokens) * head_dim


@triton.jit(do_not_specialize=_VARYING)
def _score(
    query,
    keys,
    scores,
    scale,
    rows,
    ends,
    first_end,
    first_row,
    num_rows,
    tokens,
    columns,
    column,
    num_heads: tl.constexpr,
    group: tl.constexpr,
    page_tokens: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    vector, start = tl.program_id(0), tl.program_id(1) * block
    n, head = vector // num_heads, vector % num_heads
    row, visible = _row_and_tokens(n, rows, ends, first_end, first_row, num_rows, tokens)
    if start < visible:
        token, number = start + tl.arange(0, block), tl.arange(0, width)
        seen, inside = token < visible, number < head_dim
        place = _place(token, row, num_rows, head // group, num_heads // group, page_tokens, head_dim)
        q = tl.load(query + vector * head_dim + number, mask=inside, other=0).to(tl.float32)
        key = tl.load(keys + place[:, None] + number[None, :], mask=seen[:, None] & inside[None, :], other=0)
        products = tl.sum(key.to(tl.float32) * q[None, :], 1) * scale
        tl.store(scores + vector.to(tl.int64) * columns + column + token, products, mask=seen)


@triton.jit(do_not_specialize=_VARYING)
def _accumulate(
    weights,
    values,
    output,
    rows,
    ends,
    first_end,
    first_row,
    num_rows,
    tokens,
    columns,
    column,
    num_heads: tl.constexpr,
    group: tl.constexpr,
    page_tokens: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    vector, number = tl.program_id(0), tl.arange(0, width)
    n, head, inside = vector // num_heads, vector % num_heads, number < head_dim
    row, visible = _row_and_tokens(n, rows, ends, first_end, first_row, num_rows, tokens)
    if visible > 0:
        sums = tl.zeros((block, width), tl.float32)
        for start in range(0, visible, block):
            token = start + tl.arange(0, block)
            seen = token < visible
            place = _place(token, row, num_rows, head // group, num_heads // group, page_tokens, head_dim)
            weight = tl.load(weights + vector.to(tl.int64) * columns + column + token, mask=seen, other=0)
            value = tl.load(values + place[:, None] + number[None, :], mask=seen[:, None] & inside[None, :], other=0)
            sums += value.to(tl.float32) * weight[:, None]
        target = output + vector * head_dim + number
        tl.store(target, tl.load(target, mask=inside, other=0) + tl.sum(sums, 0), mask=inside)
