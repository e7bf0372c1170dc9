"""Laying a policy out: each part of a job is placed, and what computing them takes is counted."""

from __future__ import annotations

from dataclasses import dataclass

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import ITEM_NBYTES
from flexflow_engine.abc.model import Model
from flexflow_engine.abc.policy import Policy, TierDescription, WorkloadShape
from flexflow_engine.abc.tier import HOST
from flexflow_engine.placement.activations import ActivationLayout, place_activations
from flexflow_engine.placement.attention import AttentionSite, attention_site
from flexflow_engine.placement.kv import KVLayout, place_kv
from flexflow_engine.placement.layout import Layout, attended_in_kernel, multiplies_as_encoded
from flexflow_engine.placement.pages import PagedTensor
from flexflow_engine.placement.reach import direct_tiers, is_staged
from flexflow_engine.placement.weights import ALIGNMENT, WeightLayout, place_weights
from flexflow_engine.placement.workspace import (
    Workspace,
    encoding_nbytes,
    kernel_nbytes,
    pieces_nbytes,
    workspace_nbytes,
)
from flexflow_engine.products.bfloats import bfloat_nbytes
from flexflow_engine.products.integers import integer_nbytes
from flexflow_engine.products.widening import product_nbytes


def make_layout(
    *,
    model: Model,
    tensors: tuple[PagedTensor, ...],
    kv_codec: Codec,
    policy: Policy,
    workload: WorkloadShape,
    tiers: tuple[TierDescription, ...],
    weights: WeightLayout | None = None,
) -> Layout:
    """Lay out a policy. Raises PolicyError when it asks for attention where it can't run.

    weights: these tensors as the policy places them, where they have been placed before; the most of the work.
    """
    config, item = model.config, ITEM_NBYTES[model.dtype]
    job = _Job(
        model=model,
        kv_codec=kv_codec,
        policy=policy,
        max_prompt_tokens=workload.max_prompt_tokens,
        max_cached_tokens=workload.max_cached_tokens,
        tiers=tiers,
        attention=attention_site(policy, tiers),
    )
    weights = weights or place_weights(model, tensors, policy.weights)
    kv, activations = _place_cache(job), _place_hidden(job)
    table, (small_offsets, small_nbytes) = weights.table[0].tensor, _pack(weights.small)
    multiplies_encoded = multiplies_as_encoded(tiers[0].memory, table.codec)
    return Layout(
        tiers=tiers,
        policy=policy,
        attention=job.attention,
        weights=weights,
        kv=kv,
        activations=activations,
        small_offsets=small_offsets,
        small_nbytes=small_nbytes,
        embed_rows=job.prompt_tokens,
        embed_row_nbytes=table.columns * item,
        attention_width=config.num_heads * config.head_dim,
        kv_width=config.num_kv_heads * config.head_dim,
        item_nbytes=item,
        only_computes=not job.attention.on_host and _moves_nothing(weights, kv, activations, direct_tiers(tiers)),
        decodes_weights=not table.codec.keeps_bytes and not multiplies_encoded,
        multiplies_encoded=multiplies_encoded,
        attends_in_kernel=job.attends_in_kernel,
        decodes_kv=not job.attends_in_kernel and not kv_codec.keeps_bytes,
        workspace=_workspace(job, weights, kv),
        staging_nbytes=_staging_nbytes(tiers, weights, kv, activations),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What is laid out, and where its decode attention runs."""

    model: Model
    kv_codec: Codec
    policy: Policy
    max_prompt_tokens: int
    max_cached_tokens: int
    tiers: tuple[TierDescription, ...]
    attention: AttentionSite

    @property
    def prompt_tokens(self) -> int:
        """Of one GPU batch, at most."""
        return self.policy.gpu_batch_size * self.max_prompt_tokens

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """Rows of a GPU batch, tokens that a row has cached at most, tokens of a page."""
        return self.policy.gpu_batch_size, self.max_cached_tokens, self.policy.kv_page_tokens

    @property
    def attends_in_kernel(self) -> bool:
        memory = HOST if self.attention.on_host else self.tiers[0].memory
        return attended_in_kernel(memory, self.kv_codec)


def _place_cache(job: _Job) -> KVLayout:
    config, codec, site = job.model.config, job.kv_codec, job.attention
    rows, cached_tokens, page_tokens = job.cache_sizes
    page = (config.num_kv_heads, page_tokens, config.head_dim)
    return place_kv(
        num_layers=config.num_layers,
        gpu_batch_size=rows,
        num_gpu_batches=job.policy.num_gpu_batches,
        cached_tokens=cached_tokens,
        page_tokens=page_tokens,
        page_nbytes=codec.encoded_nbytes(page, job.model.dtype),
        tail_page_nbytes=page[0] * page[1] * page[2] * ITEM_NBYTES[job.model.dtype],
        placement=job.policy.kv_cache,
        direct=site.in_place,
        takes_tokens=site.in_place if codec.keeps_bytes else frozenset(),
        prompt_tokens=job.max_prompt_tokens if site.across_link else 0,
    )


def _place_hidden(job: _Job) -> ActivationLayout:
    return place_activations(
        gpu_batch_size=job.policy.gpu_batch_size,
        num_gpu_batches=job.policy.num_gpu_batches,
        max_new_tokens=job.max_prompt_tokens,
        token_nbytes=job.model.config.hidden_size * ITEM_NBYTES[job.model.dtype],
        placement=job.policy.activations,
        direct=direct_tiers(job.tiers),
    )


def _workspace(job: _Job, weights: WeightLayout, kv: KVLayout) -> Workspace:
    attention, device, on_host = _decode_attention_nbytes(job), job.tiers[0].memory, job.attention.on_host
    layers = workspace_nbytes(
        job.model,
        table=weights.table[0].tensor,
        rows=job.policy.gpu_batch_size,
        prompt_tokens=job.max_prompt_tokens,
        encoding=_encoding_nbytes(job, kv, device),
        head_rows=_head_rows(weights),
        decode_attention=0 if on_host else attention,
    )
    return Workspace(
        device_nbytes=layers + (_products_nbytes(job, weights) if device == HOST else 0),
        attention_nbytes=attention + _encoding_nbytes(job, kv, HOST) if on_host else 0,
    )


def _decode_attention_nbytes(job: _Job) -> int:
    if job.attends_in_kernel:
        return kernel_nbytes(job.model, *job.cache_sizes)
    return pieces_nbytes(job.model, *job.cache_sizes, num_gpu_batches=job.policy.num_gpu_batches)


def _encoding_nbytes(job: _Job, kv: KVLayout, memory: str | None) -> int:
    return 0 if job.kv_codec.keeps_bytes else encoding_nbytes(kv, *job.cache_sizes, memory)


def _products_nbytes(job: _Job, weights: WeightLayout) -> int:
    """Of the host's products."""
    widens = job.model.dtype != "float32"  # how many tokens it takes is the machine's affair
    encoded = multiplies_as_encoded(HOST, weights.table[0].tensor.codec)
    matrices = [matrix for layer in weights.layers for matrix in layer.matrices]
    numbers_nbytes = product_nbytes(job.prompt_tokens, matrices, makes_rows=encoded or widens)
    kernels = [bfloat_nbytes] if job.model.dtype == "bfloat16" else []
    if any(codec.multiplies_integers for codec in weights.codecs):
        kernels.append(integer_nbytes)
    return max([numbers_nbytes, *(nbytes(job.prompt_tokens, matrices) for nbytes in kernels)])


def _head_rows(weights: WeightLayout) -> int:
    """Of the largest part of the head."""
    parts = [layer.runs for layer in weights.layers if layer.spec.kind == "head"]
    return max(sum(run.rows for run in runs) for runs in parts)


def _moves_nothing(weights: WeightLayout, kv: KVLayout, activations: ActivationLayout, direct: frozenset[str]) -> bool:
    """Whether everything is where it is computed on."""
    runs = [*weights.table, *(run for layer in weights.layers for run in layer.runs)]
    return (
        all(run.tier in direct for run in runs)
        and not any(tile.slotted for tiles in kv.tiles for tile in tiles)
        and all(part.slot_unit is None for parts in activations.parts for part in parts)
    )


def _staging_nbytes(
    tiers: tuple[TierDescription, ...], weights: WeightLayout, kv: KVLayout, activations: ActivationLayout
) -> int:
    if not any(is_staged(tiers[0].memory, tier.memory) for tier in tiers[1:]):
        return 0
    pages = [run.pages[0].nbytes for layer in weights.layers for run in layer.runs]  # none of a run's is larger
    return max(*pages, kv.tail_page_nbytes, kv.page_nbytes, activations.token_nbytes)


def _pack(tensors: tuple[PagedTensor, ...]) -> tuple[dict[str, int], int]:
    offsets, end = {}, 0
    for tensor in tensors:
        offsets[tensor.name] = end
        end += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    return offsets, end
