"""Attention through the runtime's own functions, over a cache of pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.hardware import Curve
from flexflow_engine.abc.step import RowStep
from flexflow_engine.abc.tier import HOST
from flexflow_engine.placement.kv import Rectangle
from flexflow_engine.placement.layout import attended_in_kernel
from flexflow_engine.planning.profile.bench import Bench
from flexflow_engine.planning.profile.extent import Extent
from flexflow_engine.runtime.attention import attend_prompts, attend_tokens
from flexflow_engine.runtime.kv_cache import KVPart, TileCache, attending_in_kernel, attending_on_device
from flexflow_engine.runtime.kv_pages import Pages
from flexflow_engine.runtime.token_places import LatestPlaces

_TIER = "device"
"""Any name: there is one tier here."""
Tile = tuple[int, int]
"""Rows, and cached tokens of each."""


def prefill_flops_per_s(bench: Bench, extent: Extent) -> Curve:
    """By a prompt's tokens; what the causal mask leaves."""
    return Curve(tuple((float(tokens), _prefill_rate(bench, extent, tokens)) for tokens in extent.prompts))


def decode_bytes_per_s(bench: Bench, extent: Extent, codec: Codec) -> Curve:
    """By cached tokens; bytes of keys and values as the codec leaves them."""
    tiles = [(_attending_rows(bench, extent, context), context) for context in extent.contexts]
    call_s = _call_s(bench, extent, codec, tiles)
    return Curve(tuple((float(tile[1]), _decode_rate(bench, extent, codec, tile, call_s)) for tile in tiles))


def one_more_token(bench: Bench, extent: Extent, codec: Codec) -> tuple[Callable[[torch.Tensor], object], float]:
    """What a decode step does beside a layer's matrices: a token of each row put into the cache, and attended to.

    Of x [attention_rows, heads * head_dim], which is query, key and value; and the seconds that the cached bytes take.
    """
    tiles = [(extent.attention_rows, context) for context in extent.contexts]
    (count, context), call_s = tiles[0], _call_s(bench, extent, codec, tiles)
    seconds = _decode_s(bench, extent, codec, tiles[0])
    rows, caches = _rows(count, context), cycle(_caches(bench, extent, codec, tiles[0]))

    def call(x: torch.Tensor) -> object:
        cache, numbers = next(caches), x.view(count, extent.heads, extent.head_dim)
        cache.append(rows, numbers, numbers)
        return attend_tokens(rows, numbers, cache, count, extent.head_dim**-0.5)

    return call, max(0.0, seconds - call_s)


