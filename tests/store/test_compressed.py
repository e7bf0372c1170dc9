"""Pages whose units are compressed: of any length, found by the index, each verified; stock Zarr reads them too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.compressor import Compressor
from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.errors import CorruptDataError
from flexflow_engine.store.access import BUFFERED, Access
from flexflow_engine.store.array import ArrayLayout, read_layout
from flexflow_engine.store.encoding import Compression
from flexflow_engine.store.header import StoreHeader
from flexflow_engine.store.shard import BLOCK_NBYTES, CHECKSUM_NBYTES
from flexflow_engine.store.weights import StoredUnits, WeightStore
from flexflow_engine.store.writing import StoreWriter
from flexflow_plugins.codecs.lossless import FAMILY, BloscCodec, ZstdCodec
from flexflow_tiers.zarr import ZarrOptions, ZarrTier
from store.stores import flip_byte

ZSTD = ZstdCodec().compressor("float32")
SHAPE, UNIT_ROWS, PAGE_ROWS = (37, 300), 3, 12
UNIT_NBYTES = UNIT_ROWS * SHAPE[1] * 4
NUM_UNITS = 13


def layout(compressor: Compressor) -> ArrayLayout:
    plain = ArrayLayout.plain(SHAPE, "float32", page_rows=PAGE_ROWS, unit_rows=UNIT_ROWS)
    return replace(plain, compression=Compression.parse(compressor.zarr_codec()))


def numbers() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Rows of every kind: noise, which does not compress, and constants, which do."""
    rows = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    rows[::4] = 7.0
    return rows


def unit_bytes() -> HostBytes:
    """uint8 [NUM_UNITS * UNIT_NBYTES], the last unit padded."""
    data = np.zeros(NUM_UNITS * UNIT_NBYTES, np.uint8)
    own = numbers().reshape(-1).view(np.uint8)
    data[: len(own)] = own
    return data


def new_writer(path: Path, compressor: Compressor = ZSTD) -> StoreWriter:
    header = StoreHeader(
        reference="some/model",
        content_key="0123",
        dtype="float32",
        codec="zstd",
        table_codec="zstd",
        small_codec="none",
        arrays={"model.fc": "fc"},
        nbytes=0,
    )
    return StoreWriter(path, header, {"fc": layout(compressor)}, compressor)


def write_page(writer: StoreWriter, page: int) -> None:
    start = page * PAGE_ROWS // UNIT_ROWS * UNIT_NBYTES
    slots = writer.page_file("fc", page).num_slots
    writer.write_page("fc", page, unit_bytes()[start : start + slots * UNIT_NBYTES])


def write_store(path: Path, compressor: Compressor = ZSTD) -> Path:
    writer = new_writer(path, compressor)
    for page in range(layout(compressor).num_pages):
        write_page(writer, page)
    writer.finish()
    return path


def page_path(path: Path, page: int) -> Path:
    return path / "fc" / "c" / str(page) / "0"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("compressed") / "store")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store")


def read(path: Path, first: int = 0, count: int = NUM_UNITS) -> HostBytes:
    out = np.empty(count * UNIT_NBYTES, np.uint8)
    with WeightStore.open(path, ZSTD) as store:
        store.read_units("model.fc", first, count, out)
    return out


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
@pytest.mark.parametrize("codec", [codec_class() for codec_class in FAMILY], ids=lambda codec: codec.key)
def test_stock_zarr_reads_the_same_numbers(tmp_path: Path, codec: Codec) -> None:
    path = write_store(tmp_path / "store", codec.compressor("float32"))
    array = zarr.open_group(path, mode="r")["fc"]
    assert isinstance(array, zarr.Array)
    assert (array.shape, array.dtype) == (SHAPE, np.dtype("float32"))
    assert np.array_equal(np.asarray(array[:]), numbers())
    assert np.array_equal(np.asarray(array[5:31, 7]), numbers()[5:31, 7])


@given(st.integers(0, NUM_UNITS - 1), st.integers(1, NUM_UNITS))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_of_units_is_read_across_pages(shared: Path, first: int, count: int) -> None:
    count = min(count, NUM_UNITS - first)
    assert np.array_equal(read(shared, first, count), unit_bytes()[first * UNIT_NBYTES : (first + count) * UNIT_NBYTES])


def test_units_that_fill_more_than_a_buffer_are_read(shared: Path) -> None:
    """The buffer holds two units at most; a page has four."""
    access, out = Access(BUFFERED, buffer_nbytes=3 * BLOCK_NBYTES), np.empty(NUM_UNITS * UNIT_NBYTES, np.uint8)
    with WeightStore.open(shared, ZSTD) as store:
        units = StoredUnits.open(store.stored("model.fc"), access)
    units.read(0, NUM_UNITS, out)
    access.close()
    assert np.array_equal(out, unit_bytes())


