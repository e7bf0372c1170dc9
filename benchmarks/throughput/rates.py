"""The rates of this machine's resources, measured for a few seconds each.

    python -m throughput.rates FOLDER MODEL GPU_BATCH_SIZE [int8]

FOLDER has the files that are read, and takes a file that is written and removed. int8: products of integers count too.
Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.abc.tier import HOST
from flexflow_engine.cpu.mapping import populated
from flexflow_engine.cpu.settings import one_torch_thread
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.products.matmul import HostProducts, Multiply, multiplication, usual_float32_from
from flexflow_engine.store.access import READS_AT_ONCE
from flexflow_tiers.zarr import ZarrTier
from throughput.published import published_shape
from throughput.roofline import Rates, Shape

BLOCK_NBYTES = 8 * 2**20
DISK_NBYTES = 2**30
"""Read, and written."""
PREFILL_ROWS = 1024
REPEATS = 3
MATMUL_SECONDS = 1.0
MEMORY_NBYTES = 2**29


def measure(shape: Shape, gpu_batch_size: int, folder: Path, *, int8: bool) -> Rates:
    """Everything, one after another. int8: whether the run may multiply integers."""
    files = sorted(folder.glob("*.safetensors"))
    written = folder / "rates.tmp"
    return Rates(
        far_read=_median(lambda: _read_rate(files)),
        far_write=_median(lambda: _write_rate(written)),
        prefill_matmul=_matmul_rate(shape.hidden, PREFILL_ROWS, int8=int8),
        decode_matmul=_matmul_rate(shape.hidden, gpu_batch_size, int8=int8),
        memory_read=_memory_rate(),
    )


def _median(measure_once: Callable[[], float]) -> float:
    return median(measure_once() for _ in range(REPEATS))


def _read_rate(files: list[Path]) -> float:
    """Bytes a second over blocks that are spread evenly over the files, so that no cache of the disk's has them all."""
    sizes = {path: path.stat().st_size for path in files}
    blocks = [(path, at) for path in files for at in range(0, sizes[path] - BLOCK_NBYTES, BLOCK_NBYTES)]
    chosen = blocks[:: max(1, len(blocks) * BLOCK_NBYTES // DISK_NBYTES)]
    descriptors = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files}
    buffers = threading.local()  # one a thread: fresh memory would be timed with every block

    def make_buffer() -> None:
        buffers.own = populated(BLOCK_NBYTES)

    def read(block: tuple[Path, int]) -> int:
        return os.preadv(descriptors[block[0]], [buffers.own], block[1])

    try:
        started = time.perf_counter()
        with ThreadPoolExecutor(READS_AT_ONCE, initializer=make_buffer) as threads:
            nbytes = sum(threads.map(read, chosen))
        return nbytes / (time.perf_counter() - started)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _write_rate(path: Path) -> float:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        with populated(BLOCK_NBYTES) as buffer, ThreadPoolExecutor(ZarrTier.write_concurrency) as threads:
            buffer.write(os.urandom(BLOCK_NBYTES))
            started = time.perf_counter()
            starts = range(0, DISK_NBYTES, BLOCK_NBYTES)
            nbytes = sum(threads.map(lambda at: os.pwritev(descriptor, [buffer], at), starts))
            return nbytes / (time.perf_counter() - started)
    finally:
        os.close(descriptor)
        path.unlink()


def _matmul_rate(hidden: int, rows: int, *, int8: bool) -> float:
    """The best that the processor does with `rows` tokens: bfloat16 as torch multiplies it and as the engine does, and
    float32, which is the faster format where a processor has no instructions for bfloat16. int8: and 8-bit integers
    without scales, as torch multiplies them.
    """
    torchs = max(_feed_forward_rate(hidden, rows, dtype, F.linear) for dtype in (torch.bfloat16, torch.float32))
    if int8:
        torchs = max(torchs, _integer_rate(hidden, rows))
    with closing(Workers()) as workers, one_torch_thread():
        ours = multiplication(
            HOST,
            HostProducts(workers, torch.bfloat16, usual_float32_from("bfloat16"), kept_nbytes=16 * rows * hidden),
        )
        return max(torchs, _feed_forward_rate(hidden, rows, torch.bfloat16, ours))


def _feed_forward_rate(hidden: int, rows: int, dtype: torch.dtype, multiply: Multiply) -> float:
    """Of the two feed-forward products of `rows` tokens: two thirds of a decoder layer's work."""
    x = torch.randn(rows, hidden, dtype=dtype)

    def feed_forward(up: torch.Tensor) -> None:
        multiply(multiply(x, up, None), up.view(up.shape[1], up.shape[0]), None)

    return _layers_rate(hidden, rows, dtype, feed_forward)


def _integer_rate(hidden: int, rows: int) -> float:
    """The same of integers; what leaves a product isn't rounded to enter the next one."""
    x, wide = (torch.randint(-127, 128, (rows, width), dtype=torch.int8) for width in (hidden, 4 * hidden))

    def feed_forward(up: torch.Tensor) -> None:
        torch._int_mm(x, up.T)  # torch has no other name for it
        torch._int_mm(wide, up.view(up.shape[1], up.shape[0]).T)  # as above

    return _layers_rate(hidden, rows, torch.int8, feed_forward)


def _layers_rate(hidden: int, rows: int, dtype: torch.dtype, feed_forward: Callable[[torch.Tensor], None]) -> float:
    """Flop a second, with weights [4 * hidden, hidden] that alternate with others, as a layer's do."""
    layers = [torch.randint(-9, 10, (4 * hidden, hidden)).to(dtype) for _ in range(4)]
    feed_forward(layers[0])
    seconds, runs = 0.0, 0
    while seconds < MATMUL_SECONDS:
        started = time.perf_counter()
        for up in layers:
            feed_forward(up)
        seconds, runs = seconds + time.perf_counter() - started, runs + len(layers)
    return runs * 16 * rows * hidden**2 / seconds


def _memory_rate() -> float:
    numbers = torch.zeros(MEMORY_NBYTES // 4)
    rates = []
    for _ in range(2 * REPEATS):
        started = time.perf_counter()
        numbers.sum()
        rates.append(numbers.nbytes / (time.perf_counter() - started))
    return max(rates)


if __name__ == "__main__":
    folder, model, rows, *further = sys.argv[1:]
    assert further in ([], ["int8"]), further
    with torch.inference_mode():
        rates = measure(published_shape(model), int(rows), Path(folder), int8=bool(further))
    print(json.dumps(asdict(rates)))
