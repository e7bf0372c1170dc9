"""The disk tier: regions and weights in Zarr files, nothing left behind, nothing damaged unnoticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from flexflow_engine.abc.tier import RegionSpec
from flexflow_engine.errors import CorruptDataError, StorageError, TierError
from flexflow_engine.store.run_folder import RunFolder
from flexflow_engine.store.weights import WeightStore
from flexflow_tiers.zarr import ZarrOptions, ZarrTier
from full_disk import no_room
from store.stores import TABLE, flip_byte, unit_bytes, write_store

SPEC = RegionSpec(name="kv.3.0.k.1", num_units=8, unit_nbytes=100)


def make_tier(path: Path, budget_bytes: int = 2**20) -> ZarrTier:
    return ZarrTier(label="disk", budget_bytes=budget_bytes, options=ZarrOptions(path))


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[ZarrTier]:
    tier = make_tier(tmp_path / "tier")
    yield tier
    tier.close()


def files(path: Path) -> list[Path]:
    return [entry for entry in path.rglob("*") if entry.is_file()]


def run_folders(path: Path) -> list[Path]:
    return list((path / "runs").iterdir())


def open_files() -> set[str]:
    return {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}


def filled(count: int, value: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.full(count * SPEC.unit_nbytes, value, np.uint8)


def test_units_never_written_are_zeros_between_written_ones(tier: ZarrTier) -> None:
    region = tier.allocate(SPEC)
    tier.write(region, 1, 2, filled(2, 7))
    tier.write(region, 6, 1, filled(1, 9))
    out = filled(8, 255)
    tier.read(region, 0, 8, out)
    assert [int(unit[0]) for unit in out.reshape(8, 100)] == [0, 7, 7, 0, 0, 0, 9, 0]
    assert all(len(set(unit.tolist())) == 1 for unit in out.reshape(8, 100))


def test_stock_zarr_reads_a_flushed_region(tier: ZarrTier, tmp_path: Path) -> None:
    region = tier.allocate(SPEC)
    tier.write(region, 2, 3, filled(3, 7))
    tier.flush(region)
    (run,) = run_folders(tmp_path / "tier")
    array = zarr.open_array(run / SPEC.name, mode="r")
    expected = np.zeros((8, 100), np.uint8)
    expected[2:5] = 7
    assert array.shape == (8, 100)
    assert np.array_equal(np.asarray(array[:]), expected)


def test_a_flipped_byte_of_a_region_is_found(tier: ZarrTier, tmp_path: Path) -> None:
    region = tier.allocate(SPEC)
    tier.write(region, 0, 8, filled(8, 7))
    (page,) = [path for path in files(tmp_path / "tier") if "c" in path.parts]
    flip_byte(page, 3 * SPEC.unit_nbytes + 5)
    with pytest.raises(CorruptDataError, match=r"unit 3 of kv\.3\.0\.k\.1"):
        tier.read(region, 2, 2, filled(2, 0))


def test_bytes_in_use_are_counted_and_given_back(tier: ZarrTier, tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    with WeightStore.open(tmp_path / "store") as store:
        region = tier.allocate(SPEC)
        attached = tier.attach(store.stored(f"model.{TABLE}"), placed_units=5)
        assert tier.used_bytes == 800 + 5 * 24
        tier.free(region)
        assert tier.used_bytes == 5 * 24
        tier.free(attached)
    assert (tier.used_bytes, tier.peak_bytes) == (0, 920)
    assert [path.name for path in files(tmp_path / "tier")] == ["lock"]
    assert len(files(tmp_path / "store")) > 1


def test_a_budget_that_does_not_hold_it_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    tier = make_tier(tmp_path, budget_bytes=799)
    with pytest.raises(TierError, match=r"tiers\.disk.*800"):
        tier.allocate(SPEC)
    assert tier.used_bytes == 0
    tier.close()


def test_weights_are_served_from_the_stores_own_files(tier: ZarrTier, tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    with WeightStore.open(tmp_path / "store") as store:
        region = tier.attach(store.stored(f"model.{TABLE}"), placed_units=12)
    out = np.empty(7 * 24, np.uint8)
    tier.read(region, 3, 7, out)
    assert np.array_equal(out, unit_bytes(TABLE)[3 * 24 : 10 * 24])
    units = np.array([0, 3, 4, 7, 11])  # of three pages, two of one
    tier.gather(region, units, out[: 5 * 24])
    assert np.array_equal(out[: 5 * 24], unit_bytes(TABLE).reshape(12, 24)[units].reshape(-1))


def test_a_store_that_lacks_a_page_is_refused_at_once(tier: ZarrTier, tmp_path: Path) -> None:
    path = write_store(tmp_path / "store")
    with WeightStore.open(path) as store:
        stored = store.stored(f"model.{TABLE}")
    (path / TABLE / "c" / "2" / "0").unlink()
    with pytest.raises(CorruptDataError, match="is missing"):
        tier.attach(stored, placed_units=12)
    assert tier.used_bytes == 0


def test_close_removes_every_file_and_closes_every_descriptor(tmp_path: Path) -> None:
    before = open_files()
    tier = make_tier(tmp_path)
    for name in ("a", "b"):
        region = tier.allocate(RegionSpec(name=name, num_units=2, unit_nbytes=10))
        tier.write(region, 0, 1, np.ones(10, np.uint8))
    tier.close()
    tier.close()
    assert files(tmp_path) == []
    assert run_folders(tmp_path) == []
    assert open_files() == before


def test_what_a_killed_run_left_is_removed_and_a_living_runs_files_stay(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, numpy as np\n"
        "from flexflow_engine.abc.tier import RegionSpec\n"
        "from flexflow_tiers.zarr import ZarrOptions, ZarrTier\n"
        "tier = ZarrTier(label='disk', budget_bytes=10**6, options=ZarrOptions(pathlib.Path(sys.argv[1])))\n"
        "region = tier.allocate(RegionSpec(name='kv', num_units=2, unit_nbytes=10))\n"
        "tier.write(region, 0, 2, np.ones(20, np.uint8))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        make_tier(tmp_path).close()
        (survivor,) = run_folders(tmp_path)
        assert survivor.name.startswith(f"{child.pid}-")
        child.send_signal(signal.SIGKILL)
    assert run_folders(tmp_path) == [survivor]
    make_tier(tmp_path).close()
    assert run_folders(tmp_path) == []


def test_folders_of_runs_that_were_killed_as_they_began_or_ended_are_removed(tmp_path: Path) -> None:
    for name in (".7-draft", "7-began", "7-ended"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / ".7-draft" / "lock").touch()
    (tmp_path / "runs" / "7-began" / "lock").touch()
    make_tier(tmp_path).close()
    assert run_folders(tmp_path) == []


def test_a_run_that_finds_no_room_for_its_lock_leaves_nothing(tmp_path: Path) -> None:
    before = open_files()
    with no_room(nbytes=0), pytest.raises(StorageError, match="file too large"):
        make_tier(tmp_path)
    assert run_folders(tmp_path) == []
    assert open_files() == before


def test_runs_that_begin_and_end_at_once_take_nothing_from_each_other(tmp_path: Path) -> None:
    def runs(_: int) -> None:
        for _ in range(40):
            run = RunFolder(tmp_path)
            assert run.sample.exists()
            run.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(runs, range(8)))
    assert run_folders(tmp_path) == []


def test_importing_the_tier_imports_neither_torch_nor_zarr() -> None:
    program = "import sys, flexflow_tiers.zarr; assert not {'torch', 'zarr'} & set(sys.modules), 'heavy'"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_a_path_that_cannot_be_made_is_told_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="not a folder"):
        ZarrTier.check_available(ZarrOptions(tmp_path / "file" / "tier"))
    ZarrTier.check_available(ZarrOptions(tmp_path / "new" / "tier"))
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="others may not even try to make a folder in /proc")
def test_a_path_where_no_folder_can_be_made_is_told() -> None:
    with pytest.raises(StorageError, match=r"/proc/tier/runs: the folder can't be made; choose another path"):
        make_tier(Path("/proc/tier"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True).returncode:  # noqa: PLW1510
        pytest.skip("mounting a small file system is not permitted here")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_read_only_place_is_told(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match="can't be written") as caught:
        ZarrTier.check_available(ZarrOptions(small_disk / "tier"))
    assert caught.value.where == str(small_disk / "tier")
    with pytest.raises(StorageError, match="read-only"):
        make_tier(small_disk / "tier")


def test_regions_that_the_disk_cannot_hold_are_refused_before_the_first_byte(small_disk: Path) -> None:
    tier = make_tier(small_disk, budget_bytes=2**30)
    tier.allocate(RegionSpec(name="a", num_units=6, unit_nbytes=100_000))
    with pytest.raises(StorageError, match=r"b needs 588KiB.*free some space") as caught:
        tier.allocate(RegionSpec(name="b", num_units=6, unit_nbytes=100_000))
    assert caught.value.where == str(small_disk)
    assert tier.used_bytes == 600_000
    tier.close()


def test_a_disk_that_others_fill_meanwhile_is_told_and_written_units_stay(small_disk: Path) -> None:
    tier = make_tier(small_disk, budget_bytes=2**30)
    region = tier.allocate(RegionSpec(name="a", num_units=6, unit_nbytes=100_000))
    tier.write(region, 0, 1, np.ones(100_000, np.uint8))
    (small_disk / "other").write_bytes(bytes(600_000))
    with pytest.raises(StorageError, match=r"no space left.*free some space"):
        tier.write(region, 1, 5, np.ones(500_000, np.uint8))
    out = np.empty(100_000, np.uint8)
    tier.read(region, 0, 1, out)
    assert out.all()
    tier.close()
