"""How fast the kernels for a GPU are, against copies of its memory in the same run.

    python benchmarks/gpu_kernels.py

Needs an NVIDIA GPU and Triton. Shapes are those of OPT-13B. Medians, by the GPU's own clock, with an empty cache.

copy        1 GiB from memory to memory; read and written bytes count
decode      a feed-forward matrix of 4 bits to bfloat16; bytes of either count
encode      keys of 512 rows' pages of 4 tokens to 4 bits, as a cache is
attention   one new token a row, 48 cached ones, 40 heads of 128, plain or of 4 bits; cached bytes count
product     of 512 rows, or of 128, with two matrices of a layer
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.step import RowStep
from flexflow_engine.placement.kv import Rectangle
from flexflow_engine.runtime.device_attention import DevicePages, DeviceTile, device_kernels
from flexflow_engine.runtime.token_places import TileCut, TokenPlaces
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt4Options
from flexflow_plugins.codecs.none import NoneCodec
from throughput.table import markdown

HIDDEN, HEADS, HEAD_DIM, TOKENS = 5120, 40, 128, 48
ATTENTION = ((512, 1), (256, 4), (512, 16))
"""Rows, and tokens of a page."""
PRODUCTS = ((512, HIDDEN), (512, 4 * HIDDEN), (128, HIDDEN), (128, 4 * HIDDEN))
"""Rows, and columns of the result."""
COPY_NBYTES = 2**30
GPU = torch.device("cuda")
FITTED = GroupInt4Codec(GroupInt4Options(encoder="fit"))


@dataclass(frozen=True, slots=True)
class Kernel:
    """A call, and what it does each time."""

    name: str
    call: Callable[[], object]
    nbytes: float = 0
    """Read or written."""
    flops: float = 0


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("error: this measures an NVIDIA GPU, and torch sees none")
    with torch.inference_mode():
        rows = [_row(kernel) for kernel in _kernels()]
    print(markdown(("kernel", "us", "TB/s", "Tflop/s"), rows))


def _row(kernel: Kernel) -> list[str]:
    from triton.testing import do_bench  # noqa: PLC0415  # there is no Triton without a GPU

    print(kernel.name, file=sys.stderr)
    us = 1000 * do_bench(kernel.call, return_mode="median")
    rates = [f"{work / us / 1e6:.2f}" if work else "" for work in (kernel.nbytes, kernel.flops)]
    return [kernel.name, f"{us:.1f}", *rates]


def _kernels() -> Iterator[Kernel]:
    """One after another, so that each finds the memory of the others free."""
    source, target = (torch.zeros(COPY_NBYTES, dtype=torch.uint8, device=GPU) for _ in range(2))
    yield Kernel("copy", lambda: target.copy_(source), nbytes=2 * COPY_NBYTES)
    yield _decode()
    yield _encode()
    for codec in NoneCodec(), FITTED:
        for rows, page_tokens in ATTENTION:
            yield from _attention(rows, page_tokens, codec)
    for rows, columns in PRODUCTS:
        yield _product(rows, columns)


def _decode() -> Kernel:
    """In units of 16 rows."""
    codec, shape = GroupInt4Codec(), (16, HIDDEN)
    encoded = torch.randint(
        0, 256, (4 * HIDDEN // 16, codec.encoded_nbytes(shape, "bfloat16")), dtype=torch.uint8, device=GPU
    )
    numbers = torch.empty((len(encoded), *shape), dtype=torch.bfloat16, device=GPU)
    return Kernel("decode", lambda: codec.decode(encoded, numbers), nbytes=encoded.nbytes + numbers.nbytes)


def _encode() -> Kernel:
    codec, shape = FITTED, (HEADS, 4, HEAD_DIM)
    numbers = torch.randn((512, *shape), device=GPU).bfloat16()
    encoded = torch.empty((512, codec.encoded_nbytes(shape, "bfloat16")), dtype=torch.uint8, device=GPU)
    return Kernel("encode", lambda: codec.encode(numbers, encoded), nbytes=encoded.nbytes + numbers.nbytes)


def _attention(rows: int, page_tokens: int, codec: Codec) -> Iterator[Kernel]:
    page, tokens = (HEADS, page_tokens, HEAD_DIM), TOKENS - TOKENS % page_tokens
    kernels = device_kernels(GPU, torch.bfloat16, HEADS, page, codec)
    if kernels is None:
        sys.exit("error: Triton is missing or does not work here")
    pages = torch.randn((tokens // page_tokens * rows, *page), device=GPU).bfloat16()
    stored = torch.empty((len(pages), codec.encoded_nbytes(page, "bfloat16")), dtype=torch.uint8, device=GPU)
    codec.encode(pages, stored)
    stored = stored.view(tokens // page_tokens, rows, -1)
    parts = [DevicePages(Rectangle("", "", 0, rows, 0, tokens // page_tokens), stored, stored.clone(), True)]
    tile = DeviceTile(kernels, parts, tail_rows=range(0), tails=None, num_heads=HEADS, page=page, codec=codec)
    steps = [RowStep(row=row, sequence=row, new_tokens=1, context=tokens - 1) for row in range(rows)]
    cut = TileCut.of(
        num_kv_heads=HEADS, page_tokens=page_tokens, parts=[(parts[0].rectangle, True)], tail_rows=range(0)
    )
    places, query = TokenPlaces(steps, cut, GPU), torch.randn((rows, HEADS, HEAD_DIM), device=GPU).bfloat16()
    name = f"attention, {codec.name}, {rows} rows, pages of {page_tokens}"
    yield Kernel(name, lambda: tile.attend(places, query, HEAD_DIM**-0.5), nbytes=2 * stored.nbytes)


def _product(rows: int, columns: int) -> Kernel:
    x, matrix = (torch.randn(shape, device=GPU).bfloat16() for shape in ((rows, HIDDEN), (columns, HIDDEN)))
    return Kernel(
        f"product, {rows} x {HIDDEN} x {columns}", lambda: F.linear(x, matrix), flops=2 * rows * HIDDEN * columns
    )


if __name__ == "__main__":
    main()
