"""How files are opened: past the page cache where the file system allows it, and nothing of them stays in it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np
import pytest

from flexflow_engine.abc.tier import RegionSpec
from flexflow_engine.errors import StorageError
from flexflow_engine.store.access import BUFFERED, MODES, READS_AT_ONCE, Access
from flexflow_engine.store.array import ArrayLayout
from flexflow_engine.store.settling import UNSETTLED_NBYTES
from flexflow_engine.store.shard import BLOCK_NBYTES
from flexflow_engine.store.weights import WeightStore
from flexflow_engine.store.writing import StoreWriter
from flexflow_engine.testing.page_cache import cached_nbytes, drop_cached
from flexflow_tiers.zarr import ZarrOptions, ZarrTier
from store.stores import HEADER

MIB = 2**20
WIDE = ArrayLayout.plain((64, MIB // 4), "float32", page_rows=8, unit_rows=8)
"""Eight pages of 8 MiB."""
PAGE_NBYTES = 8 * MIB


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample"
    path.write_bytes(bytes(BLOCK_NBYTES))
    return path


@pytest.fixture
def ram_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system without direct I/O (and without an end, so that it tells no free space)."""
    path = tmp_path / "ram"
    path.mkdir()
    if subprocess.run(["mount", "-t", "ramfs", "ramfs", path], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.fixture
def disk(tmp_path: Path, sample: Path) -> Path:
    """A folder on a disk."""
    drop_cached(tmp_path)
    if Access.tried_on(sample).mode is BUFFERED or cached_nbytes(tmp_path):
        pytest.skip("the temporary folder does not lie on a disk that takes direct I/O")
    return tmp_path / "disk"


def new_writer(path: Path) -> StoreWriter:
    header = replace(HEADER, arrays={"model.wide": "wide"}, nbytes=WIDE.nbytes)
    return StoreWriter(path, header, {"wide": WIDE})


def write_page(writer: StoreWriter, page: int) -> None:
    writer.write_page("wide", page, np.full(PAGE_NBYTES, page + 1, np.uint8))


def write_store(path: Path) -> Path:
    writer = new_writer(path)
    for page in range(WIDE.num_pages):
        write_page(writer, page)
    writer.finish()
    return path


def open_tier(path: Path) -> closing[ZarrTier]:
    return closing(ZarrTier(label="disk", budget_bytes=2**30, options=ZarrOptions(path)))


def test_the_first_mode_that_the_file_system_takes_is_chosen_without_a_word(disk: Path, sample: Path) -> None:
    access = Access.tried_on(sample)
    assert access.mode in MODES[:-1]
    assert access.notices(disk) == ()


def test_a_file_system_that_refuses_direct_io_is_found_out(ram_disk: Path) -> None:
    sample = ram_disk / "sample"
    sample.write_bytes(bytes(BLOCK_NBYTES))
    access = Access.tried_on(sample)
    assert access.mode is BUFFERED
    assert access.notices(ram_disk)[0].startswith(f"{ram_disk}: the file system refuses direct I/O")


@pytest.mark.usefixtures("no_direct_io")
def test_where_direct_io_is_refused_the_page_cache_is_used_and_the_user_is_told(tmp_path: Path) -> None:
    with WeightStore.open(write_store(tmp_path / "store")) as store, open_tier(tmp_path / "tier") as tier:
        assert tier.notices[0].startswith(f"{tmp_path / 'tier'}: the file system refuses direct I/O")
        assert store.notices[0].startswith(f"{tmp_path / 'store'}: the file system refuses direct I/O")
        page = np.zeros(PAGE_NBYTES, np.uint8)
        tier.read(tier.attach(store.stored("model.wide"), placed_units=0), 3, 1, page)
        assert (page == 4).all()
        region = tier.allocate(RegionSpec(name="kv", num_units=1, unit_nbytes=PAGE_NBYTES))
        tier.write(region, 0, 1, page)
        page.fill(0)
        tier.read(region, 0, 1, page)
        assert (page == 4).all()


def test_a_sample_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        Access.tried_on(tmp_path / "nothing")


def test_there_are_as_many_buffers_as_borrowers_at_once_however_often_they_come(sample: Path) -> None:
    access, descriptor, seen = Access(BUFFERED), os.open(sample, os.O_RDONLY), set[int]()
    for _ in range(3):
        with access.using(descriptor) as first, access.using(descriptor) as second:
            addresses = {first.buffer.ctypes.data, second.buffer.ctypes.data}
            assert len(addresses) == 2
            seen |= addresses
    os.close(descriptor)
    assert len(seen) == 2
    assert {address % BLOCK_NBYTES for address in seen} == {0}


def test_no_more_reads_are_at_the_disk_than_it_works_on_at_once_and_a_failed_one_makes_room(sample: Path) -> None:
    access, descriptor = Access(BUFFERED), os.open(sample, os.O_RDONLY)
    together, most, lock = 0, 0, Lock()

    def read(number: int) -> None:
        nonlocal together, most
        with contextlib.suppress(OSError), access.using(descriptor) as file, file.reading:
            with lock:
                together += 1
                most = max(most, together)
            time.sleep(0.002)
            with lock:
                together -= 1
            if number % 2:
                raise OSError

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(read, range(24)))
    os.close(descriptor)
    assert most == READS_AT_ONCE


def test_what_an_import_wrote_is_on_the_disk_and_not_in_the_page_cache(disk: Path) -> None:
    writer = new_writer(disk)
    for page in range(WIDE.num_pages):
        write_page(writer, page)
        assert cached_nbytes(disk / "wide" / "c") <= UNSETTLED_NBYTES + PAGE_NBYTES
    writer.finish()
    assert cached_nbytes(disk / "wide" / "c") == 0


def test_pages_that_an_interrupted_import_left_in_the_page_cache_are_taken_out(disk: Path) -> None:
    write_page(new_writer(disk), 0)
    writer = new_writer(disk)
    assert writer.has_page("wide", 0)
    for page in range(1, WIDE.num_pages):
        write_page(writer, page)
    writer.finish()
    assert cached_nbytes(disk / "wide" / "c") == 0


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "not aligned"])
def test_reading_weights_leaves_nothing_in_the_page_cache(disk: Path, shift: int) -> None:
    memory = np.empty(PAGE_NBYTES + 1, np.uint8)
    with WeightStore.open(write_store(disk / "store")) as store, open_tier(disk / "tier") as tier:
        region = tier.attach(store.stored("model.wide"), placed_units=0)
        store.read_units("model.wide", 0, 1, memory[shift:][:PAGE_NBYTES])
        for page in range(1, WIDE.num_pages):
            tier.read(region, page, 1, memory[shift:][:PAGE_NBYTES])
    assert memory[shift] == WIDE.num_pages
    assert cached_nbytes(disk / "store" / "wide" / "c") == 0


@pytest.mark.parametrize("unit_nbytes", [1500, 65_536, 100_003])
def test_a_region_leaves_nothing_in_the_page_cache(disk: Path, unit_nbytes: int) -> None:
    units = np.full(20 * unit_nbytes, 3, np.uint8)
    with open_tier(disk) as tier:
        region = tier.allocate(RegionSpec(name="kv", num_units=20, unit_nbytes=unit_nbytes))
        tier.write(region, 0, 20, units)
        tier.read(region, 5, 10, units[: 10 * unit_nbytes])
        (run,) = (disk / "runs").iterdir()
        assert cached_nbytes(run / "kv" / "c") == 0
        tier.flush(region)
        assert cached_nbytes(run / "kv" / "c") == 0
