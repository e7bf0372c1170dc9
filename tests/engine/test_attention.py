"""Attention over scattered pages equals plain softmax attention, and a tile allocates no more than the layout says."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import DTYPES, DType
from flexflow_engine.abc.step import RowStep
from flexflow_engine.abc.tier import Tier
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.graph.task import ATTENTION_LANE, Task
from flexflow_engine.placement import workspace
from flexflow_engine.placement.kv import KVTile, Rectangle, place_kv
from flexflow_engine.runtime.attention import attend_prompts, attend_tokens, attend_tokens_by_pieces, prompts_apart
from flexflow_engine.runtime.executor import RunTask, SequentialExecutor
from flexflow_engine.runtime.host_attention import HostPages, HostTile
from flexflow_engine.runtime.kv_cache import KVPart, TileCache
from flexflow_engine.runtime.kv_pages import Pages
from flexflow_engine.runtime.token_places import TileCut, TokenPlaces
from flexflow_engine.testing.allocations import PeakAllocations
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt4Options, GroupInt8Codec
from flexflow_plugins.codecs.none import NoneCodec
from harness import JobResult, policy, run_job, save_opt
from layouts import DEVICE_FAR, DEVICE_FAR_DISK, DEVICE_HOST_DISK, ISLAND_HOST_DISK, disk_setups, placement, shares
from watched import with_run

HEAD_DIM = 8
SCALE = HEAD_DIM**-0.5
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 4e-3,  # a few units of 2^-11: products and attended values are rounded to it
    torch.bfloat16: 3e-2,  # of 2^-8
}
"""Largest difference allowed from attention in float32 over the same rounded inputs, for values up to 1; half more
of it for each 1 beyond."""

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [S, heads, d] of the last S of the tokens of k and v [T, kv_heads, d] -> [S, heads * d], in float32."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.float(), k.float().repeat_interleave(groups, dim=1), v.float().repeat_interleave(groups, dim=1)
    scores = torch.einsum("shd,thd->hst", q, k) * q.shape[2] ** -0.5
    new, cached = q.shape[0], k.shape[0]
    future = torch.arange(cached)[None, :] > torch.arange(cached - new, cached)[:, None]
    return torch.einsum("hst,thd->shd", scores.masked_fill(future, float("-inf")).softmax(-1), v).flatten(1)


def random_qkv(
    tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, *, seed: int, head_dim: int = HEAD_DIM
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, h, head_dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads))
    return q, k, v


dtypes = st.sampled_from(list(TOLERANCE))
head_counts = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)])


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), head_counts, dtypes, st.integers(0, 99))
def test_prompts_attend_to_their_own_past(
    lengths: list[int], heads: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    q, k, v = random_qkv(sum(lengths), *heads, dtype, seed=seed)
    rows = [RowStep(row=n, sequence=n, new_tokens=length, context=0) for n, length in enumerate(lengths)]
    attended = attend_prompts(rows, q, k, v, SCALE)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    expected = torch.cat([plain_attention(*part) for part in parts])
    torch.testing.assert_close(attended.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype] / 2)
    assert attended.dtype == dtype


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [3, 9, 1, 9, 2], [17]])
def test_threads_share_prompts_of_any_length_and_one_prompt_by_its_heads(
    workers: Workers, heads: tuple[int, int], lengths: list[int]
) -> None:
    q, k, v = random_qkv(sum(lengths), *heads, torch.bfloat16, seed=3)
    rows = [RowStep(row=n, sequence=n, new_tokens=length, context=0) for n, length in enumerate(lengths)]
    drawn = attend_prompts(rows, q, k, v, SCALE, workers=workers)
    assert torch.equal(drawn, attend_prompts(rows, q, k, v, SCALE))
    assert len(prompts_apart(rows, heads[1], workers.threads)) >= workers.threads


def stale_cache(
    tile: KVTile, page: tuple[int, int, int], codec: Codec, dtype: torch.dtype, workers: Workers
) -> TileCache:
    """One tile's cache. Pages that were never written hold large values, as a slot's stale bytes may.

    page: kv_heads, page_tokens, head_dim.
    """
    name: DType = next(name for name in DTYPES if getattr(torch, name) == dtype)
    decoded = torch.empty(max(r.num_units for r in tile.rectangles) * prod(page) * dtype.itemsize, dtype=torch.uint8)

    def pages(r: Rectangle) -> Pages:
        stored = torch.empty((r.num_units, codec.encoded_nbytes(page, name)), dtype=torch.uint8)
        codec.encode(torch.full((r.num_units, *page), 99.0, dtype=dtype), stored)
        return Pages(r, stored, page=page, codec=codec, scratch=decoded, dtype=dtype)

    in_place = {"device"} if codec.keeps_bytes else set()
    parts = tuple(KVPart(r, r.tier in in_place, pages(r), pages(r)) for r in tile.rectangles)
    keys, values = (torch.full((len(tile.tail_rows), *page), -99.0, dtype=dtype) for _ in "kv")
    tails = (keys, values) if tile.tail_rows else None
    decoder = codec.kernel_decoder(page) if codec.decodes_in_kernels else None
    host = HostTile(
        [HostPages(p.rectangle, p.keys.stored, p.values.stored, p.takes_tokens, decoder) for p in parts],
        tail_rows=tile.tail_rows,
        tails=tails,
        page=page,
        dtype=dtype,
        workers=workers,
    )
    tail_keys, tail_values = tails or (None, None)
    return TileCache(page[1], page[0], parts, tile.tail_rows, tail_keys, tail_values, host, workers)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with closing(Workers(2)) as workers:
        yield workers


cache_codecs = st.sampled_from(
    [
        NoneCodec(),
        NoneCodec(),
        GroupInt8Codec(),
        GroupInt4Codec(GroupInt4Options(encoder="minmax")),
        GroupInt4Codec(GroupInt4Options(group_size=6, encoder="minmax")),
        GroupInt4Codec(GroupInt4Options(encoder="fit")),
    ]
)


@settings(max_examples=120, deadline=None)  # the first examples may compile
@given(st.data(), head_counts, dtypes, cache_codecs)
def test_tokens_attend_to_their_cached_past_wherever_its_pages_lie(
    workers: Workers, data: st.DataObject, heads: tuple[int, int], dtype: torch.dtype, codec: Codec
) -> None:
    """Any rectangles and tails; rows without a sequence; prompts of unequal length; several steps; plain or encoded
    (and then decoded some heads at a time).
    """
    decoded_numbers = data.draw(st.sampled_from([1, 100, 2**12]))
    attended_nbytes = data.draw(st.sampled_from([64, 2**21]))
    gpu_batch_size, page_tokens, steps = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)), 7
    numbers = sorted(data.draw(st.sets(st.integers(0, gpu_batch_size - 1), min_size=1)))
    prompts = {row: data.draw(st.integers(1, 11)) for row in numbers}
    head_dim, seed = data.draw(st.sampled_from([5, HEAD_DIM, 20, 64, 128])), data.draw(st.integers(0, 99))
    layout = place_kv(
        num_layers=1,
        gpu_batch_size=gpu_batch_size,
        num_gpu_batches=1,
        cached_tokens=11 + steps,
        page_tokens=page_tokens,
        page_nbytes=64,
        tail_page_nbytes=64,
        placement=placement(**data.draw(shares(["device", "far", "disk"]))),
        direct=frozenset({"device"}),
        takes_tokens=frozenset({"device"} if codec.keeps_bytes else ()),
    )
    cache = stale_cache(layout.tiles[0][0], (heads[1], page_tokens, head_dim), codec, dtype, workers)
    past = {
        row: random_qkv(length + steps, *heads, dtype, seed=seed + row, head_dim=head_dim)
        for row, length in prompts.items()
    }

    rows = [RowStep(row=row, sequence=row, new_tokens=length, context=0) for row, length in prompts.items()]
    keys, values = (torch.cat([past[row][part][: prompts[row]] for row in numbers]) for part in (1, 2))
    cache.write_prompts(rows, keys, values)
    for step in range(steps):
        live = numbers[: len(numbers) if step < 3 else 1]  # the others have ended
        rows = [RowStep(row=row, sequence=row, new_tokens=1, context=prompts[row] + step) for row in live]
        q, k, v = (torch.stack([past[r.row][part][r.context] for r in rows]) for part in range(3))
        cache.append(rows, k, v)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workspace, "_DECODED_NUMBERS", decoded_numbers)
            patch.setattr(workspace, "_ATTENDED_NBYTES", attended_nbytes)
            attended = attend_tokens(rows, q.clone(), cache, gpu_batch_size, head_dim**-0.5)
        by_pieces = attend_tokens_by_pieces(rows, q, cache, gpu_batch_size, head_dim**-0.5)
        torch.testing.assert_close(attended, by_pieces, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype] / 2)
        if codec.keeps_bytes:
            expected = [_last_token(past[row.row], row.context) for row in rows]
            torch.testing.assert_close(
                attended.float(), torch.stack(expected), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype] / 2
            )


@pytest.mark.parametrize(
    "codec", [GroupInt8Codec(), GroupInt4Codec(GroupInt4Options(encoder="fit"))], ids=["int8", "int4"]
)
@pytest.mark.parametrize("page", [(40, 4, 64), (6, 16, 128)], ids=["small pages", "large pages"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_pages_that_a_codec_multiplies_are_not_decoded(
    workers: Workers, codec: Codec, page: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Among them one whose keys are all one number, and one of keys that are none."""
    if codec.kernel_decoder(page).products is None:
        pytest.skip("this processor has no products of encoded pages")
    heads, tokens = page[0], 2 * page[1] + 1
    with pytest.MonkeyPatch.context() as patch:
        decoder = codec.kernel_decoder(page)
        leaving = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5)(lambda *_: None)
        address = ctypes.cast(leaving, ctypes.c_void_p).value or 0
        patch.setattr(type(codec), "kernel_decoder", lambda *_: replace(decoder, addresses={"float32": address}))
        tile = KVTile(rectangles=(Rectangle("far", "kv", 0, 2, 0, 3),), slotted=(), tail_rows=range(2))
        cache = stale_cache(tile, page, codec, dtype, workers)
    past = [RowStep(row=row, sequence=row, new_tokens=tokens, context=0) for row in range(2)]
    _, k, v = random_qkv(2 * tokens, heads, heads, dtype, seed=1, head_dim=page[2])
    k[: page[1], 0], k[tokens : tokens + page[1], 1] = 0.5, torch.nan
    cache.write_prompts(past, k, v)
    rows = [RowStep(row=row, sequence=row, new_tokens=1, context=tokens - 1) for row in range(2)]
    q, _, _ = random_qkv(2, heads, heads, dtype, seed=2, head_dim=page[2])
    attended = attend_tokens(rows, q.clone(), cache, 2, page[2] ** -0.5)
    by_pieces = attend_tokens_by_pieces(rows, q, cache, 2, page[2] ** -0.5)
    assert attended.isnan().any()
    torch.testing.assert_close(attended, by_pieces, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype] / 2, equal_nan=True)


