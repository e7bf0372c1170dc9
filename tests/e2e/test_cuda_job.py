"""Whole jobs on a GPU: the same tokens as transformers, whatever lies where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

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
