"""The rates of a GPU and of its link to host memory, measured for some seconds.

    python -m throughput.gpu_rates MODEL GPU_BATCH_SIZE

Prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from statistics import median

import torch

from throughput.published import published_shape
from throughput.roofline import Rates, Shape

COPY_NBYTES = 2**28
MEMORY_NBYTES = 2**31
PREFILL_ROWS = 4096
CALLS, REPEATS = 20, 5


def measure(shape: Shape, gpu_batch_size: int) -> Rates:
    """Everything, one after another."""
    host = torch.zeros(COPY_NBYTES, dtype=torch.uint8).pin_memory()
    device = torch.zeros(COPY_NBYTES, dtype=torch.uint8, device="cuda")
    numbers = torch.zeros(MEMORY_NBYTES // 4, device="cuda")
    return Rates(
        far_read=COPY_NBYTES / _seconds(lambda: device.copy_(host, non_blocking=True)),
        far_write=COPY_NBYTES / _seconds(lambda: host.copy_(device, non_blocking=True)),
        prefill_matmul=_matmul_rate(shape.hidden, PREFILL_ROWS),
        decode_matmul=_matmul_rate(shape.hidden, gpu_batch_size),
        memory_read=MEMORY_NBYTES / _seconds(numbers.sum),
    )


def _seconds(work: Callable[[], object]) -> float:
    """Of one call in a row of calls, by the GPU's own clock."""
    work()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(CALLS):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / CALLS)
    return float(median(times))


def _matmul_rate(hidden: int, rows: int) -> float:
    """Flop a second of the two feed-forward products, whose weights alternate with others, as a layer's do."""
    x = torch.randn(rows, hidden, dtype=torch.bfloat16, device="cuda")
    layers = [torch.randn(4 * hidden, hidden, dtype=torch.bfloat16, device="cuda") * 0.02 for _ in range(4)]

    def feed_forward() -> None:
        for up in layers:
            (x @ up.T) @ up

    return 16 * rows * hidden**2 * len(layers) / _seconds(feed_forward)


if __name__ == "__main__":
    with torch.inference_mode():
        print(json.dumps(asdict(measure(published_shape(sys.argv[1]), int(sys.argv[2])))))
