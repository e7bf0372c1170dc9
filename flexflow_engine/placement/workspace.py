"""What one tile's computation allocates, at most. Sizes in bytes; tested against real peaks."""

from __future__ import annotations

from dataclasses import dataclass

from flexflow_engine.abc.dtypes import ITEM_NBYTES
from flexflow_engine.abc.model import Model
from flexflow_engine.abc.tier import HOST
from flexflow_engine.placement.kv import KVLayout
from flexflow_engine.placement.pages import PagedTensor

SCORE_NBYTES = 4
"""Scores and probabilities are float32 whatever the cache's format."""
LOOK_UP_ROWS = 256
"""Rows of the table that are looked up at a time on the compute tier."""
FAR_LOOK_UP_ROWS = 32
"""Of a far tier's, by the lane that reads them: a megabyte or two, which is not counted."""
_ATTENDED_NBYTES = 2 * 2**20
"""Of keys and values, by each thread; below that, waking it takes longer than it saves."""
_DECODED_NUMBERS = 2**12
"""That a thread attends to as soon as they are decoded, in float32: what its first cache holds beside the rest."""
_ENCODED_NBYTES = 2 * 2**20
"""Of cache pages before they are encoded, that a host's threads encode at a time: what their caches hold."""
_ENCODED_ON_DEVICE_NBYTES = 16 * 2**20
"""That a device encodes at a time: enough work for all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """What computations take for themselves, at most."""

    device_nbytes: int
    """On the compute tier."""
    attention_nbytes: int
    """Of decode attention on the host, and of pages that it encodes; 0 where the compute tier attends."""


def workspace_nbytes(
    model: Model,
    *,
    table: PagedTensor,
    rows: int,
    prompt_tokens: int,
    encoding: int,
    head_rows: int,
    decode_attention: int,
) -> int:
    """The largest of all layers' workspaces on the compute tier.

    rows: of a GPU batch. prompt_tokens: of the longest prompt. encoding: bytes of `encoding_nbytes`. head_rows: of the
    largest part of the head. decode_attention: bytes of `kernel_nbytes` or `pieces_nbytes`, 0 where that is done
    elsewhere.
    """
    tokens = rows * prompt_tokens
    attention = max(_prefill_attention(model, tokens), decode_attention)
    decoder = model.workspace_nbytes("decoder", tokens) + attention + encoding
    head = rows * head_rows * (ITEM_NBYTES[model.dtype] + SCORE_NBYTES) + model.workspace_nbytes("head", rows)
    assembled = tokens * model.config.hidden_size * ITEM_NBYTES[model.dtype]
    return max(
        model.workspace_nbytes("embed", tokens),
        _look_up(model, table, tokens),
        decoder + assembled,
        model.workspace_nbytes("final", rows) + assembled,
        head,
    )


def encoding_nbytes(kv: KVLayout, rows: int, cached_tokens: int, page_tokens: int, memory: str | None) -> int:
    """Encoding pages of a cache in a tier's `memory`: what they are encoded to, and their numbers in one piece.

    The host's threads encode some pages of a row at a time, each for itself; a device pages of several rows.
    """
    pages = -(-cached_tokens // page_tokens)
    at_once = min(rows * pages, pages_encoded_at_once(kv.tail_page_nbytes, memory))
    return at_once * (kv.page_nbytes + kv.tail_page_nbytes)


def pages_encoded_at_once(plain_nbytes: int, memory: str | None) -> int:
    """How many pages, each of so many bytes before, all threads of the host or a device encode at a time."""
    return max(1, (_ENCODED_NBYTES if memory == HOST else _ENCODED_ON_DEVICE_NBYTES) // plain_nbytes)


def kernel_nbytes(model: Model, rows: int, cached_tokens: int, page_tokens: int) -> int:
    """Attention of one token a row by the host's kernel: query, sums and scores of the rows that threads attend to at
    once, what each thread decodes at a time, and the result.
    """
    config, item = model.config, ITEM_NBYTES[model.dtype]
    vectors = config.num_heads * config.head_dim
    cached = 2 * rows * cached_tokens * config.num_kv_heads * config.head_dim
    threads = most_threads(cached * item, rows, config.num_kv_heads)
    scores = min(rows, threads) * (2 * vectors + config.num_heads * cached_tokens)
    page = config.num_kv_heads, page_tokens, config.head_dim
    chunks = threads * heads_decoded_at_once(page) * page_tokens * config.head_dim
    return (scores + chunks) * SCORE_NBYTES + rows * vectors * item


def most_threads(cached_nbytes: int, rows: int, num_kv_heads: int) -> int:
    """Of the host's that attend to so many bytes of keys and values."""
    return max(1, min(max(rows, num_kv_heads), cached_nbytes // _ATTENDED_NBYTES))


def heads_decoded_at_once(page: tuple[int, int, int]) -> int:
    """Of a page [num_kv_heads, page_tokens, head_dim], by each thread that attends to it."""
    num_kv_heads, page_tokens, head_dim = page
    return min(num_kv_heads, max(1, _DECODED_NUMBERS // (page_tokens * head_dim)))


def pieces_nbytes(model: Model, rows: int, cached_tokens: int, page_tokens: int, *, num_gpu_batches: int = 1) -> int:
    """The same by torch operators: scores of every cached position in three copies (product, masked, softmax), the
    query repeated for every page and one partial sum of values a page; and of every GPU batch what its rows don't see.
    """
    config = model.config
    pages = -(-cached_tokens // page_tokens) + 1
    scores = rows * config.num_heads * pages * page_tokens
    vectors = rows * config.num_heads * config.head_dim
    item = ITEM_NBYTES[model.dtype]
    return (
        scores * (3 * SCORE_NBYTES + item)
        + rows * pages * page_tokens * (8 + num_gpu_batches)
        + vectors * (2 * pages * item + 4 * SCORE_NBYTES + 2 * item)
    )


def _look_up(model: Model, table: PagedTensor, tokens: int) -> int:
    """Encoded units, decoded ones, the rows taken from them, and three int64 indices of each."""
    row, rows = table.columns * ITEM_NBYTES[model.dtype], min(tokens, LOOK_UP_ROWS)
    return min(rows, table.num_units) * (table.unit_nbytes + table.unit_rows * row) + rows * (row + 3 * 8)


def _prefill_attention(model: Model, tokens: int) -> int:
    """The attended values, and their copy as the kernel returns them."""
    config = model.config
    return 2 * tokens * config.num_heads * config.head_dim * ITEM_NBYTES[model.dtype]
