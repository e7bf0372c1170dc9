"""Every built-in tier, and the tiers made for tests, keeps the contract of `Tier`."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flexflow_engine.abc.tier import NoOptions, RegionSpec, Tier
from flexflow_engine.testing.async_tier import StreamIslandTier, StreamOptions
from flexflow_engine.testing.tier_suite import TierTests
from flexflow_engine.testing.tiers import IslandTier, LinkOptions, ThrottledTier
from flexflow_engine.testing.traffic import random_bytes, read_units, write_units
from flexflow_tiers.cpu import CpuTier
from flexflow_tiers.cuda import CudaOptions, CudaTier
from flexflow_tiers.pinned import PinnedTier
from flexflow_tiers.zarr import ZarrOptions, ZarrTier


class TestCpuTier(TierTests):
    def make_tier(self, tmp_path: Path, budget_bytes: int) -> Tier:
        return CpuTier(label="host", budget_bytes=budget_bytes, options=NoOptions())


class TestPinnedTier(TierTests):
    def make_tier(self, tmp_path: Path, budget_bytes: int) -> Tier:
        return PinnedTier(label="host", budget_bytes=budget_bytes, options=NoOptions())


@pytest.mark.cuda
class TestCudaTier(TierTests):
    def make_tier(self, tmp_path: Path, budget_bytes: int) -> Tier:
        return CudaTier(label="gpu", budget_bytes=budget_bytes, options=CudaOptions())


class TestZarrTier(TierTests):
    def make_tier(self, tmp_path: Path, budget_bytes: int) -> Tier:
        return ZarrTier(label="disk", budget_bytes=budget_bytes, options=ZarrOptions(path=tmp_path))


class TestThrottledTier(TierTests):
    def make_tier(self, tmp_path: Path, budget_bytes: int) -> Tier:
        return ThrottledTier(label="slow", budget_bytes=budget_bytes, options=LinkOptions(latency_s=0.0001))


class TestIslandTier(TierTests):
    def make_tier(self, tmp_path: Path, budget_bytes: int) -> Tier:
        return IslandTier(label="gpu", budget_bytes=budget_bytes, options=NoOptions())


class TestStreamIslandTier(TierTests):
    def make_tier(self, tmp_path: Path, budget_bytes: int) -> Tier:
        return StreamIslandTier(label="gpu", budget_bytes=budget_bytes, options=StreamOptions())


def test_a_throttled_copy_takes_latency_and_bytes_over_rate() -> None:
    tier = ThrottledTier(label="slow", budget_bytes=4096, options=LinkOptions(bytes_per_second=1e5, latency_s=0.02))
    region = tier.allocate(RegionSpec(name="page", num_units=1, unit_nbytes=4000))
    started = time.monotonic()
    write_units(tier, region, 0, random_bytes(4000))
    assert time.monotonic() - started >= 0.06


def test_throttled_copies_share_one_link() -> None:
    tier = ThrottledTier(label="slow", budget_bytes=8192, options=LinkOptions(bytes_per_second=1e5))
    region = tier.allocate(RegionSpec(name="pages", num_units=2, unit_nbytes=4000))
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda unit: read_units(tier, region, unit, 1), range(2)))
    assert time.monotonic() - started >= 0.08