@pytest.mark.parametrize("context", [0, 2, 3, 4])
def test_of_an_encoded_page_only_the_tokens_that_a_row_has_are_attended_to(workers: Workers, context: int) -> None:
    """All others would outweigh them."""
    codec, page, rectangle = GroupInt8Codec(), (3, 4, 64), Rectangle("far", "kv", 0, 1, 0, 2)
    keys, values = torch.full((2, *page), 50.0), torch.full((2, *page), 100.0)
    for token in range(context + 1):
        keys[token // 4, :, token % 4], values[token // 4, :, token % 4] = 0, torch.arange(64) + 64.0 * token
    stored = [torch.empty((2, 1, codec.encoded_nbytes(page, "float32")), dtype=torch.uint8) for _ in range(2)]
    for numbers, encoded in zip((keys, values), stored, strict=True):
        codec.encode(numbers, encoded[:, 0])
    host = HostTile(
        [HostPages(rectangle, stored[0], stored[1], takes_tokens=True, decoder=codec.kernel_decoder(page))],
        tail_rows=range(0),
        tails=None,
        page=page,
        dtype=torch.float32,
        workers=workers,
    )
    cut = TileCut.of(num_kv_heads=3, page_tokens=4, parts=[(rectangle, True)], tail_rows=range(0))
    rows = [RowStep(row=0, sequence=0, new_tokens=1, context=context)]
    attended = host.attend(TokenPlaces(rows, cut, torch.device("cpu")), torch.ones((1, 3, 64)), 1.0)
    torch.testing.assert_close(attended, torch.arange(64.0).repeat(1, 3) + 32 * context, atol=0.5, rtol=0)


@pytest.mark.parametrize(
    "codec",
    [NoneCodec(), GroupInt4Codec(GroupInt4Options(encoder="fit")), GroupInt8Codec()],
    ids=["none", "int4", "int8"],
)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("head_dim", [HEAD_DIM, 64])
@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_threads_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], head_dim: int, num_threads: int, codec: Codec
) -> None:
    """Rows of very different context, so that a share ends inside a row; encoded heads are decoded two at a time, or
    multiplied where they have 64 numbers.
    """
    contexts, page_tokens = (100, 3, 1, 17), 4
    tail_rows = range(0 if codec.keeps_bytes else 4)
    tile = KVTile(rectangles=(Rectangle("device", "kv", 0, 4, 0, 26),), slotted=(), tail_rows=tail_rows)
    rows = [RowStep(row=row, sequence=row, new_tokens=1, context=context) for row, context in enumerate(contexts)]
    past = [RowStep(row=row.row, sequence=row.row, new_tokens=row.context + 1, context=0) for row in rows]
    _, k, v = random_qkv(sum(row.new_tokens for row in past), *heads, torch.bfloat16, seed=1, head_dim=head_dim)
    q, _, _ = random_qkv(len(rows), *heads, torch.bfloat16, seed=2, head_dim=head_dim)
    monkeypatch.setattr(workspace, "_ATTENDED_NBYTES", 64)
    monkeypatch.setattr(workspace, "_DECODED_NUMBERS", 2 * page_tokens * head_dim)
    found = []
    for threads in (1, num_threads):
        with closing(Workers(threads)) as workers:
            cache = stale_cache(tile, (heads[1], page_tokens, head_dim), codec, torch.bfloat16, workers)
            cache.write_prompts(past, k, v)
            found.append(attend_tokens(rows, q.clone(), cache, 4, SCALE))
    assert torch.equal(*found)