def _attending_rows(bench: Bench, extent: Extent, context: int) -> int:
    """On a device as many as a large tile has, as far as their cache is no larger than what no cache of a processor
    holds: of a few its kernels end before the next ones are started.
    """
    if bench.memory == HOST:
        return extent.attention_rows
    row_nbytes = _plain_nbytes(bench, extent, (1, context))
    return max(extent.attention_rows, min(extent.device_attention_rows, extent.cold_nbytes // row_nbytes))


def _prefill_rate(bench: Bench, extent: Extent, tokens: int) -> float:
    count = max(1, extent.prompts[-1] // tokens)
    rows = [RowStep(row=row, sequence=row, new_tokens=tokens, context=0) for row in range(count)]
    q, k, v = (bench.numbers(count * tokens, extent.heads, extent.head_dim) for _ in range(3))
    workers = bench.workers if bench.memory == HOST else None
    seconds = bench.time(lambda: attend_prompts(rows, q, k, v, extent.head_dim**-0.5, workers=workers))
    return 2.0 * count * tokens * (tokens + 1) * extent.heads * extent.head_dim / seconds


def _decode_rate(bench: Bench, extent: Extent, codec: Codec, tile: Tile, call_s: float) -> float:
    """Without `call_s`, what a call takes whatever it reads; at least a tenth of the time is left to the bytes."""
    seconds = _decode_s(bench, extent, codec, tile)
    return _cached_nbytes(bench, extent, codec, tile) / max(seconds - call_s, seconds / 10)


def _call_s(bench: Bench, extent: Extent, codec: Codec, tiles: Sequence[Tile]) -> float:
    """What a call takes whatever it reads: where the line through the least and the most that is cached begins."""
    by_nbytes = {_cached_nbytes(bench, extent, codec, tile): tile for tile in tiles}
    few, many = min(by_nbytes), max(by_nbytes)
    assert few < many, tiles
    few_s, many_s = (_decode_s(bench, extent, codec, by_nbytes[nbytes]) for nbytes in (few, many))
    return max(0.0, few_s - few * (many_s - few_s) / (many - few))


def _cached_nbytes(bench: Bench, extent: Extent, codec: Codec, tile: Tile) -> int:
    """Keys and values of all rows, each with one new token."""
    row = codec.encoded_nbytes((extent.heads, tile[1] + 1, extent.head_dim), bench.dtype)
    return 2 * tile[0] * row


def _decode_s(bench: Bench, extent: Extent, codec: Codec, tile: Tile) -> float:
    """Attention of one new token a row, each call over another cache."""
    count, context = tile
    rows, q = _rows(count, context), bench.numbers(count, extent.heads, extent.head_dim)
    caches = cycle(_caches(bench, extent, codec, tile))
    return bench.time(lambda: attend_tokens(rows, q, next(caches), count, extent.head_dim**-0.5))


def _rows(count: int, context: int) -> list[RowStep]:
    return [RowStep(row=row, sequence=row, new_tokens=1, context=context) for row in range(count)]


def _caches(bench: Bench, extent: Extent, codec: Codec, tile: Tile) -> list[TileCache]:
    """More than the processor's caches hold. On a device all are of one step, as a run's layers are: places that are
    made once a step would take longer than kernels. On the host each is of a step of its own: jobs in memory take that
    much more than their parts, and were predicted 10 % too fast without it.
    """
    step, nbytes = LatestPlaces(), _plain_nbytes(bench, extent, tile)
    return [
        _cache(bench, extent, codec, tile, LatestPlaces() if bench.memory == HOST else step)
        for _ in range(max(1, extent.cold_nbytes // nbytes))
    ]


def _plain_nbytes(bench: Bench, extent: Extent, tile: Tile) -> int:
    """Of the pages of keys and values, in the model's dtype."""
    rows, context = tile
    tokens = (context // extent.page_tokens + 1) * extent.page_tokens
    return 2 * rows * tokens * extent.heads * extent.head_dim * bench.torch_dtype.itemsize


def _cache(bench: Bench, extent: Extent, codec: Codec, tile: Tile, latest: LatestPlaces) -> TileCache:
    """As `runtime.kv_cache` makes it: every page in one place, tails where tokens can't be written in place."""
    count, context = tile
    pages, page = context // extent.page_tokens + 1, (extent.heads, extent.page_tokens, extent.head_dim)
    rectangle = Rectangle(_TIER, "kv.0.0.0", 0, count, 0, pages)
    keys, values = (_pages(bench, codec, rectangle, page) for _ in range(2))
    part = KVPart(rectangle, codec.keeps_bytes, keys, values)
    tail_rows = range(0 if codec.keeps_bytes else count)
    tails = None if codec.keeps_bytes else (bench.numbers(count, *page), bench.numbers(count, *page))
    tail_keys, tail_values = tails or (None, None)
    cache = TileCache(
        extent.page_tokens, extent.heads, (part,), tail_rows, tail_keys, tail_values, host=None, latest=latest
    )
    if not attended_in_kernel(bench.memory, codec):
        return attending_on_device(cache, codec, num_heads=extent.heads, page=page, dtype=bench.torch_dtype)
    return attending_in_kernel(cache, codec, page=page, dtype=bench.torch_dtype, workers=bench.workers)


def _pages(bench: Bench, codec: Codec, rectangle: Rectangle, page: tuple[int, int, int]) -> Pages:
    encoded = torch.empty((1, codec.encoded_nbytes(page, bench.dtype)), dtype=torch.uint8, device=bench.device)
    codec.encode(bench.numbers(1, *page), encoded)
    stored, scratch = encoded.repeat(rectangle.num_units, 1), None
    if not (codec.keeps_bytes or attended_in_kernel(bench.memory, codec)):
        numbers = torch.zeros((rectangle.num_units, *page), dtype=bench.torch_dtype, device=bench.device)
        scratch = numbers.view(torch.uint8).flatten()
    return Pages(rectangle, stored, page=page, codec=codec, scratch=scratch, dtype=bench.torch_dtype)
