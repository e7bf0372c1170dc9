"""Host memory: exact, returned when it is freed, and never pulled away under a view."""

import subprocess
import sys
from collections.abc import Iterator
from mmap import PAGESIZE
from pathlib import Path

import numpy as np
import pytest
import torch

from flexflow_engine.abc.tier import HostContext, NoOptions, RegionSpec
from flexflow_engine.errors import TierError
from flexflow_tiers.cpu import CpuTier
from flexflow_tiers.host import HostTier
from flexflow_tiers.pinned import PinnedTier

MIB = 2**20
STATM = Path("/proc/self/statm")


@pytest.fixture(params=[CpuTier, PinnedTier])
def tier(request: pytest.FixtureRequest) -> Iterator[HostTier]:
    tier: HostTier = request.param(label="host", budget_bytes=2**60, options=NoOptions())
    yield tier
    tier.close()


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * PAGESIZE


@pytest.mark.skipif(not STATM.exists(), reason="this system does not tell a process's memory in /proc")
def test_memory_goes_back_to_the_machine_when_it_is_freed(tier: HostTier) -> None:
    region = tier.allocate(RegionSpec(name="large", num_units=64, unit_nbytes=MIB))
    tier.tensor(region, 0, 64).fill_(1)
    before = resident_bytes()
    tier.free(region)
    assert before - resident_bytes() > 60 * MIB


def test_a_region_is_exact_and_starts_on_a_page(tier: HostTier) -> None:
    region = tier.allocate(RegionSpec(name="odd", num_units=3, unit_nbytes=100_003))
    tensor = tier.tensor(region, 0, 3)
    assert tensor.data_ptr() % 4096 == 0
    assert tensor.untyped_storage().nbytes() == tier.used_bytes == 300_009


def test_an_empty_region_holds_nothing(tier: HostTier) -> None:
    region = tier.allocate(RegionSpec(name="empty", num_units=0, unit_nbytes=4096))
    assert tier.tensor(region, 0, 0).numel() == tier.used_bytes == 0


def test_a_view_outlives_its_region(tier: HostTier) -> None:
    region = tier.allocate(RegionSpec(name="viewed", num_units=2, unit_nbytes=4096))
    tier.write(region, 0, 2, np.full(8192, 9, dtype=np.uint8))
    view = tier.tensor(region, 1, 1)
    tier.close()
    assert view.eq(9).all()
    assert tier.used_bytes == 0


def test_memory_that_the_machine_lacks_is_refused_and_not_counted(tier: HostTier) -> None:
    with pytest.raises(TierError, match=r"tiers\.host.*toolarge"):
        tier.allocate(RegionSpec(name="toolarge", num_units=1, unit_nbytes=2**50))
    assert tier.used_bytes == 0


def test_reading_beyond_the_region_is_a_bug_that_shows(tier: HostTier) -> None:
    region = tier.allocate(RegionSpec(name="short", num_units=2, unit_nbytes=8))
    with pytest.raises(AssertionError):
        tier.read(region, 1, 2, np.empty(16, dtype=np.uint8))


def test_a_lane_on_the_host_needs_no_device(tier: HostTier) -> None:
    assert isinstance(tier.lane_context(), HostContext)
    assert tier.torch_device == "cpu"


def test_pinned_memory_is_plain_where_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; tests/tiers/test_cuda.py looks at pinning")
    tier = PinnedTier(label="host", budget_bytes=4096, options=NoOptions())
    assert not tier.tensor(tier.allocate(RegionSpec(name="r", num_units=1, unit_nbytes=4096)), 0, 1).is_pinned()
    tier.close()


def test_listing_the_tiers_loads_no_torch() -> None:
    script = (
        "import sys, flexflow_tiers\n"
        "print(*[tier.name for tier in flexflow_tiers.flexflow_register_tiers()], 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert shown.stdout.split() == ["cuda", "cpu", "pinned", "zarr", "False"]
