"""Layouts and their graphs without weights or a run: for tests of what is decided before the first byte moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.policy import AttentionPlace, Placement, Policy, WorkloadShape
from flexflow_engine.abc.step import NextTokens, Step
from flexflow_engine.abc.tier import Tier
from flexflow_engine.graph.builder import Frontier, TaskGraph
from flexflow_engine.graph.compile import StepCompiler
from flexflow_engine.jobs.batching import Batcher
from flexflow_engine.placement.laying_out import make_layout
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.pages import paged_tensors
from flexflow_engine.planning.plan import describe_tiers
from flexflow_engine.testing.tiers import IslandTier, ThrottledTier
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_plugins.models.opt import OPTModel
from flexflow_tiers.cpu import CpuTier
from flexflow_tiers.pinned import PinnedTier
from flexflow_tiers.zarr import ZarrTier
from harness import MIB, SMALL_OPT, TierSetup, policy

DEVICE_HOST: Mapping[str, type[Tier]] = {"device": CpuTier, "host": PinnedTier}
DEVICE_FAR: Mapping[str, type[Tier]] = {"device": CpuTier, "far": ThrottledTier}
DEVICE_HOST_DISK: Mapping[str, type[Tier]] = {"device": CpuTier, "host": PinnedTier, "disk": ZarrTier}
DEVICE_FAR_DISK: Mapping[str, type[Tier]] = {"device": CpuTier, "far": ThrottledTier, "disk": ZarrTier}
ISLAND_HOST_DISK: Mapping[str, type[Tier]] = {"island": IslandTier, "host": PinnedTier, "disk": ZarrTier}
"""Like a GPU: nothing but the first tier is computed on in place, and the disk's bytes pass through host memory."""
ISLAND_HOST: Mapping[str, type[Tier]] = {"island": IslandTier, "host": PinnedTier}
TIERS = (DEVICE_HOST, DEVICE_FAR, DEVICE_HOST_DISK, DEVICE_FAR_DISK, ISLAND_HOST_DISK)


def opt(*, dtype: DType = "float32", **config: Any) -> OPTModel:
    """A small OPT, as its config.json describes it."""
    return OPTModel(OPTModel.read_config(SMALL_OPT | config), dtype)


def setups(classes: Mapping[str, type[Tier]], *, budget_bytes: int = 64 * MIB) -> dict[str, TierSetup]:
    return {name: TierSetup(tier_class, budget_bytes) for name, tier_class in classes.items()}


def lay_out(
    model: OPTModel,
    classes: Mapping[str, type[Tier]],
    chosen: Policy,
    *,
    prompt_tokens: Sequence[int] = (9, 7, 5, 3),
    max_new_tokens: int = 6,
    budget_bytes: int = 64 * MIB,
    weight_codec: Codec | None = None,
    kv_codec: Codec | None = None,
) -> Layout:
    none = NoneCodec()
    return make_layout(
        model=model,
        tensors=paged_tensors(model, weight_codec or none, none),
        kv_codec=kv_codec or none,
        policy=chosen,
        workload=WorkloadShape(tuple(prompt_tokens), (max_new_tokens,) * len(prompt_tokens)),
        tiers=describe_tiers(classes, dict.fromkeys(classes, budget_bytes)),
    )


def compose(
    layout: Layout, prompt_tokens: Sequence[int], max_new_tokens: int | Sequence[int], *, limit: int = 100
) -> list[Step]:
    """The first steps of a job whose sequences all run to their full length: the same for all, or each its own."""
    lengths = [max_new_tokens] * len(prompt_tokens) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    batcher = Batcher(
        list(prompt_tokens),
        max_new_tokens=lengths,
        eos_token_ids=(),
        gpu_batch_size=layout.policy.gpu_batch_size,
        num_gpu_batches=layout.policy.num_gpu_batches,
    )
    steps: list[Step] = []
    while len(steps) < limit and (step := batcher.next_step()) is not None:
        steps.append(step)
        batcher.accept(step.index, {batch.gpu_batch: NextTokens([5] * len(batch.rows)) for batch in step.batches})
    return steps


def compile_steps(layout: Layout, steps: Sequence[Step]) -> list[TaskGraph]:
    """The steps' graphs, each joined to the ones before it."""
    compiler, frontier, graphs = StepCompiler(layout), Frontier(), list[TaskGraph]()
    for step in steps:
        graph, frontier = compiler.compile(step, frontier)
        graphs.append(graph)
    return graphs


@st.composite
def shares(draw: st.DrawFn, tiers: Sequence[str]) -> dict[str, float]:
    """Percentages over the tiers, hundredths at the finest, often with nothing on some tier."""
    cuts = sorted(draw(st.lists(_percent, min_size=len(tiers) - 1, max_size=len(tiers) - 1)))
    edges = [0.0, *cuts, 100.0]
    return {tier: b - a for tier, a, b in zip(tiers, edges, edges[1:], strict=False)}


_percent = st.one_of(st.sampled_from([0.0, 4.0, 20.0, 50.0, 96.0, 100.0]), st.integers(0, 10000).map(lambda n: n / 100))


@st.composite
def policies(draw: st.DrawFn, classes: Mapping[str, type[Tier]]) -> Policy:
    """Any placement of every class, in batches of a few rows; attention on the host where it can read the cache."""
    kv_cache = draw(shares(list(classes)))
    places: list[AttentionPlace] = ["device"] if kv_cache[next(iter(classes))] else ["device", "host"]
    return policy(
        setups(classes),
        gpu_batch_size=draw(st.integers(1, 5)),
        num_gpu_batches=draw(st.integers(1, 4)),
        weights=draw(shares(list(classes))),
        kv_cache=kv_cache,
        activations=draw(shares(list(classes))),
        attention=draw(st.sampled_from(places)),
        kv_page_tokens=draw(st.integers(1, 9)),
    )


def placement(**percent: float) -> Placement:
    return Placement(tuple(percent.items()))


def disk_setups(classes: Mapping[str, type[Tier]], folder: Path) -> dict[str, TierSetup]:
    """The tiers for a run, with a folder for those that need one."""
    return {
        name: TierSetup(cls, options=cls.Options(folder)) if cls is ZarrTier else TierSetup(cls)
        for name, cls in classes.items()
    }
