"""Shard files: what is written is read, by us and by stock Zarr, whatever is aligned, and damage is found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexflow_engine.errors import CorruptDataError, StorageError
from flexflow_engine.store.access import BUFFERED, Access, OpenFile
from flexflow_engine.store.array import ArrayLayout, create_array
from flexflow_engine.store.index import open_complete, read_index, write_index
from flexflow_engine.store.shard import BLOCK_NBYTES, CHECKSUM_NBYTES, ShardFile
from flexflow_engine.store.units import gather_units, read_units, write_units
from store.stores import draw_units, flip_byte, random_units, shifted

UNIT_NBYTES = (1, 70, 508, 512, 4092, 4093, 4096, 5000, 8188, 8192, 20_480, 33_000)
"""Around a sector, a block, a block with its checksum, and the least buffer."""


def make(folder: Path, num_units: int, unit_nbytes: int) -> ShardFile:
    layout = ArrayLayout.opaque(num_units=num_units, unit_nbytes=unit_nbytes, units_per_page=num_units)
    layout = replace(layout, bare=False)
    create_array(folder, layout)
    file = layout.page_file(folder, 0, name="fc1", fix="import again")
    file.path.parent.mkdir(parents=True)
    return file


@contextmanager
def opened(file: ShardFile, access: Access | None = None) -> Iterator[OpenFile]:
    """Open for reading and writing; through the page cache, unless `access` says otherwise."""
    access = access or Access(BUFFERED)
    descriptor = os.open(file.path, os.O_RDWR | os.O_CREAT | access.mode.flags)
    try:
        with access.using(descriptor) as opened_file:
            yield opened_file
    finally:
        os.close(descriptor)


def written_file(folder: Path, num_units: int = 4, unit_nbytes: int = 10) -> ShardFile:
    file = make(folder, num_units, unit_nbytes)
    with opened(file) as writer:
        write_units(file, writer.descriptor, random_units(num_units, unit_nbytes))
        write_index(file, writer.descriptor, np.ones(num_units, np.bool_))
    return file


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])  # an access keeps no state
@given(data=st.data(), unit_nbytes=st.sampled_from(UNIT_NBYTES))
def test_any_units_are_read_back_and_stock_zarr_agrees(
    tmp_path_factory: pytest.TempPathFactory, access: Access, data: st.DataObject, unit_nbytes: int
) -> None:
    """Adjoining ones, and single ones: the last one's block ends where the file ends, the largest fit no buffer."""
    num_units = data.draw(st.integers(1, 12))
    file = written_file(tmp_path_factory.mktemp("array"), num_units, unit_nbytes)
    expected = random_units(num_units, unit_nbytes).reshape(num_units, unit_nbytes)
    with opened(file, access) as reader:
        assert read_index(file, reader).all()
        for _ in range(6):
            first, count, out = draw_units(data, num_units, unit_nbytes)
            read_units(file, reader, first, count, out)
            assert np.array_equal(out, expected[first : first + count].reshape(-1))
            units = np.array(sorted(data.draw(st.sets(st.integers(0, num_units - 1)))), np.int64)
            single = np.zeros((len(units), unit_nbytes), np.uint8)
            gather_units(file, reader, units, single)
            assert np.array_equal(single, expected[units])
    stock = zarr.open_array(file.path.parents[2], mode="r")
    assert np.array_equal(np.asarray(stock[:]), expected)


def test_more_units_than_one_call_takes_are_moved(tmp_path: Path) -> None:
    file = written_file(tmp_path, num_units=1500, unit_nbytes=8)
    out = np.empty(1400 * 8, np.uint8)
    with opened(file) as reader:
        read_units(file, reader, 100, 1400, out)
    assert np.array_equal(out, random_units(1500, 8)[800:])


def test_a_page_of_one_unit_is_byte_for_byte_what_stock_zarr_writes(tmp_path: Path) -> None:
    file = written_file(tmp_path, num_units=1)
    ours = file.path.read_bytes()
    file.path.unlink()
    zarr.open_array(tmp_path, mode="r+")[:] = random_units(1, 10).reshape(1, 10)
    assert file.path.read_bytes() == ours


def test_whole_blocks_are_read_straight_into_aligned_memory(tmp_path: Path, access: Access) -> None:
    """The buffer holds what went through it: of a unit of five blocks, the checksum behind them and nothing else."""
    file = written_file(tmp_path, num_units=1, unit_nbytes=5 * BLOCK_NBYTES)
    out = shifted(5 * BLOCK_NBYTES, by=0)
    with opened(file, access) as reader:
        reader.buffer.fill(0)
        read_units(file, reader, 0, 1, out)
        assert not reader.buffer[CHECKSUM_NBYTES + file.index_nbytes :].any()
    assert np.array_equal(out, random_units(1, 5 * BLOCK_NBYTES))


def damaged_file(folder: Path, unit_nbytes: int, offset: int) -> ShardFile:
    file = written_file(folder, unit_nbytes=unit_nbytes)
    flip_byte(file.path, offset)
    return file


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("byte", [0, 4999, 8191, 8192, 19_999, 20_000, 20_003])
def test_a_flipped_byte_is_found_wherever_it_is_and_however_the_unit_is_read(
    tmp_path: Path, access: Access, byte: int, shift: int
) -> None:
    """In whole blocks, in the rest behind them, in the checksum; in place, through the buffer and in pieces."""
    file = written_file(tmp_path, num_units=1, unit_nbytes=20_000)
    flip_byte(file.path, byte)
    with opened(file, access) as reader, pytest.raises(CorruptDataError, match="unit 0 of fc1") as caught:
        read_units(file, reader, 0, 1, shifted(20_000, by=shift))
    assert caught.value.where == str(file.path)
    assert caught.value.fix == "import again"


