"""What is measured of a machine, and when: sizes are tiny, and no figure is looked at but for its sign."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from checkpoint.checkpoints import imported, opened
from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.hardware import HardwareProfile, measured_key
from flexflow_engine.abc.step import RowStep
from flexflow_engine.abc.tier import HostBytes, NoOptions, Region, RegionSpec, Tier
from flexflow_engine.errors import CorruptDataError, FlexFlowError, HardwareError, StorageError, TierError
from flexflow_engine.planning.hardware import read_profile
from flexflow_engine.planning.profile import arithmetic, attention
from flexflow_engine.planning.profile.arithmetic import first_of_the_last
from flexflow_engine.planning.profile.bench import Bench
from flexflow_engine.planning.profile.cache import measured_again, profile_path, this_machine
from flexflow_engine.planning.profile.extent import Extent
from flexflow_engine.planning.profile.load import Load, rates
from flexflow_engine.planning.profile.machine import Machine
from flexflow_engine.planning.profile.needs import Needs, TierChoice
from flexflow_engine.planning.profile.stored import cut_alike, cut_most, stored_tensors
from flexflow_engine.runtime.attention import attend_tokens
from flexflow_engine.testing.allocations import PeakAllocations
from flexflow_engine.testing.tiers import IslandTier, LinkOptions, ThrottledTier
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt8Codec
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_plugins.models.opt import OPTModel
from flexflow_tiers.cpu import CpuTier
from flexflow_tiers.pinned import PinnedTier
from flexflow_tiers.zarr import ZarrOptions, ZarrTier
from harness import save_opt
from profiles import TINY

SLOW = LinkOptions(bytes_per_second=20e6)


class Bookkeeper:
    """Measures with tiny sizes, and remembers what it was told."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def measure(self, needs: Needs) -> HardwareProfile:
        """What was told before is forgotten."""
        self.notices.clear()
        return this_machine(needs, extent=TINY, notice=self.notices.append)

    @property
    def measured(self) -> list[str]:
        """The parts, in their order."""
        start = "measuring this machine: "
        return [line.removeprefix(start).partition(" (")[0] for line in self.notices if line.startswith(start)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def keeper() -> Bookkeeper:
    return Bookkeeper()


def choice(name: str, tier_class: type[Tier], options: object = None) -> TierChoice:
    return TierChoice(name=name, tier_class=tier_class, options=tier_class.Options() if options is None else options)


def needs(tmp_path: Path, *far: TierChoice, device: type[Tier] = CpuTier, dtype: DType = "float32") -> Needs:
    """A device and a disk, and further tiers."""
    disk = choice("disk", ZarrTier, ZarrOptions(tmp_path / "disk"))
    config = OPTModel.read_config(OPTModel.published()["facebook/opt-125m"])
    return Needs(
        model=OPTModel(replace(config, num_layers=2), dtype),
        tiers=(choice("device", device), disk, *far),
        plain=NoneCodec(),
        codecs=(GroupInt4Codec(),),
    )


def test_a_profile_has_what_a_recipe_needs_and_is_read_the_second_time(keeper: Bookkeeper, tmp_path: Path) -> None:
    asked = needs(tmp_path)
    profile = keeper.measure(asked)
    assert keeper.measured == ["the processor of cpu memory", "group-int4 on cpu", "the link of disk"]
    cpu, disk = profile.processors["cpu"], profile.links["disk"]
    assert [size for size, _ in cpu.matmul_flops_per_s["float32"].points] == [1.0, 4.0]
    assert set(cpu.decode_attention_bytes_per_s) == {"none", measured_key(GroupInt4Codec())}
    assert all(0 < left <= 1 for way in disk.values() for left in (way.beside.reverse, way.leaves_processors))
    assert profile.host.compile_task_s > 0
    assert keeper.measure(asked) == profile
    assert keeper.notices == []
    assert list((tmp_path / "disk" / "runs").iterdir()) == [], "files of the measurement are left"


def test_measuring_again_replaces_what_is_known_once_it_is_done(keeper: Bookkeeper, tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        if "(2 of" in line:
            raise KeyboardInterrupt

    asked = needs(tmp_path)
    profile = keeper.measure(asked)
    with pytest.raises(KeyboardInterrupt):
        measured_again(asked, extent=TINY, notice=interrupt)
    assert keeper.measure(asked) == profile
    assert keeper.notices == []
    anew = measured_again(asked, extent=TINY, notice=keeper.notices.append)
    assert len(keeper.measured) == 3
    assert keeper.measure(asked) == anew != profile


def test_two_ways_to_multiply_16_bit_numbers_are_compared(keeper: Bookkeeper, tmp_path: Path) -> None:
    measured = keeper.measure(needs(tmp_path, dtype="bfloat16"))
    assert set(measured.processors["cpu"].float32_from) == {"bfloat16"}
    assert keeper.measure(needs(tmp_path)).processors["cpu"].float32_from == {}


@pytest.mark.parametrize(
    ("faster", "found"), [((1, 4, 8), 1), ((4, 8), 4), ((8,), 8), ((1, 8), 8), ((1, 4), None), ((), None)]
)
def test_what_is_faster_with_many_tokens_counts(faster: tuple[int, ...], found: int | None) -> None:
    assert first_of_the_last((1, 4, 8), lambda tokens: tokens in faster) == found


def test_codecs_with_other_settings_have_rates_of_their_own(keeper: Bookkeeper, tmp_path: Path) -> None:
    searching = GroupInt4Codec(GroupInt4Codec.Options(encoder="search"))
    keeper.measure(needs(tmp_path))
    profile = keeper.measure(replace(needs(tmp_path), codecs=(searching,)))
    assert keeper.measured == ["group-int4 on cpu"]
    keys = {measured_key(codec) for codec in (GroupInt4Codec(), searching)}
    assert len(keys) == 2
    assert profile.processors["cpu"].codecs.keys() == keys
    assert profile.processors["cpu"].decode_attention_bytes_per_s.keys() == keys | {"none"}


def test_what_was_measured_is_kept_where_a_disk_has_no_room_to_be_measured(
    keeper: Bookkeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoRoom(NamedTuple):
        free: int = 1000

    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: NoRoom())
        with pytest.raises(HardwareError, match=r"it can't be measured: .* are free"):
            keeper.measure(needs(tmp_path))
    keeper.measure(needs(tmp_path))
    assert keeper.measured == ["the link of disk"]


@pytest.mark.parametrize("error", [TierError, StorageError, CorruptDataError])
def test_whatever_a_tier_raises_while_it_is_measured_says_that_it_can_t_be_measured(
    keeper: Bookkeeper, tmp_path: Path, error: type[FlexFlowError]
) -> None:
    class FullTier(ThrottledTier):
        def _allocate(self, spec: RegionSpec) -> Any:
            raise error("no room", where=f"tiers.{self.label}")

    with pytest.raises(HardwareError, match=r"tiers\.full: it can't be measured: no room"):
        keeper.measure(needs(tmp_path, choice("full", FullTier, SLOW)))
    keeper.measure(needs(tmp_path))
    assert keeper.measured == ["the link of disk"]


@pytest.fixture
def bench() -> Iterator[Bench]:
    tier = CpuTier(label="device", budget_bytes=2**20, options=CpuTier.Options())
    with closing(tier), closing(Bench(tier, "bfloat16", 0.0)) as bench:
        yield bench


def test_rows_are_made_as_was_chosen(bench: Bench) -> None:
    for float32_from, made in ((None, torch.bfloat16), (1, torch.float32)):
        bench.choose(float32_from)
        assert bench.products.made_dtype == made


def test_widening_is_chosen_where_it_takes_less_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the clock alone: what is widened takes 3 s, other products one a token."""
    ways = {None: bench.multiplying(None), 1: bench.multiplying(1)}
    monkeypatch.setattr(bench, "multiplying", ways.__getitem__)

    def product_s(_: Bench, matrices: object, tokens: int, multiply: object) -> float:
        return 3.0 if multiply is ways[1] else float(tokens)

    monkeypatch.setattr(arithmetic, "_product_s", product_s)
    assert arithmetic.float32_from(bench, replace(TINY, tokens=(1, 2, 4, 8, 512))) == 4


@pytest.mark.parametrize(
    ("faster", "by_kernels", "chosen"), [((1, 2, 512), False, True), ((1, 512), False, False), ((1, 2, 4), True, False)]
)
def test_torchs_threads_are_chosen_where_most_products_take_less_time(
    bench: Bench, faster: tuple[int, ...], by_kernels: bool, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the clock alone; of those with few tokens. by_kernels: torch multiplies nothing."""
    monkeypatch.setattr(arithmetic, "multiplies_plain", lambda dtype: by_kernels)

    def product_s(_: Bench, matrices: object, tokens: int, multiply: object) -> float:
        return 1.0 if multiply is bench.multiply else 0.5 if tokens in faster else 2.0

    monkeypatch.setattr(arithmetic, "_product_s", product_s)
    rates = arithmetic.team_rates(bench, replace(TINY, tokens=(1, 2, 4, 512)))
    assert (rates is not None) == chosen


@pytest.mark.parametrize(("device", "rows"), [(CpuTier, {4: [2], 8: [2]}), (IslandTier, {4: [7], 8: [5]})])
def test_a_device_attends_to_as_many_rows_as_keep_it_busy(
    device: type[Tier], rows: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than 7, whose pages of 4 tokens have no more than 8 KiB; those of a row of 8 and a new one have 1.5."""
    seen = dict[int, list[int]]()

    def attended(steps: Sequence[RowStep], *rest: Any) -> torch.Tensor:
        counts = seen.setdefault(steps[0].context, [])
        counts += [len(steps)][: len(steps) not in counts]
        return attend_tokens(steps, *rest)

    monkeypatch.setattr(attention, "attend_tokens", attended)
    tier = device(label="device", budget_bytes=2**20, options=NoOptions())
    with closing(tier), closing(Bench(tier, "float32", 0.0)) as bench:
        extent = replace(TINY, cold_nbytes=2**13, device_attention_rows=7)
        assert attention.decode_bytes_per_s(bench, extent, NoneCodec()).at(4) > 0
    assert seen == rows


def test_only_what_is_missing_is_measured(keeper: Bookkeeper, tmp_path: Path) -> None:
    first = keeper.measure(needs(tmp_path))
    further = keeper.measure(replace(needs(tmp_path), codecs=(GroupInt4Codec(), GroupInt8Codec())))
    assert keeper.measured == ["group-int8 on cpu"]
    key = measured_key(GroupInt4Codec())
    assert further.processors["cpu"].codecs[key] == first.processors["cpu"].codecs[key]
    beside = keeper.measure(needs(tmp_path, choice("far", ThrottledTier, SLOW)))
    assert keeper.measured == ["the link of disk", "the link of far"], "the disk's link has a new neighbour"
    assert beside.processors == further.processors


def test_other_versions_and_other_numbers_are_measured_anew(
    keeper: Bookkeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper.measure(needs(tmp_path))
    keeper.measure(needs(tmp_path, dtype="bfloat16"))
    assert len(keeper.measured) == 3
    monkeypatch.setattr("flexflow_engine.planning.profile.machine.version", lambda name: "99")
    keeper.measure(needs(tmp_path))
    assert len(keeper.measured) == 3


def test_a_tier_computed_on_in_place_has_no_link(tmp_path: Path) -> None:
    asked = needs(tmp_path, choice("host", PinnedTier))
    assert [part.tier.name for part in asked.links] == ["disk"]
    assert asked.memories == ("cpu",)


def test_a_memory_of_its_own_is_reached_through_the_host(keeper: Bookkeeper, tmp_path: Path) -> None:
    profile = keeper.measure(needs(tmp_path, choice("host", PinnedTier), device=IslandTier))
    assert set(profile.links) == {"disk", "host"}
    assert set(profile.processors) == {"island", "cpu"}


def test_a_throttled_link_is_as_slow_as_it_is_throttled(keeper: Bookkeeper, tmp_path: Path) -> None:
    link = keeper.measure(needs(tmp_path, choice("far", ThrottledTier, SLOW))).links["far"]["read"]
    assert link.bytes_per_s <= SLOW.bytes_per_second * 1.01, "the throttle can only be late"


def test_a_disk_that_weights_lie_on_is_measured_by_reading_them(
    keeper: Bookkeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that were just written may still be somewhere else than on the disk."""
    keeper.measure(needs(tmp_path))
    imported(opened(save_opt(tmp_path / "model")), tmp_path / "disk").close()
    read: set[str] = set()
    reads = ZarrTier.read

    def watched(tier: ZarrTier, region: Region, first: int, count: int, out: HostBytes) -> None:
        read.add(region.spec.name)
        reads(tier, region, first, count, out)

    gathered: list[tuple[str, int]] = []
    gathers = ZarrTier.gather

    def watched_gather(tier: ZarrTier, region: Region, units: NDArray[np.int64], out: HostBytes) -> None:
        gathered.append((region.spec.name, len(set(units.tolist()))))
        gathers(tier, region, units, out)

    monkeypatch.setattr(ZarrTier, "read", watched)
    monkeypatch.setattr(ZarrTier, "gather", watched_gather)
    keeper.measure(needs(tmp_path))
    assert keeper.measured == ["the link of disk"]
    stored = stored_tensors(tmp_path / "disk")
    table = cut_most(stored)
    assert table is not None
    assert set(gathered) == {(table.name, TINY.small_units)}
    pages = cut_alike(stored)
    assert {tensor.name for tensor in pages} == read - {"profile.disk.s"}
    assert len(pages) > 1
    assert len({(tensor.unit_nbytes, tensor.units_per_page) for tensor in pages}) == 1


@pytest.mark.parametrize("gone", ["*.weight/c", "*embed_tokens.weight/c"])
def test_a_store_that_lacks_pages_is_measured_without_them(keeper: Bookkeeper, tmp_path: Path, gone: str) -> None:
    """It may be another model's than the one to be planned."""
    store = imported(opened(save_opt(tmp_path / "model")), tmp_path / "disk")
    store.close()
    lost = [page for folder in store.path.glob(gone) for page in folder.rglob("*") if page.is_file()]
    assert lost
    for page in lost:
        page.unlink()
    assert keeper.measure(needs(tmp_path)).links["disk"]["read"].bytes_per_s > 0


def test_measuring_takes_no_more_memory_than_a_small_run_has(tmp_path: Path) -> None:
    """A run measures before it takes its budgets, under whatever cap the process has."""
    extent = replace(Extent(), seconds=1e-4, link_seconds=1e-3)
    with PeakAllocations() as peak:
        this_machine(needs(tmp_path, dtype="bfloat16"), extent=extent, notice=lambda line: None)
    assert 128 * 2**20 < peak.peak_bytes < 450 * 2**20


def test_stores_that_can_not_be_read_as_they_are_are_not_measured(tmp_path: Path) -> None:
    assert stored_tensors(tmp_path) == ()
    store = imported(opened(save_opt(tmp_path / "model")), tmp_path)
    (store.path / "zarr.json").write_text("{}")
    store.close()
    assert stored_tensors(tmp_path) == ()


def test_the_cache_is_a_hardware_file(keeper: Bookkeeper, tmp_path: Path) -> None:
    asked = needs(tmp_path)
    profile = keeper.measure(asked)
    path = profile_path(Machine.here(), asked)
    assert asked.choose(read_profile(path)) == profile
    path.write_text(yaml.safe_dump({"name": "damaged"}))
    keeper.measure(asked)
    assert "is not used" in keeper.notices[0]
    assert len(keeper.measured) == 3


def test_a_cache_that_can_not_be_written_costs_nothing_but_the_next_time(keeper: Bookkeeper, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert keeper.measure(needs(tmp_path)).links
    assert "are not kept" in keeper.notices[-1]


def test_loads_run_at_once_and_a_failing_one_ends_all() -> None:
    calls: list[int] = []
    slow, fast = rates([Load(calls.append, 2.0, workers=2), Load(calls.append, 4.0)], 1e-3)
    assert slow > 0
    assert fast > 0
    assert set(calls) == {0, 1}

    def fail(worker: int) -> None:
        raise OSError(str(worker))

    with pytest.raises(OSError, match="0"):
        rates([Load(fail, 1.0), Load(calls.append, 1.0)], 1e-3)
