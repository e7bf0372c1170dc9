"""Attention's kernels for a GPU against torch's operators. As a script in Triton's interpreter, on the processor:

    TRITON_INTERPRET=1 python attention_on_device.py HEADS KV_HEADS PAGE_TOKENS HEAD_DIM GROUP_SIZE CODEC FULL_GPU

Ends with status 0 if they cache and attend alike.
"""

from __future__ import annotations

import sys

import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.policy import Placement
from flexflow_engine.abc.step import RowStep
from flexflow_engine.placement.kv import KVTile, Rectangle, place_kv
from flexflow_engine.runtime import device_attention
from flexflow_engine.runtime.attention import attend_tokens, attend_tokens_by_pieces
from flexflow_engine.runtime.kv_cache import KVPart, TileCache, attending_on_device
from flexflow_engine.runtime.kv_pages import Pages
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt4Options, GroupInt8Codec, GroupInt8Options
from flexflow_plugins.codecs.none import NoneCodec

ROWS, CACHED, SCALE = 6, 90, 0.3
CONTEXTS = ((0, 1, 2, 3, 4), (88, 5, 3, 8, 37), (88, 15, 19, 16, 47))
"""Of rows 0, 1, 2, 4 and 5."""
TOLERANCES: dict[DType, float] = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 6e-2}


def codec_of(name: str, group_size: int) -> Codec:
    """With an encoder, for 4 bits."""
    if name == "none":
        return NoneCodec()
    if name == "int8":
        return GroupInt8Codec(GroupInt8Options(group_size=group_size))
    return GroupInt4Codec(GroupInt4Options(encoder="fit" if name == "fit" else "minmax", group_size=group_size))


def tile_of(page_tokens: int, codec: Codec) -> KVTile:
    """In several parts, some of which take tokens if any may."""
    takes_tokens = frozenset({"device"} if codec.keeps_bytes else ())
    layout = place_kv(
        num_layers=1,
        gpu_batch_size=ROWS,
        num_gpu_batches=1,
        cached_tokens=CACHED,
        page_tokens=page_tokens,
        page_nbytes=64,
        tail_page_nbytes=64,
        placement=Placement((("device", 40.0), ("far", 60.0))),
        direct=frozenset({"device"}),
        takes_tokens=takes_tokens,
    )
    return layout.tiles[0][0]


def cache_of(tile: KVTile, page: tuple[int, int, int], codec: Codec, dtype: DType, device: str) -> TileCache:
    """Random numbers in all pages."""

    def numbers(count: int) -> torch.Tensor:
        return torch.randn(count, *page, device=device).to(getattr(torch, dtype))

    def pages(r: Rectangle) -> Pages:
        plain = numbers(r.num_units)
        stored = torch.zeros(r.num_units, codec.encoded_nbytes(page, dtype), dtype=torch.uint8, device=device)
        codec.encode(plain, stored)
        return Pages(r, stored, page=page, codec=codec, scratch=plain.view(torch.uint8).flatten(), dtype=plain.dtype)

    parts = [KVPart(r, codec.keeps_bytes and r.tier == "device", pages(r), pages(r)) for r in tile.rectangles]
    tails = numbers(len(tile.tail_rows)), numbers(len(tile.tail_rows))
    assert len(parts) > 1
    assert len(tile.tail_rows) > 0
    return TileCache(page[1], page[0], tuple(parts), tile.tail_rows, *tails, None)


def memory_of(cache: TileCache) -> list[torch.Tensor]:
    """Every byte."""
    assert cache.tail_keys is not None
    assert cache.tail_values is not None
    pages = [x.stored for part in cache.parts for x in (part.keys, part.values)]
    return [*pages, cache.tail_keys.view(torch.uint8), cache.tail_values.view(torch.uint8)]


def check(page: tuple[int, int, int], num_heads: int, codec: Codec, dtype: DType, device: str) -> None:
    """Two caches of the same bytes: new tokens put into them, then attended to."""
    (num_kv_heads, page_tokens, head_dim), torch_dtype = page, getattr(torch, dtype)
    cache = cache_of(tile_of(page_tokens, codec), page, codec, dtype, device)
    on_device = attending_on_device(cache, codec, num_heads=num_heads, page=page, dtype=torch_dtype)
    assert on_device.device is not None
    for contexts in CONTEXTS:
        rows = [
            RowStep(row=n, sequence=n, new_tokens=1, context=c) for n, c in zip((0, 1, 2, 4, 5), contexts, strict=True)
        ]
        heads = (num_heads, num_kv_heads, num_kv_heads)
        q, k, v = (torch.randn(len(rows), count, head_dim, device=device).to(torch_dtype) for count in heads)
        k[1, 0, :3] = torch.tensor([torch.inf, torch.nan, -torch.inf], device=device)
        v[4, -1, 2] = torch.nan
        before = [memory.clone() for memory in memory_of(cache)]
        on_device.append(rows, k, v)
        by_kernel = [memory.clone() for memory in memory_of(cache)]
        for memory, bytes_before in zip(memory_of(cache), before, strict=True):
            memory.copy_(bytes_before)
        cache.append(rows, k.nan_to_num(), v.nan_to_num())
        for ours, theirs in zip(by_kernel, memory_of(cache), strict=True):
            assert torch.equal(ours, theirs)
        k[1], v[4] = torch.randn(2, num_kv_heads, head_dim, device=device).to(torch_dtype)
        if dtype != "float16":  # a score below any other; in the first step it is the row's only one
            q[0], k[0] = q[0].abs(), -1e34
        on_device.append(rows, k, v)
        expected = attend_tokens_by_pieces(rows, q, cache, ROWS, SCALE)
        attended = attend_tokens(rows, q.clone(), on_device, ROWS, SCALE)
        assert attended.dtype == torch_dtype
        torch.testing.assert_close(attended, expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def main() -> None:
    from flexflow_engine.runtime import device_kernels  # noqa: PLC0415  # not every machine has Triton

    heads, kv_heads, page_tokens, head_dim, group_size = map(int, sys.argv[1:6])
    device_kernels.FULL_GPU = int(sys.argv[7])
    setattr(device_attention, "working", lambda device, attempt, without: attempt())  # noqa: B010  # mypy sees no such name
    torch.manual_seed(0)
    for dtype in TOLERANCES:
        check((kv_heads, page_tokens, head_dim), heads, codec_of(sys.argv[6], group_size), dtype, "cpu")


if __name__ == "__main__":
    main()
