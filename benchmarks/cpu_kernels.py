"""How fast the host's kernels are, against memory reads and torch's operators measured in the same run.

    python benchmarks/cpu_kernels.py [--json]

reads       64-bit sums over 512 MB
attention   one new token a row over one layer of OPT-1.3B's cache, 64 rows of 256 tokens, in memory of the `cpu` tier:
            GB of keys and values a second, encoded ones counted as the bfloat16 numbers that they stand for; the share
            of reads is the median of rounds in which reads and kernel are measured in turns
decode      a matrix of 8192 x 2048 into bfloat16, G numbers a second
layer       a decoder layer of OPT-1.3B at batch 128 and 160 cached tokens, as a run computes it, all in memory:
            milliseconds, and the rate as a share of bfloat16's. A step is 24 of them and the head.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name
from rich.console import Console
from rich.table import Table
from transformers import OPTConfig, OPTForCausalLM

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.policy import Placement, Policy, WorkloadShape
from flexflow_engine.abc.step import BatchStep, RowStep
from flexflow_engine.checkpoint.importing import import_checkpoint
from flexflow_engine.checkpoint.source import open_checkpoint
from flexflow_engine.cpu.jit import finite_kernel
from flexflow_engine.cpu.settings import one_torch_thread
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.graph.task import Compute, Task, Tile
from flexflow_engine.placement.kv import Rectangle
from flexflow_engine.placement.laying_out import make_layout
from flexflow_engine.placement.memory import memory_table
from flexflow_engine.placement.pages import paged_tensors
from flexflow_engine.planning.plan import describe_tiers
from flexflow_engine.products.matmul import HostProducts, usual_float32_from
from flexflow_engine.runtime.hidden import HiddenStates
from flexflow_engine.runtime.host_attention import HostPages, HostTile
from flexflow_engine.runtime.memory import Memory
from flexflow_engine.runtime.next_tokens import Greedy
from flexflow_engine.runtime.tiles import TileRunner
from flexflow_engine.runtime.token_places import TileCut, TokenPlaces
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt4Options, GroupInt8Codec
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_plugins.models.opt import OPTModel
from flexflow_tiers.cpu import CpuTier
from flexflow_tiers.host import HostMemory
from timing import best_seconds

ROWS, HEADS, HEAD_DIM, PAGE_TOKENS, PAGES = 64, 32, 64, 16, 16
PAGE = HEADS, PAGE_TOKENS, HEAD_DIM
SCALE = HEAD_DIM**-0.5
LAYER_ROWS, LAYER_CONTEXT = 128, 159
CALLS = 7
"""Of which the fastest counts."""
ROUNDS = 5
"""In which kernel and reads are measured in turns; medians count."""
OPT_LAYER: dict[str, Any] = {
    "hidden_size": 2048,
    "word_embed_proj_dim": 2048,
    "ffn_dim": 8192,
    "num_attention_heads": 32,
}
INT4, INT8 = GroupInt4Codec(GroupInt4Options(encoder="fit")), GroupInt8Codec()
INTEGERS = GroupInt4Codec(GroupInt4Options(encoder="fit", int8_activations=True))
Found = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with closing(Workers()) as workers, torch.inference_mode():
        reads = Reads(workers)
        found = {"reads": {"GB/s": reads()}, **_attention(reads, workers), "decode": _decode()}
        with one_torch_thread():
            found["layer"] = _layer(workers)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        Console(width=120).print(_table(found))


def _table(found: Found) -> Table:
    table = Table("measured", "kernel", "value", title=f"{torch.get_num_threads()} threads")
    for measured, values in found.items():
        for name, value in values.items():
            table.add_row(measured, name, f"{value:.2f}")
    return table


class Reads:
    """How fast memory is read, each time that it is called."""

    def __init__(self, workers: Workers) -> None:
        self._numbers, self._workers, self._threads = np.ones(2**26, np.uint64), workers, torch.get_num_threads()

    def __call__(self) -> float:
        """GB/s"""
        parts = np.array_split(self._numbers, self._threads)
        seconds = _best(lambda: self._workers.share(lambda p: _sum(parts[p]), self._threads))
        return self._numbers.nbytes / seconds / 1e9


@finite_kernel
def _sum(numbers: Any) -> Any:
    total = np.uint64(0)
    for i in range(len(numbers)):
        total += numbers[i]
    return total


def _attention(reads: Reads, workers: Workers) -> Found:
    dtypes = (torch.bfloat16, torch.float16)
    found = {f"attention {dtype}": _plain_attention(dtype, reads, workers) for dtype in dtypes}
    encoded = {codec.name: _encoded_attention(codec, workers) for codec in (INT4, INT8)}
    return {**found, "attention of encoded pages": encoded}


def _plain_attention(dtype: torch.dtype, reads: Reads, workers: Workers) -> dict[str, float]:
    """GB/s of the kernel on pages, and of torch on a cache [rows, heads, tokens, head_dim] that is contiguous."""
    memory = [HostMemory(PAGES * ROWS * prod(PAGE) * dtype.itemsize) for _ in "kv"]
    pages = [torch.from_numpy(one.view).view(PAGES, ROWS, -1) for one in memory]
    for numbers in pages:
        numbers.view(dtype).normal_()
    nbytes, q = sum(x.nbytes for x in pages), torch.randn(ROWS, HEADS, HEAD_DIM).to(dtype)
    k, v = (x.view(dtype).view(ROWS * HEADS, -1, HEAD_DIM) for x in pages)
    query, (k4, v4) = q.view(ROWS * HEADS, 1, HEAD_DIM), (x.view(ROWS, HEADS, -1, HEAD_DIM) for x in (k, v))

    def bmm() -> torch.Tensor:
        return torch.bmm((torch.bmm(query, k.transpose(1, 2)) * SCALE).float().softmax(-1).to(dtype), v)

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k4, v4, scale=SCALE)

    kernel = _kernel_run(pages, q, None, workers)
    rounds = [(reads(), nbytes / _best(kernel) / 1e9) for _ in range(ROUNDS)]
    return {
        "kernel, GB/s": median(rate for _, rate in rounds),
        "kernel, share of reads": median(rate / read for read, rate in rounds),
        "torch bmm, GB/s": nbytes / _best(bmm) / 1e9,
        "torch SDPA, GB/s": nbytes / _best(sdpa) / 1e9,
    }


def _encoded_attention(codec: Codec, workers: Workers) -> float:
    numbers = PAGES * ROWS * prod(PAGE)
    pages = [torch.empty(PAGES * ROWS, codec.encoded_nbytes(PAGE, "bfloat16"), dtype=torch.uint8) for _ in "kv"]
    for encoded in pages:
        codec.encode(torch.randn(PAGES * ROWS, *PAGE).bfloat16(), encoded)
    q = torch.randn(ROWS, HEADS, HEAD_DIM).bfloat16()
    run = _kernel_run([x.view(PAGES, ROWS, -1) for x in pages], q, codec, workers)
    return 2 * numbers * 2 / _best(run) / 1e9


def _kernel_run(
    pages: list[torch.Tensor], q: torch.Tensor, codec: Codec | None, workers: Workers
) -> Callable[[], object]:
    rectangle = Rectangle("device", "kv", 0, ROWS, 0, PAGES)
    decoder = None if codec is None else codec.kernel_decoder(PAGE)
    tile = HostTile(
        [HostPages(rectangle, pages[0], pages[1], takes_tokens=True, decoder=decoder)],
        tail_rows=range(0),
        tails=None,
        page=PAGE,
        dtype=q.dtype,
        workers=workers,
    )
    rows = [RowStep(row=row, sequence=row, new_tokens=1, context=PAGES * PAGE_TOKENS - 1) for row in range(ROWS)]
    cut = TileCut.of(num_kv_heads=PAGE[0], page_tokens=PAGE[1], parts=[(rectangle, True)], tail_rows=range(0))
    places = TokenPlaces(rows, cut, q.device)
    return lambda: tile.attend(places, q, SCALE)


def _decode() -> dict[str, float]:
    found, threads = {}, torch.get_num_threads()
    for codec in (INT4, INT8):
        values = torch.randn(1, 8192, 2048).bfloat16()
        encoded = torch.empty((1, codec.encoded_nbytes((8192, 2048), "bfloat16")), dtype=torch.uint8)
        codec.encode(values, encoded)
        for count in sorted({threads, 1}):
            torch.set_num_threads(count)
            seconds = _best(lambda codec=codec, encoded=encoded, values=values: codec.decode(encoded, values))  # type: ignore[misc]  # defaults bind the loop's values
            found[f"{codec.name}, {count} threads, G/s"] = values.numel() / seconds / 1e9
    torch.set_num_threads(threads)
    return found


def _layer(workers: Workers) -> dict[str, float]:
    """The layer in bfloat16, with 4-bit weights, as numbers and as integers, and with a 4-bit cache too."""
    none, found = NoneCodec(), dict[str, float]()
    cases = {
        "bfloat16": (none, none),
        "int4 weights": (INT4, none),
        "int4 weights and cache": (INT4, INT4),
        "int4 weights, int8 activations": (INTEGERS, none),
        "the same and int4 cache": (INTEGERS, INT4),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        config = OPTConfig(**OPT_LAYER, num_hidden_layers=1, vocab_size=512, max_position_embeddings=256)
        OPTForCausalLM(config).save_pretrained(path / "checkpoint")
        for name, codecs in cases.items():
            with _one_layer(path, *codecs, workers) as (runner, task):
                found[f"{name}, ms"] = 1000 * _best(lambda runner=runner, task=task: runner(task))  # type: ignore[misc]  # as above
    rates = {f"{name}, share of bfloat16's rate": found["bfloat16, ms"] / found[f"{name}, ms"] for name in cases}
    return found | rates


@contextmanager
def _one_layer(folder: Path, weights: Codec, cache: Codec, workers: Workers) -> Iterator[tuple[TileRunner, Task]]:
    """A runner whose decoder layer has random weights, hidden states and cache, and a step's task of the layer."""
    opened = open_checkpoint(str(folder / "checkpoint"), OPTModel, dtype="bfloat16")
    everything = Placement((("device", 100.0),))
    layout = make_layout(
        model=opened.model,
        tensors=paged_tensors(opened.model, weights, NoneCodec()),
        kv_codec=cache,
        policy=Policy(
            gpu_batch_size=LAYER_ROWS,
            num_gpu_batches=1,
            weights=everything,
            kv_cache=everything,
            activations=everything,
            attention="device",
            kv_page_tokens=PAGE_TOKENS,
        ),
        workload=WorkloadShape((1,) * LAYER_ROWS, (LAYER_CONTEXT + 1,) * LAYER_ROWS),
        tiers=describe_tiers({"device": CpuTier}, {"device": 2**40}),
    )
    table = memory_table(layout)
    with ExitStack() as stack:
        store = stack.enter_context(
            import_checkpoint(opened, opened.model, weights, NoneCodec(), folder / "store", lambda done, total: None)
        )
        tier = CpuTier(label="device", budget_bytes=table.peak_bytes("device"), options=CpuTier.Options())
        tier = stack.enter_context(closing(tier))
        memory = stack.enter_context(closing(Memory(layout, {"device": tier}, store)))
        runner = TileRunner(
            layout=layout,
            memory=memory,
            model=opened.model,
            kv_codec=cache,
            device="cpu",
            prompts=[],
            workers=workers,
            products=HostProducts(
                workers,
                torch.bfloat16,
                usual_float32_from("bfloat16"),
                kept_nbytes=opened.model.workspace_nbytes("decoder", LAYER_ROWS),
            ),
            source=Greedy(),
        )
        steps = [_step(context) for context in range(LAYER_CONTEXT)]
        hidden = torch.randn(LAYER_ROWS, OPT_LAYER["hidden_size"]).bfloat16()
        HiddenStates(layout, memory, torch.bfloat16).write(steps[0].batch, None, hidden)
        for step in steps[:-1]:
            runner(_task(step))
        yield runner, _task(steps[-1])


def _step(context: int) -> Compute:
    """The layer, with rows that have so many tokens."""
    rows = tuple(RowStep(row=r, sequence=r, new_tokens=1, context=context) for r in range(LAYER_ROWS))
    return Compute(layer=1, batch=BatchStep(0, rows))


def _task(operation: Compute) -> Task:
    tile = Tile(step=0, layer=1, gpu_batch=0)
    return Task(key="layer", kind="compute", tile=tile, lane="compute", operation=operation, reads=(), writes=())


def _best(run: Callable[[], object]) -> float:
    return best_seconds(run, CALLS)


if __name__ == "__main__":
    main()
