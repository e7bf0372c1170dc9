"""A processor to run kernels on, reached through a tier in its memory as a lane reaches it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from statistics import median

import torch

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.tier import HOST, Tier
from flexflow_engine.cpu.settings import one_torch_thread
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.products.matmul import HostProducts, Multiply, TeamProducts, multiplication, usual_float32_from

BATCHES = 5
"""How often a time is taken; their median counts."""
RESULTS_NBYTES = 64 * 2**20
"""Of products, more than any that is measured has."""


class Bench:
    """Owns a lane context of the tier, which stays its opener's, and threads for the host's kernels.

    Changing state: `products`, `multiply` and `multiply_in_a_team`, how a run multiplies encoded weights on the host,
    and plain ones, and these where torch's own threads share the work; see `choose`.
    """

    def __init__(self, tier: Tier, dtype: DType, seconds: float) -> None:
        """seconds: how long one figure may take."""
        self.device = torch.device(tier.torch_device)
        self.dtype = dtype
        self.torch_dtype: torch.dtype = getattr(torch, dtype)
        self.seconds = seconds
        self.memory = tier.memory
        self._stack = ExitStack()
        self.workers = self._stack.enter_context(closing(Workers()))
        self.choose(usual_float32_from(self.dtype))
        if self.memory == HOST:
            self._stack.enter_context(one_torch_thread())
        self._context = self._stack.enter_context(closing(tier.lane_context()))

    def close(self) -> None:
        self._stack.close()

    def choose(self, float32_from: int | None) -> None:
        """Multiply as runs do on a machine of which this has been measured."""
        self.products = self._products(HostProducts, float32_from)
        self.multiply = multiplication(self.memory, self.products)
        self.multiply_in_a_team = multiplication(self.memory, self._products(TeamProducts, float32_from))

    def multiplying(self, float32_from: int | None) -> Multiply:
        """As runs would do if that had been measured."""
        return multiplication(self.memory, self._products(HostProducts, float32_from))

    def _products(self, by: type[HostProducts], float32_from: int | None) -> HostProducts:
        return by(self.workers, self.torch_dtype, float32_from, kept_nbytes=RESULTS_NBYTES)

    def numbers(self, *shape: int) -> torch.Tensor:
        """Numbers in the model's dtype, none of which is denormal."""
        return torch.rand(shape, dtype=torch.float32).add_(0.5).to(self.device, self.torch_dtype)

    def finish(self, work: Callable[[], object]) -> None:
        """Do it once, and wait for the device."""
        with self._context:
            work()
            self._context.record().wait()

    def time(self, work: Callable[[], object]) -> float:
        """Seconds that one call takes in a row of calls: the device may queue them, as it does in a run."""
        with torch.inference_mode():
            self.finish(work)
            calls = 1
            while (elapsed := self._elapsed(work, calls)) < self.seconds / (2 * BATCHES):
                calls *= 2
            times = [elapsed, *(self._elapsed(work, calls) for _ in range(BATCHES - 1))]
        return median(times) / calls

    def _elapsed(self, work: Callable[[], object], calls: int) -> float:
        def repeat() -> None:
            for _ in range(calls):
                work()  # its result is dropped: results that are kept would each be written to fresh memory

        begin = time.perf_counter()
        self.finish(repeat)
        return time.perf_counter() - begin
