"""What the host's own code takes: compiling steps, handing tasks to lanes, calling kernels, looking rows up."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.hardware import HostCosts
from flexflow_engine.abc.model import Model
from flexflow_engine.abc.policy import Placement, Policy, WorkloadShape
from flexflow_engine.abc.step import BatchStep, RowStep, Step
from flexflow_engine.abc.tier import Tier
from flexflow_engine.graph.builder import Frontier
from flexflow_engine.graph.compile import StepCompiler
from flexflow_engine.placement.laying_out import make_layout
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.pages import paged_tensors
from flexflow_engine.placement.workspace import FAR_LOOK_UP_ROWS
from flexflow_engine.planning.plan import describe_tiers
from flexflow_engine.planning.profile.attention import one_more_token
from flexflow_engine.planning.profile.bench import Bench
from flexflow_engine.planning.profile.extent import Extent
from flexflow_engine.runtime.executor import DataflowExecutor
from flexflow_engine.runtime.rows import RowMoves
from flexflow_engine.runtime.trace import FoldedTrace

STEPS = 8
"""Steps that are compiled and handed over; their median counts."""
GPU_BATCHES = 2
ROWS = 4
LOOK_UPS = 50


@dataclass(frozen=True, slots=True)
class TaskCosts:
    """Seconds a task, of the thread that compiles and of the lane that runs it."""

    compile_s: float
    run_s: float


def host_costs(bench: Bench, extent: Extent, tasks: TaskCosts) -> HostCosts:
    """What the host's code takes whatever the device: tasks to compile, rows to put to their places."""
    return HostCosts(compile_task_s=tasks.compile_s, gather_row_s=_gather_row_s(bench, extent))


def layer_s(bench: Bench, extent: Extent, codec: Codec) -> float:
    """What a decoder layer takes beside its matrices and what is cached.

    Calls find nothing in the processor's caches after a matrix has passed through, and take several times what they
    take in a loop of their own. So a layer is timed with its matrices and without everything else, and subtracted.
    """
    width, matmuls = extent.heads * extent.head_dim, 6
    attend, cached_s = one_more_token(bench, extent, codec)
    matrices = cycle([bench.numbers(width, width) for _ in range(_cold_matrices(bench, extent, width))])
    x, vector = bench.numbers(extent.attention_rows, width), bench.numbers(width)
    multiply = bench.multiply

    def products() -> None:
        for _ in range(matmuls):
            multiply(x, next(matrices), None)

    def layer() -> None:
        for _ in range(2):
            F.layer_norm(x, (width,), vector, vector)
            x.add_(multiply(x, next(matrices), vector)).clamp_(0.5, 1.5)
            torch.relu_(multiply(x, next(matrices), vector))
            multiply(x, next(matrices), vector)
        attend(x)

    times = [(bench.time(layer), bench.time(products)) for _ in range(3)]
    return max(0.0, median(whole - part for whole, part in times) - cached_s)


def _cold_matrices(bench: Bench, extent: Extent, width: int) -> int:
    """How many are more than the processor's caches hold."""
    return max(1, extent.cold_nbytes // (width**2 * bench.torch_dtype.itemsize))


def measure_tasks(model: Model, codec: Codec, tier: Tier) -> TaskCosts:
    """Compile the graphs of a model's steps, and run them through the lanes with nothing to do in them."""
    compiler = StepCompiler(_resident_layout(model, codec, type(tier)))
    trace = FoldedTrace()
    executor = DataflowExecutor(lambda task: None, compiler.widths, lambda lane: tier.lane_context(), trace)
    compiled, ran, frontier = [], [], Frontier()
    with closing(executor):
        for index in range(STEPS):
            begin = time.perf_counter()
            graph, frontier = compiler.compile(_step(index), frontier)
            middle = time.perf_counter()
            executor.submit(graph)
            executor.wait(index)
            compiled.append((middle - begin) / len(graph.tasks))
            ran.append((time.perf_counter() - middle) / len(graph.tasks))
            trace.fold(index)
    return TaskCosts(compile_s=median(compiled), run_s=median(ran))


def _resident_layout(model: Model, codec: Codec, tier: type[Tier]) -> Layout:
    everything = Placement(((tier.name, 100.0),))
    return make_layout(
        model=model,
        tensors=paged_tensors(model, codec, codec),
        kv_codec=codec,
        policy=Policy(
            gpu_batch_size=ROWS,
            num_gpu_batches=GPU_BATCHES,
            weights=everything,
            kv_cache=everything,
            activations=everything,
            attention="device",
            kv_page_tokens=16,
        ),
        workload=WorkloadShape((1,) * (GPU_BATCHES * ROWS), (STEPS,) * (GPU_BATCHES * ROWS)),
        tiers=describe_tiers({tier.name: tier}, {tier.name: 0}),
    )


def _step(index: int) -> Step:
    """Every sequence one token further; the first is its prompt."""
    return Step(
        index,
        tuple(
            BatchStep(k, tuple(RowStep(row=r, sequence=k * ROWS + r, new_tokens=1, context=index) for r in range(ROWS)))
            for k in range(GPU_BATCHES)
        ),
    )


def _gather_row_s(bench: Bench, extent: Extent) -> float:
    """As the runtime puts rows that it has read from a far tier to their places, some at a time; of host memory it puts
    all at once, which takes no longer a row.
    """
    rows, target = (torch.zeros((FAR_LOOK_UP_ROWS, extent.features), dtype=bench.torch_dtype) for _ in range(2))
    places = np.arange(FAR_LOOK_UP_ROWS)

    def look_up() -> None:
        RowMoves(places, places, rows.device).put(rows, target)

    look_up()
    begin = time.perf_counter()
    for _ in range(LOOK_UPS):
        look_up()
    return (time.perf_counter() - begin) / (LOOK_UPS * FAR_LOOK_UP_ROWS)