def _last_token(past: Tensors, context: int) -> torch.Tensor:
    q, k, v = past
    return plain_attention(q[context : context + 1], k[: context + 1], v[: context + 1])[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Long prompts and few tokens: prefill needs most. Short prompts and many tokens: decode does."""

    prompt_tokens: tuple[int, ...]
    max_new_tokens: int
    dtype: DType = "float32"
    kv_codec: Codec | None = None


WORKSPACE_POLICIES: Mapping[str, dict[str, Any]] = {
    "one page a matrix on the device": {},
    "split weights": {"weights": {"device": 30, "far": 70}},
    "split everything": {
        "weights": {"device": 30, "far": 70},
        "kv_cache": {"device": 30, "far": 70},
        "activations": {"device": 50, "far": 50},
    },
    "many small pages": {"kv_cache": {"far": 100}, "kv_page_tokens": 1},
    "large pages": {"kv_cache": {"device": 10, "far": 90}, "kv_page_tokens": 32},
    "one row": {"gpu_batch_size": 1, "num_gpu_batches": 3, "activations": {"far": 100}},
    "many rows": {"gpu_batch_size": 16, "num_gpu_batches": 1, "kv_cache": {"device": 50, "far": 50}},
}
WORKSPACE_MODELS: Mapping[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm with projection": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "untied, large vocabulary": {"tie_word_embeddings": False, "vocab_size": 2000},
    "narrow feed-forward": {"ffn_dim": 16},
}


LONG_PROMPTS = Job(prompt_tokens=(40, 33, 7), max_new_tokens=2)
MANY_TOKENS = Job(prompt_tokens=(2, 1, 1), max_new_tokens=9)


@pytest.mark.parametrize("config", WORKSPACE_MODELS.values(), ids=list(WORKSPACE_MODELS))
@pytest.mark.parametrize("chosen", WORKSPACE_POLICIES.values(), ids=list(WORKSPACE_POLICIES))
@pytest.mark.parametrize("job", [LONG_PROMPTS, MANY_TOKENS], ids=["long prompts", "many tokens"])
def test_no_computation_allocates_more_than_the_layouts_workspace(
    tmp_path: Path, chosen: dict[str, Any], config: dict[str, Any], job: Job
) -> None:
    result, peaks = run_measured(tmp_path, DEVICE_FAR, chosen, config, job)
    key = max(peaks, key=lambda key: peaks[key])
    assert peaks[key] <= result.layout.workspace.device_nbytes, key


@pytest.mark.parametrize("job", [LONG_PROMPTS, MANY_TOKENS], ids=["long prompts", "many tokens"])
def test_the_bound_holds_in_sixteen_bits(tmp_path: Path, job: Job) -> None:
    chosen = WORKSPACE_POLICIES["split everything"]
    result, peaks = run_measured(tmp_path, DEVICE_FAR, chosen, {}, replace(job, dtype="bfloat16"))
    assert max(peaks.values()) <= result.layout.workspace.device_nbytes


@pytest.mark.parametrize(("share", "page_tokens"), [({}, 4), ({"far": 100}, 16), ({"device": 50, "far": 50}, 32)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bound_holds_where_scores_need_most(
    tmp_path: Path, share: dict[str, float], page_tokens: int, dtype: DType
) -> None:
    """One row of many heads of one number each, and a cache far longer than the prompt: next to nothing but scores."""
    config = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_attention_heads": 32, "ffn_dim": 16}
    chosen = {"gpu_batch_size": 1, "num_gpu_batches": 1, "kv_cache": share, "kv_page_tokens": page_tokens}
    job = Job(prompt_tokens=(1,), max_new_tokens=100, dtype=dtype)
    result, peaks = run_measured(tmp_path, DEVICE_FAR, chosen, config, job)
    assert max(peaks.values()) <= result.layout.workspace.device_nbytes <= 3 * max(peaks.values())


@pytest.mark.parametrize("classes", [DEVICE_HOST_DISK, DEVICE_FAR_DISK])
def test_the_workspace_is_no_more_than_a_few_times_what_is_used(
    tmp_path: Path, classes: Mapping[str, type[Tier]]
) -> None:
    """A bound that is far too large would take memory from everything else. Where nothing is moved, products take less:
    torch's own threads share them.
    """
    job, far = Job(prompt_tokens=(40,) * 16, max_new_tokens=2), {list(classes)[-1]: 100}
    result, peaks = run_measured(tmp_path, classes, {"gpu_batch_size": 8, "weights": far}, {}, job)
    assert result.layout.workspace.device_nbytes <= 3 * max(peaks.values())


@pytest.mark.parametrize("classes", [DEVICE_HOST_DISK, DEVICE_FAR_DISK, ISLAND_HOST_DISK])
@pytest.mark.parametrize(("page_tokens", "dtype"), [(1, "float32"), (4, "bfloat16"), (32, "float32")])
@pytest.mark.parametrize("codec", [NoneCodec(), GroupInt8Codec()], ids=lambda codec: codec.key)
def test_the_bounds_of_both_tiers_hold_with_attention_on_the_host(
    tmp_path: Path, classes: Mapping[str, type[Tier]], page_tokens: int, dtype: DType, codec: Codec
) -> None:
    second, third = list(classes)[1:]
    chosen = {"kv_cache": {second: 50, third: 50}, "kv_page_tokens": page_tokens, "attention": "host"}
    job = replace(MANY_TOKENS, max_new_tokens=20, dtype=dtype, kv_codec=codec)
    result, peaks = run_measured(tmp_path, classes, chosen, {}, job)
    attended = {event.task.key for event in result.trace.events if event.task.lane == ATTENTION_LANE}
    assert max(peaks[key] for key in attended) <= result.layout.workspace.attention_nbytes
    assert max(nbytes for key, nbytes in peaks.items() if key not in attended) <= result.layout.workspace.device_nbytes


@pytest.mark.parametrize("pages_at_once", [1, 3, 1000])
@pytest.mark.parametrize("threads", [1, 5])
def test_threads_encode_no_more_pages_at_once_than_is_counted(threads: int, pages_at_once: int) -> None:
    num_rows, page, pages, codec = 4, (4, 16, HEAD_DIM), 10, GroupInt4Codec().for_cache()
    tile = KVTile(rectangles=(Rectangle("disk", "kv", 0, num_rows, 0, pages),), slotted=(), tail_rows=range(num_rows))
    tokens = page[1] * pages
    rows = [RowStep(row=row, sequence=row, new_tokens=tokens, context=0) for row in range(num_rows)]
    _, k, v = random_qkv(num_rows * tokens, page[0], page[0], torch.bfloat16, seed=1)
    with closing(Workers(threads)) as workers:
        cache = replace(stale_cache(tile, page, codec, torch.bfloat16, workers), pages_at_once=pages_at_once)
        with PeakAllocations() as peak:
            cache.write_prompts(rows, k, v)
    page_nbytes = codec.encoded_nbytes(page, "bfloat16") + 2 * prod(page)
    assert 0 < peak.peak_bytes <= min(pages_at_once, num_rows * pages) * page_nbytes


@pytest.fixture
def five_threads() -> Iterator[None]:
    """More than rows of a GPU batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("five_threads")
@pytest.mark.parametrize("classes", [DEVICE_HOST_DISK, DEVICE_FAR_DISK, ISLAND_HOST_DISK])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", [NoneCodec(), GroupInt4Codec()], ids=lambda codec: codec.key)
def test_the_bounds_hold_with_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: Mapping[str, type[Tier]], dtype: DType, codec: Codec
) -> None:
    """And with pages of which no two are encoded at once, so that it takes its turns."""
    monkeypatch.setattr(workspace, "_ENCODED_NBYTES", 1)
    monkeypatch.setattr(workspace, "_ATTENDED_NBYTES", 64)
    second, third = list(classes)[1:]
    attention = "device" if classes is DEVICE_FAR_DISK else "host"
    chosen = {"kv_cache": {second: 50, third: 50}, "kv_page_tokens": 4, "attention": attention}
    job = replace(LONG_PROMPTS, max_new_tokens=20, dtype=dtype, kv_codec=codec)
    result, peaks = run_measured(tmp_path, classes, chosen, {}, job)
    attended = {event.task.key for event in result.trace.events if event.task.lane == ATTENTION_LANE}
    assert max((peaks[key] for key in attended), default=0) <= result.layout.workspace.attention_nbytes
    assert max(nbytes for key, nbytes in peaks.items() if key not in attended) <= result.layout.workspace.device_nbytes


def run_measured(
    folder: Path,
    classes: Mapping[str, type[Tier]],
    chosen: dict[str, Any],
    config: dict[str, Any],
    job: Job,
) -> tuple[JobResult, dict[str, int]]:
    """Run a job, and tell the most bytes that torch held for each of its computations."""
    peaks: dict[str, int] = {}

    def measure(run: RunTask) -> RunTask:
        def measured(task: Task) -> None:
            if task.kind != "compute":
                run(task)
                return
            with PeakAllocations() as allocations:
                run(task)
            peaks[task.key] = allocations.peak_bytes

        return measured

    tiers = disk_setups(classes, folder / "disk")
    result = run_job(
        save_opt(folder / "checkpoint", num_hidden_layers=1, **config),
        tiers,
        policy(tiers, **chosen),
        [tuple(range(4, 4 + length)) for length in job.prompt_tokens],
        store=folder / "store",
        max_new_tokens=job.max_new_tokens,
        dtype=job.dtype,
        kv_codec=job.kv_codec,
        executor=with_run(SequentialExecutor, measure),
    )
    return result, peaks