@pytest.mark.parametrize("offset", [14, 23, 24, 27], ids=["first byte", "last byte", "checksum", "checksum's end"])
def test_the_damaged_one_among_several_units_is_named(tmp_path: Path, access: Access, offset: int) -> None:
    file = damaged_file(tmp_path, 10, offset)
    with opened(file, access) as reader, pytest.raises(CorruptDataError, match="unit 1 of fc1"):
        read_units(file, reader, 0, 4, np.empty(40, np.uint8))


@pytest.mark.parametrize(("byte", "unit"), [(5003, 0), (10_008, 2), (20_015, 3)], ids=["checksum", "first", "last"])
def test_a_damaged_unit_is_named_where_single_ones_are_gathered(
    tmp_path: Path, access: Access, byte: int, unit: int
) -> None:
    file = damaged_file(tmp_path, 5000, byte)
    units = np.array([0, 2, 3], np.int64)
    with opened(file, access) as reader:
        with pytest.raises(CorruptDataError, match=f"unit {unit} of fc1"):
            gather_units(file, reader, units, np.empty((3, 5000), np.uint8))
        out = np.empty((1, 5000), np.uint8)
        gather_units(file, reader, np.array([1]), out)
    assert np.array_equal(out[0], random_units(4, 5000)[5000:10_000])


def test_units_beside_a_damaged_one_are_still_read(tmp_path: Path, access: Access) -> None:
    file = damaged_file(tmp_path, 10, 14)
    out = np.empty(20, np.uint8)
    with opened(file, access) as reader:
        read_units(file, reader, 2, 2, out)
    assert np.array_equal(out, random_units(4, 10)[20:])


@pytest.mark.parametrize("offset", [56, 64, -1], ids=["an offset", "a size", "the index's checksum"])
def test_a_damaged_index_is_found_when_the_file_is_opened(tmp_path: Path, access: Access, offset: int) -> None:
    file = damaged_file(tmp_path, 10, offset)
    with pytest.raises(CorruptDataError, match="index of fc1"):
        open_complete(file, access)


@pytest.mark.parametrize("nbytes", [0, 30, 123], ids=["empty", "cut in a unit", "one byte short"])
def test_a_cut_file_is_found(tmp_path: Path, access: Access, nbytes: int) -> None:
    file = written_file(tmp_path)
    os.truncate(file.path, nbytes)
    with pytest.raises(CorruptDataError, match=f"has {nbytes} bytes instead of 124"):
        open_complete(file, access)


@pytest.mark.parametrize("nbytes", [0, 30, 4096, 12_288, 15_000, 20_003])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "not aligned"])
def test_a_file_cut_while_it_is_open_is_found(tmp_path: Path, access: Access, nbytes: int, shift: int) -> None:
    file = written_file(tmp_path, num_units=1, unit_nbytes=20_000)
    with opened(file, access) as reader:
        os.truncate(file.path, nbytes)
        with pytest.raises(CorruptDataError, match=f"ends at byte {nbytes}, before its last unit"):
            read_units(file, reader, 0, 1, shifted(20_000, by=shift))


@pytest.mark.parametrize("nbytes", [0, 4096, 5003, 16_384, 20_015])
def test_a_file_cut_while_single_units_are_gathered_is_found(tmp_path: Path, access: Access, nbytes: int) -> None:
    file = written_file(tmp_path, unit_nbytes=5000)
    with opened(file, access) as reader:
        os.truncate(file.path, nbytes)
        with pytest.raises(CorruptDataError, match="before its last unit"):
            gather_units(file, reader, np.array([0, 3]), np.empty((2, 5000), np.uint8))


def test_a_file_that_cannot_be_read_is_a_storage_error_where_single_units_are_gathered(tmp_path: Path) -> None:
    file = written_file(tmp_path, unit_nbytes=5000)
    descriptor = os.open(file.path, os.O_WRONLY)
    try:
        with Access(BUFFERED).using(descriptor) as writer, pytest.raises(StorageError, match="bad file descriptor"):
            gather_units(file, writer, np.array([1]), np.empty((1, 5000), np.uint8))
    finally:
        os.close(descriptor)


def test_a_missing_file_is_a_storage_error(tmp_path: Path, access: Access) -> None:
    file = written_file(tmp_path)
    file.path.unlink()
    with pytest.raises(StorageError, match="no such file"):
        open_complete(file, access)


@pytest.mark.parametrize("unit_nbytes", [10, 5000, 20_000])
def test_reading_fills_the_callers_buffer_and_nothing_beside_it(
    tmp_path: Path, access: Access, unit_nbytes: int
) -> None:
    file = written_file(tmp_path, unit_nbytes=unit_nbytes)
    around = np.zeros(4 * unit_nbytes + 20, np.uint8)
    with opened(file, access) as reader:
        read_units(file, reader, 0, 4, around[10:-10])
    assert np.array_equal(around[10:-10], random_units(4, unit_nbytes))
    assert not around[:10].any()
    assert not around[-10:].any()
