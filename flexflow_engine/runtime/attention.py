"""Causal attention over one tile: of prompts over themselves, and of one new token a row over its cached pages.

Scores are softmax(scale * q k^T) v (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1), computed in float32 from
products in the cache's own format. Queries may share keys (grouped-query attention): num_heads is a multiple of
num_kv_heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby
from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.abc.step import RowStep
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.runtime.kv_cache import TileCache
from flexflow_engine.runtime.token_places import TokenPlaces


def attend_prompts(
    rows: Sequence[RowStep],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    workers: Workers | None = None,
) -> torch.Tensor:
    """q [N, num_heads, head_dim], k and v [N, num_kv_heads, head_dim], the rows' tokens one row after another ->
    [N, num_heads * head_dim]. workers: that share the prompts, in host memory; without them adjoining prompts of one
    length share a kernel call.
    """
    attended, (num_heads, num_kv_heads) = torch.empty_like(q), (q.shape[1], k.shape[1])

    def attend(call: PromptCall) -> None:
        some_q, some_k, some_v = (call.of(x, num_kv_heads) for x in (q, k, v))
        output = F.scaled_dot_product_attention(
            some_q, some_k, some_v, is_causal=True, scale=scale, enable_gqa=num_heads != num_kv_heads
        )
        call.of(attended, num_kv_heads).copy_(output)

    if workers is None:
        for call in _alike(rows, num_kv_heads):
            attend(call)
    else:
        calls = prompts_apart(rows, num_kv_heads, workers.threads)
        workers.draw(lambda _, n: attend(calls[n]), len(calls))
    return attended.flatten(1)


class PromptCall(NamedTuple):
    """Prompts of one length that follow each other, and some of their key heads."""

    start: int
    """Their first token."""
    prompts: int
    tokens: int
    """Of each prompt."""
    heads: range

    def of(self, x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        """Of x [N, heads, head_dim], with all heads that share a key head: [prompts, some heads, tokens, head_dim]."""
        shared = x.shape[1] // num_kv_heads
        tokens = x[self.start : self.start + self.prompts * self.tokens].view(self.prompts, self.tokens, *x.shape[1:])
        return tokens[:, :, self.heads.start * shared : self.heads.stop * shared].transpose(1, 2)


def _alike(rows: Sequence[RowStep], num_kv_heads: int) -> Iterator[PromptCall]:
    start = 0
    for tokens, group in groupby(row.new_tokens for row in rows):
        prompts = len(list(group))
        yield PromptCall(start, prompts, tokens, range(num_kv_heads))
        start += prompts * tokens


def prompts_apart(rows: Sequence[RowStep], num_kv_heads: int, threads: int) -> list[PromptCall]:
    """Every prompt, in parts where there are fewer prompts than threads."""
    step = ceil(num_kv_heads * min(1.0, len(rows) / threads))
    ends = accumulate(row.new_tokens for row in rows)
    return [
        PromptCall(end - row.new_tokens, 1, row.new_tokens, range(first, min(num_kv_heads, first + step)))
        for row, end in zip(rows, ends, strict=True)
        for first in range(0, num_kv_heads, step)
    ]


def attend_tokens(
    rows: Sequence[RowStep], q: torch.Tensor, cache: TileCache, gpu_batch_size: int, scale: float
) -> torch.Tensor:
    """q [len(rows), num_heads, head_dim], one new token a row, its key and value cached already ->
    [len(rows), num_heads * head_dim]. The memory of q may be that of the result then.
    """
    if cache.host is not None:
        return cache.host.attend(cache.places(rows, q.device), q, scale)
    if cache.device is not None:
        return cache.device.attend(cache.places(rows, q.device), q, scale)
    return attend_tokens_by_pieces(rows, q, cache, gpu_batch_size, scale)


def attend_tokens_by_pieces(
    rows: Sequence[RowStep], q: torch.Tensor, cache: TileCache, gpu_batch_size: int, scale: float
) -> torch.Tensor:
    """The same with torch operators, on any device.

    Works on the pages where they lie, part by part: scores of all parts, one softmax, sums of values of all parts.
    """
    places = cache.places(rows, q.device)
    pieces = list(_pieces(places, cache))
    grouped = q.view(len(rows), cache.num_kv_heads, -1, q.shape[2])
    query = q.new_zeros((gpu_batch_size, *grouped.shape[1:]))
    query[places.rows] = grouped
    columns = max(piece.columns.stop for piece in pieces)
    scores = query.new_zeros((*query.shape[:3], columns), dtype=torch.float32)
    for piece in pieces:
        piece.score(query, scores)
    scores.mul_(scale).masked_fill_(places.hidden(gpu_batch_size, columns), float("-inf"))
    weights = scores.softmax(dim=-1)
    output = query.new_zeros(query.shape, dtype=torch.float32)
    for piece in pieces:
        piece.accumulate(weights, output)
    return output[places.rows].to(q.dtype).flatten(1)


class _Piece:
    """Some pages of some rows, and their columns of scores. Keys and values are fetched when they are used: encoded
    pages are decoded into a buffer that the next piece uses again.
    """

    def __init__(
        self,
        keys: Callable[[], torch.Tensor],
        values: Callable[[], torch.Tensor],
        rows: range,
        columns: range,
    ) -> None:
        """keys, values: give [pages, rows, num_kv_heads, page_tokens, head_dim]."""
        self.keys, self.values = keys, values
        self._rows = slice(rows.start, rows.stop)
        self.columns = slice(columns.start, columns.stop)

    def score(self, query: torch.Tensor, scores: torch.Tensor) -> None:
        """query [rows, kv_heads, g, d] times the keys into scores [rows, kv_heads, g, columns]."""
        keys = self.keys()
        pages, rows, heads, tokens, _ = keys.shape
        q = query[self._rows].transpose(2, 3).expand(pages, -1, -1, -1, -1)  # [pages, rows, heads, d, g]
        product = torch.bmm(keys.flatten(0, 2), q.flatten(0, 2)).view(pages, rows, heads, tokens, -1)
        target = scores[self._rows, :, :, self.columns].view(rows, heads, -1, pages, tokens)
        target.copy_(product.permute(1, 2, 4, 0, 3))

    def accumulate(self, weights: torch.Tensor, output: torch.Tensor) -> None:
        """Add weights [rows, kv_heads, g, columns] times the values to output [rows, kv_heads, g, d]."""
        values = self.values()
        pages, rows, heads, tokens, head_dim = values.shape
        w = weights[self._rows, :, :, self.columns].view(rows, heads, -1, pages, tokens).permute(3, 0, 1, 2, 4)
        product = torch.bmm(w.to(values.dtype).flatten(0, 2), values.flatten(0, 2))
        output[self._rows] += product.view(pages, rows, heads, -1, head_dim).sum(dim=0, dtype=torch.float32)


def _pieces(places: TokenPlaces, cache: TileCache) -> Iterator[_Piece]:
    """The parts' pages that any row sees; then the tail pages, whose columns follow those of all pages."""
    tokens = cache.page_tokens
    for part, count in zip(cache.parts, places.pages_seen, strict=True):
        if count:
            r = part.rectangle
            columns = range(r.first_page * tokens, (r.first_page + count) * tokens)
            keys, values = partial(part.keys.read, count), partial(part.values.read, count)
            yield _Piece(keys, values, range(r.first_row, r.stop_row), columns)
    if cache.tails is not None:
        tail_keys, tail_values = (tails[None] for tails in cache.tails)
        start = places.tail_start
        columns = range(start, start + tokens)
        yield _Piece(lambda: tail_keys, lambda: tail_values, cache.tail_rows, columns)
