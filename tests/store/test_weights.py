"""Weight stores: stock Zarr reads them, we read units of them, and what is not one is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from flexflow_engine.errors import CorruptDataError, FlexFlowError, StorageError
from flexflow_engine.store.header import KEY, read_header
from flexflow_engine.store.shard import CHECKSUM_NBYTES
from flexflow_engine.store.weights import WeightStore
from flexflow_engine.store.writing import StoreWriter
from store.stores import (
    BIAS,
    HALF,
    HEADER,
    LAYOUTS,
    TABLE,
    flip_byte,
    unit_bytes,
    values,
    write_page,
    write_store,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store")


def change_attributes(path: Path, **changes: Any) -> None:
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"][KEY] |= changes
    (path / "zarr.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize("name", LAYOUTS)
def test_stock_zarr_reads_every_array_under_its_checkpoint_name(path: Path, name: str) -> None:
    array = zarr.open_group(path, mode="r")[name]
    assert isinstance(array, zarr.Array)
    assert array.shape == LAYOUTS[name].shape
    assert np.array_equal(np.asarray(array[:]), values(name))
    assert np.asarray(array[:]).dtype == values(name).dtype


def test_bfloat16_is_its_bits_and_an_attribute(path: Path) -> None:
    group = zarr.open_group(path, mode="r")
    assert dict(group[HALF].attrs) == {"dtype": "bfloat16"}
    assert dict(group[TABLE].attrs) == {}


@pytest.mark.parametrize("name", LAYOUTS)
def test_units_are_read_across_pages_by_the_models_name(path: Path, name: str) -> None:
    unit_nbytes = LAYOUTS[name].unit_nbytes
    with WeightStore.open(path) as store:
        num_units = store.stored(f"model.{name}").num_units
        for first in range(num_units):
            for stop in range(first + 1, num_units + 1):
                out = np.empty((stop - first) * unit_nbytes, np.uint8)
                store.read_units(f"model.{name}", first, stop - first, out)
                assert np.array_equal(out, unit_bytes(name)[first * unit_nbytes : stop * unit_nbytes])


def test_a_stored_tensor_tells_its_cut(path: Path) -> None:
    with WeightStore.open(path) as store:
        stored = store.stored(f"model.{TABLE}")
        assert (stored.name, stored.path) == (TABLE, path / TABLE)
        assert (stored.num_units, stored.unit_nbytes, stored.units_per_page) == (12, 24, 4)
        assert store.stored(f"model.{BIAS}").num_units == 1
        assert store.nbytes == HEADER.nbytes


def test_a_tensor_that_the_store_lacks_is_named(path: Path) -> None:
    with WeightStore.open(path) as store, pytest.raises(CorruptDataError, match=r"no tensor model\.fc9"):
        store.stored("model.fc9")


def test_a_flipped_byte_names_tensor_unit_and_file(path: Path) -> None:
    page = path / TABLE / "c" / "1" / "0"
    flip_byte(page, 30)
    with WeightStore.open(path) as store, pytest.raises(CorruptDataError, match=r"unit 1 of decoder\.embed") as caught:
        store.read_units(f"model.{TABLE}", 0, 12, np.empty(12 * 24, np.uint8))
    assert caught.value.where == str(page)
    assert "import" in caught.value.fix


def test_nothing_at_the_path_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no weight store"):
        WeightStore.open(tmp_path / "nothing")


def test_a_foreign_group_is_refused(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "foreign", attributes={"mine": 1})
    with pytest.raises(CorruptDataError, match="not a weight store"):
        WeightStore.open(tmp_path / "foreign")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"], ids=["empty", "cut", "a list", "no text"])
def test_an_unreadable_group_is_refused(path: Path, content: bytes) -> None:
    (path / "zarr.json").write_bytes(content)
    with pytest.raises(CorruptDataError):
        WeightStore.open(path)


def test_a_newer_store_is_refused_and_the_way_out_is_told(path: Path) -> None:
    change_attributes(path, format_version=2)
    with pytest.raises(StorageError, match=r"format 2.*update"):
        WeightStore.open(path)


def test_an_incomplete_store_is_refused(path: Path) -> None:
    change_attributes(path, complete=False)
    with pytest.raises(StorageError, match="incomplete"):
        WeightStore.open(path)


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (2, 6), "shards": (8, 6), "compressors": None},
        {"chunks": (8, 6), "compressors": None},
        {"chunks": (2, 3), "shards": (8, 6)},
    ],
    ids=["no checksum", "no shards", "cut by columns"],
)
def test_an_array_of_another_layout_is_refused(path: Path, options: dict[str, Any]) -> None:
    zarr.create_array(path / TABLE, shape=(23, 6), dtype="float16", overwrite=True, **options)
    with WeightStore.open(path) as store, pytest.raises(CorruptDataError, match="not cut the way"):
        store.stored(f"model.{TABLE}")


def test_a_writer_keeps_whole_pages_and_only_those(path: Path) -> None:
    (path / TABLE / "c" / "1" / "0").write_bytes(b"torn")
    flip_byte(path / HALF / "c" / "0" / "0", -1)
    (path / HALF / "c" / "2" / "0").unlink()
    writer = StoreWriter(path, HEADER, LAYOUTS)
    assert [writer.has_page(TABLE, page) for page in range(3)] == [True, False, True]
    assert [writer.has_page(HALF, page) for page in range(3)] == [False, True, False]
    assert not read_header(path).complete


def test_a_writer_keeps_no_page_whose_data_never_reached_the_disk(path: Path) -> None:
    """As a power cut may leave it: with its name, size and index."""
    page = path / TABLE / "c" / "1" / "0"
    data = LAYOUTS[TABLE].units_per_page * (LAYOUTS[TABLE].unit_nbytes + CHECKSUM_NBYTES)
    page.write_bytes(bytes(data) + page.read_bytes()[data:])
    writer = StoreWriter(path, HEADER, LAYOUTS)
    assert [writer.has_page(TABLE, page) for page in range(3)] == [True, False, True]


def test_a_writer_makes_arrays_of_another_layout_anew(path: Path) -> None:
    narrower = LAYOUTS | {TABLE: replace(LAYOUTS[TABLE], page_shape=(4, 6))}
    writer = StoreWriter(path, HEADER, narrower)
    assert not writer.has_page(TABLE, 0)
    assert writer.has_page(HALF, 0)


def test_a_page_that_could_not_be_written_leaves_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = path / TABLE / "c" / "0" / "0"
    page.unlink()
    writer = StoreWriter(path, HEADER, LAYOUTS)
    page.mkdir()  # a folder in the way of the final name
    (page / "occupied").touch()
    with pytest.raises(FlexFlowError):
        write_page(writer, TABLE, 0)
    assert [entry.name for entry in page.parent.iterdir()] == ["0"]


def test_no_file_stays_open(path: Path) -> None:
    def open_pages() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(str(path) in str(link.readlink()) for link in links if link.is_symlink())

    with WeightStore.open(path) as store:
        store.read_units(f"model.{TABLE}", 0, 12, np.empty(12 * 24, np.uint8))
        assert open_pages() == 3
    assert open_pages() == 0


def test_what_an_array_says_of_itself_is_read_once(path: Path) -> None:
    """There are thousands of arrays in a large model."""
    with WeightStore.open(path) as store:
        for _ in range(2):
            out = np.empty(28, np.uint8)
            store.read_units(f"model.{BIAS}", 0, 1, out)
            (path / BIAS / "zarr.json").unlink(missing_ok=True)
    assert np.array_equal(out, unit_bytes(BIAS))
