"""Shard files: what is written is read, by us and by stock Zarr, and damage is found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from flexflow_engine.errors import CorruptDataError, StorageError
from flexflow_engine.store.array import ArrayLayout, create_array
from flexflow_engine.store.shard import ShardFile
from store.stores import flip_byte


def make(folder: Path, num_units: int, unit_nbytes: int) -> ShardFile:
    layout = ArrayLayout.opaque(num_units=num_units, unit_nbytes=unit_nbytes, units_per_page=num_units)
    create_array(folder, layout)
    file = layout.page_file(folder, 0, name="fc1", fix="import again")
    file.path.parent.mkdir(parents=True)
    return file


@contextmanager
def opened(file: ShardFile) -> Iterator[int]:
    descriptor = os.open(file.path, os.O_RDWR | os.O_CREAT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def random_units(count: int, unit_nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(count).integers(1, 256, count * unit_nbytes).astype(np.uint8)


def written_file(folder: Path, num_units: int = 4, unit_nbytes: int = 10) -> ShardFile:
    file = make(folder, num_units, unit_nbytes)
    with opened(file) as descriptor:
        file.write_units(descriptor, 0, num_units, random_units(num_units, unit_nbytes))
        file.write_index(descriptor, np.ones(num_units, np.bool_))
    return file


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_units=st.integers(1, 40), unit_nbytes=st.integers(1, 70))
def test_any_units_written_in_any_order_are_read_back_and_stock_zarr_agrees(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, num_units: int, unit_nbytes: int
) -> None:
    file = make(tmp_path_factory.mktemp("array"), num_units, unit_nbytes)
    expected = np.zeros((num_units, unit_nbytes), np.uint8)
    written = np.zeros(num_units, np.bool_)
    with opened(file) as descriptor:
        for value in range(1, data.draw(st.integers(0, 6)) + 1):
            first = data.draw(st.integers(0, num_units - 1))
            count = data.draw(st.integers(1, num_units - first))
            expected[first : first + count] = value
            written[first : first + count] = True
            file.write_units(descriptor, first, count, np.full(count * unit_nbytes, value, np.uint8))
        file.write_index(descriptor, written)
        assert np.array_equal(file.read_index(descriptor), written)
        for unit in np.flatnonzero(written):
            out = np.empty(unit_nbytes, np.uint8)
            file.read_units(descriptor, int(unit), 1, out)
            assert np.array_equal(out, expected[unit])
    stock = zarr.open_array(file.path.parents[2], mode="r")
    assert np.array_equal(np.asarray(stock[:]), expected)


def test_more_units_than_one_call_takes_are_moved(tmp_path: Path) -> None:
    file = written_file(tmp_path, num_units=1500, unit_nbytes=8)
    out = np.empty(1400 * 8, np.uint8)
    with opened(file) as descriptor:
        file.read_units(descriptor, 100, 1400, out)
    assert np.array_equal(out, random_units(1500, 8)[800:])


def test_a_page_of_one_unit_is_byte_for_byte_what_stock_zarr_writes(tmp_path: Path) -> None:
    file = written_file(tmp_path, num_units=1)
    ours = file.path.read_bytes()
    file.path.unlink()
    zarr.open_array(tmp_path, mode="r+")[:] = random_units(1, 10).reshape(1, 10)
    assert file.path.read_bytes() == ours


@pytest.mark.parametrize("offset", [14, 23, 24, 27], ids=["first byte", "last byte", "checksum", "checksum's end"])
def test_a_flipped_byte_is_found_and_names_tensor_file_and_unit(tmp_path: Path, offset: int) -> None:
    file = written_file(tmp_path)
    flip_byte(file.path, offset)
    with opened(file) as descriptor, pytest.raises(CorruptDataError, match="unit 1 of fc1") as caught:
        file.read_units(descriptor, 0, 4, np.empty(40, np.uint8))
    assert caught.value.where == str(file.path)
    assert caught.value.fix == "import again"


def test_units_beside_a_damaged_one_are_still_read(tmp_path: Path) -> None:
    file = written_file(tmp_path)
    flip_byte(file.path, 14)
    out = np.empty(20, np.uint8)
    with opened(file) as descriptor:
        file.read_units(descriptor, 2, 2, out)
    assert np.array_equal(out, random_units(4, 10)[20:])


@pytest.mark.parametrize("offset", [56, 64, -1], ids=["an offset", "a size", "the index's checksum"])
def test_a_damaged_index_is_found_when_the_file_is_opened(tmp_path: Path, offset: int) -> None:
    file = written_file(tmp_path)
    flip_byte(file.path, offset)
    with pytest.raises(CorruptDataError, match="index of fc1"):
        file.open_complete()


@pytest.mark.parametrize("nbytes", [0, 30, 123], ids=["empty", "cut in a unit", "one byte short"])
def test_a_cut_file_is_found(tmp_path: Path, nbytes: int) -> None:
    file = written_file(tmp_path)
    os.truncate(file.path, nbytes)
    with pytest.raises(CorruptDataError, match=f"has {nbytes} bytes instead of 124"):
        file.open_complete()


def test_a_file_cut_while_it_is_open_is_found(tmp_path: Path) -> None:
    file = written_file(tmp_path)
    with opened(file) as descriptor:
        os.truncate(file.path, 30)
        with pytest.raises(CorruptDataError, match="ends at byte 30"):
            file.read_units(descriptor, 0, 4, np.empty(40, np.uint8))


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    file = written_file(tmp_path)
    file.path.unlink()
    with pytest.raises(StorageError, match="no such file"):
        file.open_complete()


def test_reading_fills_the_callers_buffer_in_place(tmp_path: Path) -> None:
    file = written_file(tmp_path)
    around = np.zeros(60, np.uint8)
    with opened(file) as descriptor:
        file.read_units(descriptor, 0, 4, around[10:50])
    assert np.array_equal(around[10:50], random_units(4, 10))
    assert not around[:10].any()
    assert not around[50:].any()
