"""Whole jobs on a GPU: the same tokens as transformers, whatever lies where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from flexflow_engine.abc.codec import Codec
from flexflow_plugins.codecs.group_quant import GroupInt8Codec
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_tiers.cuda import CudaTier
from flexflow_tiers.pinned import PinnedTier
from flexflow_tiers.zarr import ZarrOptions, ZarrTier
from harness import TierSetup, policy, random_prompts, reference_tokens, run_job, save_opt

SHARES: list[Mapping[str, float]] = [
    {"gpu": 100},
    {"host": 100},
    {"disk": 100},
    {"gpu": 30, "host": 30, "disk": 40},
]


@pytest.mark.cuda
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("kv_page_tokens", [1, 4, 16])
def test_a_gpu_gives_the_tokens_of_transformers(
    tmp_path: Path, shares: Mapping[str, float], kv_page_tokens: int
) -> None:
    folder = save_opt(tmp_path / "checkpoint")
    prompts = random_prompts(11)
    tiers = {
        "gpu": TierSetup(CudaTier),
        "host": TierSetup(PinnedTier),
        "disk": TierSetup(ZarrTier, options=ZarrOptions(tmp_path / "disk")),
    }
    chosen = policy(tiers, weights=shares, kv_cache=shares, activations=shares, kv_page_tokens=kv_page_tokens)
    result = run_job(folder, tiers, chosen, prompts, store=tmp_path / "store")
    assert result.tokens == reference_tokens(folder, prompts)


@pytest.mark.cuda
@pytest.mark.parametrize("kv_codec", [NoneCodec(), GroupInt8Codec()], ids=lambda codec: codec.key)
@pytest.mark.parametrize("cache", [{"host": 100}, {"disk": 100}, {"host": 40, "disk": 60}])
def test_attention_on_the_host_beside_a_gpu_changes_no_token(
    tmp_path: Path, cache: Mapping[str, float], kv_codec: Codec
) -> None:
    """An 8-bit cache is compared with attention on the GPU; both read the same pages."""
    folder, prompts = save_opt(tmp_path / "checkpoint"), random_prompts(11)
    tiers = {
        "gpu": TierSetup(CudaTier),
        "host": TierSetup(PinnedTier),
        "disk": TierSetup(ZarrTier, options=ZarrOptions(tmp_path / "disk")),
    }
    chosen = policy(
        tiers,
        gpu_batch_size=2,
        num_gpu_batches=3,
        weights={"gpu": 30, "host": 70},
        kv_cache=cache,
        activations={"host": 100},
        attention="host",
    )
    tokens = run_job(folder, tiers, chosen, prompts, store=tmp_path / "store", kv_codec=kv_codec).tokens
    if kv_codec.keeps_bytes:
        assert tokens == reference_tokens(folder, prompts)
    else:
        on_gpu = replace(chosen, attention="device")
        assert tokens == run_job(folder, tiers, on_gpu, prompts, store=tmp_path / "store", kv_codec=kv_codec).tokens
