"""Regions of a run: any units, written in any order and by several threads, are read back; damage is found."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexflow_engine.abc.tier import RegionSpec
from flexflow_engine.errors import CorruptDataError
from flexflow_engine.store.access import BUFFERED, Access
from flexflow_engine.store.scratch import ScratchArray
from flexflow_engine.store.shard import BLOCK_NBYTES
from store.stores import LEAST_BUFFER, draw_units, flip_byte, random_units, shifted

UNIT_NBYTES = (1, 70, 512, 4092, 4096, 4608, 5000, 8192, 33_000)
"""Around a sector, a block, and the least buffer; pages of 4 bits among them."""


def make(folder: Path, access: Access, *, num_units: int, unit_nbytes: int) -> ScratchArray:
    return ScratchArray(folder, RegionSpec(name="kv", num_units=num_units, unit_nbytes=unit_nbytes), access)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])  # arrays have their own folder
@given(data=st.data(), unit_nbytes=st.sampled_from(UNIT_NBYTES))
def test_any_units_written_in_any_order_are_read_back_and_stock_zarr_agrees(
    tmp_path_factory: pytest.TempPathFactory, access: Access, data: st.DataObject, unit_nbytes: int
) -> None:
    num_units = data.draw(st.integers(1, 12))
    folder = tmp_path_factory.mktemp("array")
    array = make(folder, access, num_units=num_units, unit_nbytes=unit_nbytes)
    expected = np.zeros((num_units, unit_nbytes), np.uint8)
    for seed in range(data.draw(st.integers(0, 6))):
        first, count, units = draw_units(data, num_units, unit_nbytes)
        units[:] = random_units(count, unit_nbytes, seed)
        expected[first : first + count] = units.reshape(count, unit_nbytes)
        array.write(first, count, units)
    for _ in range(4):
        first, count, out = draw_units(data, num_units, unit_nbytes)
        array.read(first, count, out)
        assert np.array_equal(out, expected[first : first + count].reshape(-1))
    array.flush()
    assert np.array_equal(np.asarray(zarr.open_array(folder / "kv", mode="r")[:]), expected)


def test_units_that_share_a_block_are_written_by_several_threads_at_once(tmp_path: Path, access: Access) -> None:
    array = make(tmp_path, access, num_units=256, unit_nbytes=700)
    expected = random_units(256, 700, seed=1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda unit: array.write(unit, 1, expected[700 * unit : 700 * (unit + 1)]), range(256)))
    out = np.empty(256 * 700, np.uint8)
    array.read(0, 256, out)
    assert np.array_equal(out, expected)


def test_whole_blocks_go_straight_from_and_to_aligned_memory(tmp_path: Path) -> None:
    """The buffer is what everything else goes through: it stays as it was."""
    access = Access(BUFFERED, buffer_nbytes=LEAST_BUFFER)
    array = make(tmp_path, access, num_units=6, unit_nbytes=4 * BLOCK_NBYTES)
    units, out = shifted(24 * BLOCK_NBYTES, by=0), shifted(8 * BLOCK_NBYTES, by=0)
    units[:] = random_units(6, 4 * BLOCK_NBYTES, seed=2)
    array.write(0, 6, units)
    array.read(2, 2, out)
    with access.lend(tmp_path / "kv" / "c" / "0" / "0", lambda: -1) as file:
        assert not file.buffer.any()
    assert np.array_equal(out, units[8 * BLOCK_NBYTES : 16 * BLOCK_NBYTES])


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("byte", [20_000, 20_479, 20_480, 36_863, 36_864, 39_999])
def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path, access: Access, byte: int, shift: int) -> None:
    """In the block that two units share, in whole blocks, at the unit's end."""
    array = make(tmp_path, access, num_units=3, unit_nbytes=20_000)
    array.write(0, 3, random_units(3, 20_000, seed=3))
    flip_byte(tmp_path / "kv" / "c" / "0" / "0", byte)
    with pytest.raises(CorruptDataError, match="unit 1 of kv does not match its checksum"):
        array.read(0, 3, shifted(60_000, by=shift))
    array.read(0, 1, shifted(20_000, by=shift))
    array.read(2, 1, shifted(20_000, by=shift))


def test_a_write_that_the_disk_lost_is_found(tmp_path: Path, access: Access) -> None:
    array = make(tmp_path, access, num_units=4, unit_nbytes=BLOCK_NBYTES)
    array.write(0, 4, random_units(4, BLOCK_NBYTES, seed=4))
    path = tmp_path / "kv" / "c" / "0" / "0"
    before = path.read_bytes()
    array.write(2, 1, random_units(1, BLOCK_NBYTES, seed=5))
    path.write_bytes(before)
    with pytest.raises(CorruptDataError, match="unit 2 of kv"):
        array.read(0, 4, np.empty(4 * BLOCK_NBYTES, np.uint8))


def test_a_file_cut_while_it_is_open_is_found(tmp_path: Path, access: Access) -> None:
    array = make(tmp_path, access, num_units=4, unit_nbytes=5000)
    array.write(0, 4, random_units(4, 5000, seed=6))
    with (tmp_path / "kv" / "c" / "0" / "0").open("r+b") as file:
        file.truncate(9000)
    with pytest.raises(CorruptDataError, match="ends at byte 9000"):
        array.read(0, 4, np.empty(20_000, np.uint8))
