"""Attention's kernels for a GPU: they compile for those that people have, and attend as torch's operators do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="Triton comes with torch for GPUs alone")

PIECE = {"rows": "*i64", "ends": "*i64"}
SIZES = dict.fromkeys(("first_end", "first_row", "num_rows", "tokens", "columns", "column"), "i32")


@pytest.mark.parametrize("architecture", [75, 80, 90])
@pytest.mark.parametrize("numbers", ["*fp32", "*bf16", "*fp16"])
@pytest.mark.parametrize("name", ["_score", "_accumulate"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "page_tokens", "head_dim", "warps"), [(40, 40, 4, 128, 1), (32, 8, 16, 80, 4)]
)
def test_they_compile(
    name: str, heads: int, kv_heads: int, page_tokens: int, head_dim: int, warps: int, numbers: str, architecture: int
) -> None:
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    from flexflow_engine.runtime import device_kernels  # noqa: PLC0415

    function = getattr(device_kernels, name)
    pointers = (
        {"query": numbers, "keys": numbers, "scores": "*fp32", "scale": "fp32"}
        if name == "_score"
        else {"weights": "*fp32", "values": numbers, "output": "*fp32"}
    )
    constants = {
        "num_heads": heads,
        "group": heads // kv_heads,
        "page_tokens": page_tokens,
        "head_dim": head_dim,
        "width": 128,
        "block": device_kernels.TOKENS,
    }
    places = {(function.arg_names.index(key),): value for key, value in constants.items()}
    types = pointers | PIECE | SIZES | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=types, constexprs=places)
    target, options = GPUTarget("cuda", architecture, 32), {"num_warps": warps}
    assert triton.compile(source, target=target, options=options).asm["cubin"]


INTERPRETED = """
import torch
from flexflow_engine.abc.policy import Placement
from flexflow_engine.abc.step import RowStep
from flexflow_engine.placement.kv import place_kv
from flexflow_engine.runtime import device_kernels
from flexflow_engine.runtime.attention import attend_tokens_by_kernels, attend_tokens_by_pieces
from flexflow_engine.runtime.kv_cache import KVPart, TileCache
from flexflow_engine.runtime.kv_pages import Pages
from flexflow_plugins.codecs.none import NoneCodec

torch.manual_seed(0)
page, shares = (KV_HEADS, PAGE_TOKENS, HEAD_DIM), (("device", 40.0), ("far", 60.0))
layout = place_kv(num_layers=1, gpu_batch_size=6, num_gpu_batches=1, cached_tokens=90, page_tokens=PAGE_TOKENS,
                  page_nbytes=64, tail_page_nbytes=64, placement=Placement(shares), direct=frozenset({"device"}),
                  takes_tokens=frozenset({"device"}))
tile = layout.tiles[0][0]
for dtype in torch.float32, torch.bfloat16:
    def pages(r):
        stored = torch.randn(r.num_units, *page).to(dtype).view(torch.uint8)
        return Pages(r, stored, page=page, codec=NoneCodec(), scratch=None, dtype=dtype)

    parts = tuple(KVPart(r, r.tier == "device", pages(r), pages(r)) for r in tile.rectangles)
    tails = [torch.randn(len(tile.tail_rows), *page).to(dtype) for _ in "kv"]
    cache = TileCache(PAGE_TOKENS, KV_HEADS, parts, tile.tail_rows, *tails, None)
    assert len(parts) > 1 and len(tile.tail_rows) > 0
    for contexts in [(0, 1, 2, 3, 4), (88, 5, PAGE_TOKENS - 1, PAGE_TOKENS, 37)]:
        rows = [RowStep(row=row, sequence=row, new_tokens=1, context=c) for row, c in zip((0, 1, 2, 4, 5), contexts)]
        q = torch.randn(5, HEADS, HEAD_DIM).to(dtype)
        by_kernels = attend_tokens_by_kernels(device_kernels, rows, q, cache, 0.3)
        by_pieces = attend_tokens_by_pieces(rows, q, cache, 6, 0.3)
        assert by_kernels.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(by_kernels, by_pieces, atol=tolerance, rtol=tolerance)
"""


@pytest.mark.parametrize(("heads", "kv_heads", "page_tokens", "head_dim"), [(4, 4, 4, 16), (6, 2, 5, 20)])
def test_they_attend_as_torchs_operators_do_in_tritons_interpreter(
    heads: int, kv_heads: int, page_tokens: int, head_dim: int
) -> None:
    """Which is chosen when the kernels are imported."""
    sizes = {"KV_HEADS": kv_heads, "HEADS": heads, "PAGE_TOKENS": page_tokens, "HEAD_DIM": head_dim}
    code = INTERPRETED
    for name, size in sizes.items():
        code = code.replace(name, str(size))
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
