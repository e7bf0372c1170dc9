"""Attention's kernels for a GPU: they compile for those that people have, and attend as torch's operators do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from attention_on_device import TOLERANCES, check, codec_of
from flexflow_engine.abc.dtypes import DType

triton = pytest.importorskip("triton", reason="Triton comes with torch for GPUs alone")

PLACES = dict.fromkeys(("table", "rows", "paged", "tails"), "*i64") | {"num_parts": "i32", "first_tail_row": "i32"}
CODECS = ["none", "fit", "minmax", "int8"]


@pytest.mark.parametrize("architecture", [75, 80, 90])
@pytest.mark.parametrize("numbers", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "page_tokens", "head_dim", "warps"),
    [(40, 40, 4, 128, 1), (32, 8, 16, 80, 4), (4, 4, 4, 20, 4)],
)
def test_attention_compiles(
    codec: str, heads: int, kv_heads: int, page_tokens: int, head_dim: int, warps: int, numbers: str, architecture: int
) -> None:
    page = kv_heads, page_tokens, head_dim
    chosen = codec_of(codec, 64)
    decoder = None if chosen.keeps_bytes else chosen.device_decoder(page)
    runs = 16 if head_dim > 20 else 4
    constants = {
        "num_heads": heads,
        "group": heads // kv_heads,
        "page_tokens": page_tokens,
        "head_dim": head_dim,
        "runs": runs,
        "page_nbytes": chosen.encoded_nbytes(page, "float32" if numbers == "fp32" else "bfloat16"),
        "alignment": 8,
        "tail_alignment": 16,
        "decode": decoder and decoder.function,
        "settings": decoder and decoder.settings,
        "tailed": True,
        "lanes": 32 * warps // runs,
    }
    pointers = dict.fromkeys(("query", "output", "tail_keys", "tail_values"), f"*{numbers}") | PLACES
    assert compiled("_attend", pointers | {"scale": "fp32"}, constants, architecture, warps)


@pytest.mark.parametrize("architecture", [75, 80, 90])
@pytest.mark.parametrize("numbers", ["fp32", "bf16", "fp16"])
def test_appending_compiles(numbers: str, architecture: int) -> None:
    pointers = dict.fromkeys(("keys", "values", "tail_keys", "tail_values"), f"*{numbers}") | PLACES
    constants = {"num_kv_heads": 8, "page_tokens": 4, "head_dim": 80, "width": 128, "page_nbytes": 5120, "largest": 6e4}
    assert compiled("_append", pointers, constants, architecture, warps=1)


def compiled(name: str, types: dict[str, str], constants: Mapping[str, object], architecture: int, warps: int) -> bytes:
    """The machine code."""
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    from flexflow_engine.runtime import device_kernels  # noqa: PLC0415

    function = getattr(device_kernels, name)
    places = {(function.arg_names.index(key),): value for key, value in constants.items()}
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature={key: signature[key] for key in function.arg_names}, constexprs=places)
    target, options = GPUTarget("cuda", architecture, 32), {"num_warps": warps}
    code: bytes = triton.compile(source, target=target, options=options).asm["cubin"]
    return code


@pytest.mark.parametrize("full_gpu", [1, 40])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "page_tokens", "head_dim", "group_size"),
    [(4, 4, 4, 16, 64), (6, 2, 5, 20, 20), (4, 2, 1, 128, 64)],
)
def test_they_cache_and_attend_as_torchs_operators_do_in_tritons_interpreter(
    heads: int, kv_heads: int, page_tokens: int, head_dim: int, group_size: int, codec: str, full_gpu: int
) -> None:
    """Which is chosen when the kernels are imported. With one warp for each head of a row and with four."""
    script = Path(__file__).parents[1] / "attention_on_device.py"
    sizes = map(str, (heads, kv_heads, page_tokens, head_dim, group_size))
    command = [sys.executable, str(script), *sizes, codec, str(full_gpu)]
    subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)


@pytest.mark.cuda
@pytest.mark.parametrize("full_gpu", [1, 8192])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "page_tokens", "head_dim", "group_size"),
    [(4, 4, 4, 64, 64), (6, 2, 5, 20, 20), (4, 2, 1, 128, 64), (4, 2, 16, 80, 48), (2, 1, 3, 256, 96)],
)
def test_they_cache_and_attend_as_torchs_operators_do_on_a_gpu(
    heads: int,
    kv_heads: int,
    page_tokens: int,
    head_dim: int,
    group_size: int,
    codec: str,
    dtype: DType,
    full_gpu: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one warp for each head of a row, as large GPU batches have, and with four."""
    from flexflow_engine.runtime import device_kernels  # noqa: PLC0415

    monkeypatch.setattr(device_kernels, "FULL_GPU", full_gpu)
    check((kv_heads, page_tokens, head_dim), heads, codec_of(codec, group_size), dtype, "cuda")


def test_constants_are_handed_over_in_the_order_of_the_parameters() -> None:
    from flexflow_engine.runtime import device_kernels as kernels  # noqa: PLC0415

    for kernel, shape in ((kernels._attend, kernels.AttendingShape), (kernels._append, kernels.AppendingShape)):
        assert kernel.arg_names[-len(shape._fields) :] == list(shape._fields)
