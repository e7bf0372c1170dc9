"""Real tiers and executors that tell a test what happened in them."""

from __future__ import annotations

import ctypes
import random
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from flexflow_engine.abc.tier import Region, RegionSpec, Tier
from flexflow_engine.graph.task import Task
from flexflow_engine.runtime.executor import ContextFor, Executor, RunTask
from flexflow_engine.runtime.trace import Trace
from harness import TierSetup

MakeExecutor = Callable[[RunTask, Mapping[str, int], ContextFor, Trace], Executor]
WrapRun = Callable[[RunTask], RunTask]


class Regions:
    """The live regions of a job's tiers, by name: `tier/region`."""

    def __init__(self) -> None:
        self.live: dict[str, tuple[Tier, Region]] = {}
        self.left_at_close: list[str] = []
        """Regions that their owner had not freed when their tier was closed."""

    def watch(self, setup: TierSetup) -> TierSetup:
        """The same tier, with its regions listed here."""
        regions, base = self, setup.tier_class

        class Watched(base):  # type: ignore[valid-type, misc]  # any tier's class
            def allocate(self, spec: RegionSpec) -> Region:
                region: Region = super().allocate(spec)
                regions.live[f"{self.label}/{spec.name}"] = (self, region)
                return region

            def free(self, region: Region) -> None:
                regions.live.pop(f"{self.label}/{region.spec.name}", None)
                super().free(region)

            def close(self) -> None:
                regions.left_at_close += [name for name in regions.live if name.startswith(f"{self.label}/")]
                super().close()

        return TierSetup(Watched, setup.budget_bytes, setup.options)

    def digest(self, location: str) -> int:
        """A checksum of what a location holds: a region, or the regions that begin with its name and a dot."""
        names = [name for name in self.live if _is_of(name.split("/")[1], location)]
        assert names, location
        checksum = 0
        for name in sorted(names):
            tier, region = self.live[name]
            checksum = zlib.crc32(tier.tensor(region, 0, region.spec.num_units).numpy().data, checksum)
        return checksum


def _is_of(region: str, location: str) -> bool:
    return region == location or (region.startswith(f"{location}.") and not region.endswith(".tail"))


def with_run(base: Callable[..., Executor], wrap: WrapRun) -> MakeExecutor:
    """An executor whose tasks run through `wrap`."""

    def make(run: RunTask, widths: Mapping[str, int], context_for: ContextFor, trace: Trace) -> Executor:
        return base(wrap(run), widths, context_for, trace)

    return make


def random_delays(seed: int, *, share: float = 0.2, most_seconds: float = 0.003) -> WrapRun:
    """Some tasks, the same ones for the same seed, start late."""

    def wrap(run: RunTask) -> RunTask:
        def delayed(task: Task) -> None:
            chance = random.Random(f"{seed} {task.key}")
            if chance.random() < share:
                time.sleep(chance.random() * most_seconds)
            run(task)

        return delayed

    return wrap


def digests(regions: Regions, into: dict[str, tuple[int, ...]]) -> WrapRun:
    """After every computation, checksums of all that it wrote: hidden states, cache, features, candidates."""

    def wrap(run: RunTask) -> RunTask:
        def recorded(task: Task) -> None:
            run(task)
            if task.kind == "compute":
                into[task.key] = tuple(regions.digest(ref.location) for ref in task.writes if _held(ref.location))

        return recorded

    return wrap


def _held(location: str) -> bool:
    return location.startswith(("hidden.", "kv.", "attention.", "features.", "candidates."))


@contextmanager
def no_thread_left() -> Iterator[None]:
    """Threads that begin inside end inside; zarr-python's event loop, one for the whole process, is its own."""
    before = set(threading.enumerate())
    yield
    left = {thread.name for thread in set(threading.enumerate()) - before} - {"zarr_io"}
    assert not left, left


def openmp_team() -> int:
    """How many threads OpenMP would start from this one, for a BLAS that torch calls. Skips where torch has none."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    libraries = [ctypes.CDLL(path) for path in paths if re.search(r"/lib[gi]?omp[^/]*\.so", path)]
    if not libraries:
        pytest.skip("torch has no OpenMP here")
    return max(int(library.omp_get_max_threads()) for library in libraries)