def test_a_tier_serves_decompressed_units_and_counts_them(shared: Path, tmp_path: Path) -> None:
    tier = ZarrTier(label="disk", budget_bytes=2**20, options=ZarrOptions(tmp_path))
    with WeightStore.open(shared, ZSTD) as store:
        region = tier.attach(store.stored("model.fc"), placed_units=NUM_UNITS)
    out = np.empty(5 * UNIT_NBYTES, np.uint8)
    tier.read(region, 6, 5, out)
    assert np.array_equal(out, unit_bytes()[6 * UNIT_NBYTES : 11 * UNIT_NBYTES])
    units = np.array([1, 5, 6, 12])
    tier.gather(region, units, out[: 4 * UNIT_NBYTES])
    assert np.array_equal(out[: 4 * UNIT_NBYTES], unit_bytes().reshape(NUM_UNITS, -1)[units].reshape(-1))
    assert tier.used_bytes == NUM_UNITS * UNIT_NBYTES
    tier.free(region)
    tier.close()


def test_files_and_the_header_hold_the_compressed_bytes(path: Path) -> None:
    with WeightStore.open(path, ZSTD) as store:
        pages = [store.page_nbytes("model.fc", page) for page in range(4)]
        assert store.nbytes == sum(pages) < 0.9 * NUM_UNITS * UNIT_NBYTES
    index = 4 * 16 + CHECKSUM_NBYTES
    assert [page_path(path, page).stat().st_size for page in range(4)] == [
        nbytes + slots * CHECKSUM_NBYTES + index for nbytes, slots in zip(pages, (4, 4, 4, 1), strict=True)
    ]


def test_zarr_json_names_zarrs_own_codec_before_the_checksum(path: Path) -> None:
    found = read_layout(path / "fc")
    assert found == layout(ZSTD)
    assert found.compression is not None
    assert found.compression.metadata == {"name": "zstd", "configuration": {"checksum": False, "level": 3}}


@pytest.mark.parametrize("offset", [0, 100, 1000])
def test_a_flipped_byte_names_tensor_unit_and_file(path: Path, offset: int) -> None:
    flip_byte(page_path(path, 1), offset)
    with pytest.raises(CorruptDataError, match="unit 0 of fc does not match its checksum") as caught:
        read(path)
    assert caught.value.where == str(page_path(path, 1))
    assert "import" in caught.value.fix


@pytest.mark.parametrize("left", [0, 10, 200, -1])
def test_a_page_that_is_cut_short_is_told(path: Path, left: int) -> None:
    page = page_path(path, 2)
    page.write_bytes(page.read_bytes()[:left])
    with pytest.raises(CorruptDataError, match="cut short"):
        read(path)


def test_a_flipped_byte_of_the_index_is_told(path: Path) -> None:
    flip_byte(page_path(path, 1), page_path(path, 1).stat().st_size - 30)
    with pytest.raises(CorruptDataError, match=r"index of a page of fc is damaged"):
        read(path)


def test_a_page_of_other_numbers_is_told(path: Path, tmp_path: Path) -> None:
    """Whole, with its checksums right, of units of another size."""
    other = zarr.create_array(
        tmp_path / "other",
        shape=(12, 200),
        shards=(12, 200),
        chunks=(3, 200),
        dtype="float32",
        compressors=zarr.open_array(path / "fc", mode="r").metadata.codecs[0].codecs[1:],  # type: ignore[union-attr]  # a sharded array of version 3
        filters=None,
    )
    other[:] = np.ones((12, 200), np.float32)
    page_path(path, 1).write_bytes((tmp_path / "other" / "c" / "0" / "0").read_bytes())
    with pytest.raises(CorruptDataError, match="they declare 2400 bytes, and 3600 are expected"):
        read(path)


def test_another_compressor_than_the_files_have_is_refused(path: Path) -> None:
    for other in (None, BloscCodec().compressor("float32")):
        with WeightStore.open(path, other) as store, pytest.raises(CorruptDataError, match="compressed by zstd"):
            store.stored("model.fc")


def test_an_interrupted_import_keeps_whole_pages_only(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "store")
    for page in (0, 2, 3):
        write_page(writer, page)
    cut = page_path(tmp_path / "store", 2)
    cut.write_bytes(cut.read_bytes()[:-1])
    flip_byte(page_path(tmp_path / "store", 3), 10)
    again = new_writer(tmp_path / "store")
    assert [again.has_page("fc", page) for page in range(4)] == [True, False, False, False]
