"""One run on open tiers: memory, lanes and the loop that keeps two steps in flight."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.model import Model
from flexflow_engine.abc.policy import TierDescription
from flexflow_engine.abc.step import Step
from flexflow_engine.abc.tier import HOST, LaneContext, Tier
from flexflow_engine.cpu.settings import one_torch_thread, quick_switches, standing_heap
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.gpu.settings import without_cudnn_attention
from flexflow_engine.graph.builder import Frontier, TaskGraph
from flexflow_engine.graph.check import check_graph
from flexflow_engine.graph.compile import StepCompiler
from flexflow_engine.graph.lanes import read_lane, write_lane
from flexflow_engine.graph.task import ATTENTION_LANE
from flexflow_engine.jobs.batching import Batcher, FinishedSequence
from flexflow_engine.placement.layout import Layout
from flexflow_engine.products.matmul import HostProducts
from flexflow_engine.runtime.executor import ContextFor, DataflowExecutor, Executor, RunTask
from flexflow_engine.runtime.memory import Memory
from flexflow_engine.runtime.next_tokens import TokenArray, TokenSource
from flexflow_engine.runtime.tiles import TileRunner
from flexflow_engine.runtime.trace import Trace
from flexflow_engine.runtime.warm_up import load_kernels
from flexflow_engine.store.weights import WeightStore

CHECKED_STEPS = 3
"""Steps whose graphs are checked: the first prompts, the first tokens, and how the two join."""

OnStep = Callable[[Step, Sequence[FinishedSequence]], None]


@dataclass(frozen=True, slots=True)
class StepTime:
    """When a step ended, in seconds since the run began; `step` tells what it computed."""

    step: Step
    end_s: float


class Session:
    """Owns the regions and the lanes of a run; the tiers stay their opener's."""

    def __init__(
        self,
        *,
        layout: Layout,
        tiers: Mapping[str, Tier],
        model: Model,
        kv_codec: Codec,
        store: WeightStore,
        prompts: Sequence[TokenArray],
        source: TokenSource,
        float32_from: int | None,
        products: type[HostProducts],
        executor: Callable[[RunTask, Mapping[str, int], ContextFor, Trace], Executor] = DataflowExecutor,
        trace: Callable[[], Trace] = Trace,
    ) -> None:
        """prompts: each sequence's token ids, int64. source: of the tokens that follow them. float32_from: tokens from
        which on the host's products are faster in float32; None: never. products: who makes them. trace: a FoldedTrace
        where nobody reads single events.
        """
        self._layout = layout
        self._compiler = StepCompiler(layout, store.page_nbytes)
        self.trace = trace()
        with ExitStack() as stack:
            memory = stack.enter_context(closing(Memory(layout, tiers, store)))
            workers = stack.enter_context(closing(Workers()))
            multiplying = products(
                workers,
                getattr(torch, model.dtype),
                float32_from,
                kept_nbytes=model.workspace_nbytes("decoder", layout.embed_rows),
            )
            device = tiers[layout.device.name]
            self._runner = TileRunner(
                layout=layout,
                memory=memory,
                model=model,
                kv_codec=kv_codec,
                device=device.torch_device,
                prompts=prompts,
                workers=workers,
                products=multiplying,
                source=source,
            )
            if layout.device.memory == HOST:
                stack.enter_context(one_torch_thread())  # before threads start, which take over the number
            else:
                stack.enter_context(without_cudnn_attention())
            load_kernels(layout, model, kv_codec, workers=workers, products=multiplying, device=device.torch_device)
            stack.enter_context(quick_switches())
            stack.enter_context(standing_heap())
            lanes = executor(self._runner, self._compiler.widths, _contexts(layout, tiers), self.trace)
            self._executor = stack.enter_context(closing(lanes))
            self._owned = stack.pop_all()

    @property
    def lanes(self) -> tuple[str, ...]:
        return tuple(self._compiler.widths)

    def run(self, batcher: Batcher, on_step: OnStep) -> list[StepTime]:
        """Run every step that the batcher composes. A step is compiled and submitted while the one before it runs.

        on_step is called from this thread after each step, with the sequences that it finished.
        """
        begin = time.perf_counter()
        frontier, steps, flying = Frontier(), list[Step](), deque[Step]()
        checked: list[TaskGraph] = []
        while not batcher.done:
            step = batcher.next_step()
            if step is not None:
                graph, frontier = self._compiler.compile(step, frontier)
                self._check(checked, graph)
                self.trace.expect(graph)
                self._executor.submit(graph)
                flying.append(step)
                steps.append(step)
            if step is None or len(flying) > 1:
                finished = flying.popleft()
                on_step(finished, self._finish(finished, batcher))
        ends = self.trace.step_ends()
        return [StepTime(step, ends[step.index] - begin) for step in steps]

    def close(self) -> None:
        """End the lanes, then give the memory back. Idempotent."""
        self._owned.close()

    def _finish(self, step: Step, batcher: Batcher) -> list[FinishedSequence]:
        self._executor.wait(step.index)
        self.trace.fold(step.index)
        tokens = {batch.gpu_batch: self._runner.take(step.index, batch.gpu_batch) for batch in step.batches}
        return batcher.accept(step.index, tokens)

    def _check(self, checked: list[TaskGraph], graph: TaskGraph) -> None:
        if graph.step < CHECKED_STEPS:
            adjoining = [earlier for earlier in checked if earlier.step == graph.step - 1]
            check_graph([*adjoining, graph], self._layout)
            checked[:] = [graph]


def _contexts(layout: Layout, tiers: Mapping[str, Tier]) -> Callable[[str], LaneContext]:
    """A lane's copies are carried out by the compute tier, or by the far tier where they end in a staging slot or it is
    a device of its own. Attention on the host runs in the host's memory.
    """
    owners = {
        lane: tiers[t.name]
        for t in layout.tiers[1:]
        if layout.is_staged(t.name, layout.device.name) or t.memory not in {None, HOST}
        for lane in _lanes(t)
    } | {ATTENTION_LANE: tiers[layout.attention.tier]}
    device = tiers[layout.device.name]

    def context_for(lane: str) -> LaneContext:
        return owners.get(lane, device).lane_context()

    return context_for


def _lanes(tier: TierDescription) -> tuple[str, str]:
    return read_lane(tier.name), write_lane(tier.name)
