"""Runs a job below the recipe: any tiers, any policy, any executor. For tests that need what no recipe can say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.policy import AttentionPlace, Placement, Policy, WorkloadShape
from flexflow_engine.abc.tier import Tier
from flexflow_engine.checkpoint.importing import import_checkpoint
from flexflow_engine.checkpoint.source import open_checkpoint
from flexflow_engine.graph.lanes import lane_widths
from flexflow_engine.jobs.batching import Batcher, FinishedSequence
from flexflow_engine.placement.laying_out import make_layout
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.pages import paged_tensors
from flexflow_engine.planning.plan import describe_tiers
from flexflow_engine.products.matmul import HostProducts, usual_float32_from, usual_products
from flexflow_engine.runtime.executor import DataflowExecutor, Executor
from flexflow_engine.runtime.next_tokens import Forced, Greedy
from flexflow_engine.runtime.session import Session
from flexflow_engine.runtime.trace import Trace
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_plugins.models.opt import OPTModel
from flexflow_tiers.cpu import CpuTier
from flexflow_tiers.pinned import PinnedTier
from flexflow_tiers.zarr import ZarrOptions, ZarrTier

MIB = 2**20


@dataclass(frozen=True)
class TierSetup:
    """One tier of a job: its class, its budget and its options."""

    tier_class: type[Tier]
    budget_bytes: int = 64 * MIB
    options: Any = None


@dataclass(frozen=True)
class JobResult:
    """What a job left: tokens by sequence, the trace, each tier's peak, the layout."""

    sequences: dict[int, FinishedSequence]
    trace: Trace
    peaks: dict[str, int]
    layout: Layout

    @property
    def tokens(self) -> dict[int, tuple[int, ...]]:
        return {index: finished.token_ids for index, finished in sorted(self.sequences.items())}

    @property
    def logprobs(self) -> dict[int, tuple[float, ...]]:
        return {index: finished.logprobs for index, finished in sorted(self.sequences.items())}


SMALL_OPT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "ffn_dim": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def save_opt(folder: Path, *, seed: int = 0, scale: float = 0.3, **config: Any) -> Path:
    """A small random OPT checkpoint, as transformers writes it."""
    torch.manual_seed(seed)
    defaults = {**SMALL_OPT, "word_embed_proj_dim": 64, "init_std": scale}
    OPTForCausalLM(OPTConfig(**(defaults | config))).save_pretrained(folder)
    return folder


def random_prompts(count: int, *, seed: int = 0, longest: int = 40, vocabulary: int = 300) -> list[tuple[int, ...]]:
    """Prompts of unequal lengths, 1 to `longest` tokens, special ids avoided."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest, size=count, endpoint=True)
    return [tuple(int(t) for t in generator.integers(4, vocabulary, size=length)) for length in lengths]


def three_tiers(tmp_path: Path) -> dict[str, TierSetup]:
    """device, host and disk, as a recipe for a machine without a GPU names them."""
    return {
        "device": TierSetup(CpuTier),
        "host": TierSetup(PinnedTier),
        "disk": TierSetup(ZarrTier, options=ZarrOptions(tmp_path / "disk")),
    }


def policy(
    tiers: Mapping[str, TierSetup],
    *,
    gpu_batch_size: int = 4,
    num_gpu_batches: int = 2,
    weights: Mapping[str, float] | None = None,
    kv_cache: Mapping[str, float] | None = None,
    activations: Mapping[str, float] | None = None,
    attention: AttentionPlace = "device",
    kv_page_tokens: int = 4,
) -> Policy:
    """A policy; what isn't placed lies on the first tier."""
    first = next(iter(tiers))

    def placement(shares: Mapping[str, float] | None) -> Placement:
        shares = shares or {first: 100.0}
        return Placement(tuple((name, shares.get(name, 0.0)) for name in tiers))

    return Policy(
        gpu_batch_size=gpu_batch_size,
        num_gpu_batches=num_gpu_batches,
        weights=placement(weights),
        kv_cache=placement(kv_cache),
        activations=placement(activations),
        attention=attention,
        kv_page_tokens=kv_page_tokens,
    )


def run_job(
    checkpoint: Path | str,
    tiers: Mapping[str, TierSetup],
    chosen: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    store: Path,
    max_new_tokens: int = 12,
    eos_token_ids: Sequence[int] = (),
    dtype: DType = "float32",
    weight_codec: Codec | None = None,
    kv_codec: Codec | None = None,
    model_class: type[OPTModel] = OPTModel,
    executor: Callable[..., Executor] = DataflowExecutor,
    completions: Sequence[Sequence[int]] = (),
) -> JobResult:
    """Run a job to its end; everything that was opened is closed again. completions: scored, instead of generating."""
    given = [np.asarray(completion, np.int64) for completion in completions]
    new_tokens = [len(completion) for completion in given] or [max_new_tokens] * len(prompts)
    opened = open_checkpoint(str(checkpoint), model_class, dtype=dtype)
    weight_codec, kv_codec, small_codec = weight_codec or NoneCodec(), kv_codec or NoneCodec(), NoneCodec()
    weights = import_checkpoint(opened, opened.model, weight_codec, small_codec, store, lambda done, total: None)
    layout = make_layout(
        model=opened.model,
        tensors=paged_tensors(opened.model, weight_codec, small_codec),
        kv_codec=kv_codec,
        policy=chosen,
        workload=WorkloadShape(tuple(len(p) for p in prompts), tuple(new_tokens)),
        tiers=describe_tiers(
            {name: setup.tier_class for name, setup in tiers.items()},
            {name: setup.budget_bytes for name, setup in tiers.items()},
        ),
    )
    batcher = Batcher(
        [len(p) for p in prompts],
        max_new_tokens=new_tokens,
        eos_token_ids=eos_token_ids,
        gpu_batch_size=chosen.gpu_batch_size,
        num_gpu_batches=chosen.num_gpu_batches,
    )
    sequences: dict[int, FinishedSequence] = {}
    with weights, ExitStack() as stack:
        opened_tiers = {name: stack.enter_context(closing(_open(name, setup))) for name, setup in tiers.items()}
        session = Session(
            layout=layout,
            tiers=opened_tiers,
            model=opened.model,
            kv_codec=kv_codec,
            store=weights,
            prompts=[np.asarray(p, np.int64) for p in prompts],
            source=Forced([len(p) for p in prompts], given) if given else Greedy(),
            float32_from=usual_float32_from(dtype),
            products=usual_products(dtype) if layout.only_computes else HostProducts,
            executor=executor,
        )
        with closing(session):
            session.run(batcher, lambda _, ended: sequences.update({s.sequence: s for s in ended}))
        peaks = {name: tier.peak_bytes for name, tier in opened_tiers.items()}
        assert all(tier.peak_bytes <= tier.budget_bytes for tier in opened_tiers.values())
    assert set(session.lanes) == set(lane_widths(layout))
    return JobResult(sequences, session.trace, peaks, layout)


def reference_tokens(
    folder: Path, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 12, eos_token_id: int | None = None
) -> dict[int, tuple[int, ...]]:
    """What transformers generates greedily in float32, prompt by prompt, EOS left out."""
    model = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = {}
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([list(prompt)])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos_token_id,
            pad_token_id=1,
        )
        generated = output[0, ids.shape[1] :].tolist()
        tokens[index] = tuple(generated[: generated.index(eos_token_id)] if eos_token_id in generated else generated)
    return tokens


def _open(name: str, setup: TierSetup) -> Tier:
    options = setup.options if setup.options is not None else setup.tier_class.Options()
    return setup.tier_class(label=name, budget_bytes=setup.budget_bytes, options=options)
