"""Small stores and shards for the tests of this folder and of the disk tier."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.store.array import ArrayLayout
from flexflow_engine.store.header import StoreHeader
from flexflow_engine.store.shard import BLOCK_NBYTES
from flexflow_engine.store.writing import StoreWriter

TABLE, BIAS, HALF = "decoder.embed.weight", "decoder.bias", "decoder.fc1.weight"

LAYOUTS = {
    TABLE: ArrayLayout.plain((23, 6), "float16", page_rows=8, unit_rows=2),
    BIAS: ArrayLayout.plain((7,), "float32", page_rows=1, unit_rows=1),
    HALF: ArrayLayout.plain((5, 3), "bfloat16", page_rows=2, unit_rows=2),
}

LEAST_BUFFER = 3 * BLOCK_NBYTES
"""The smallest that an access takes: units of two blocks go through it in pieces."""
SHIFTS = (0, 1, 512)
"""Of memory against blocks."""

HEADER = StoreHeader(
    reference="some/model",
    content_key="0123",
    dtype="float16",
    codec="none",
    table_codec="none",
    small_codec="none",
    arrays={f"model.{name}": name for name in LAYOUTS},
    nbytes=sum(layout.nbytes for layout in LAYOUTS.values()),
)


def values(name: str) -> NDArray[np.generic]:
    """The numbers of array `name`, as stock Zarr sees them: its shape and data type, no zeros among them."""
    layout = LAYOUTS[name]
    count = int(np.prod(layout.shape))
    return np.arange(1, count + 1).astype(layout.data_type).reshape(layout.shape)


def unit_bytes(name: str) -> HostBytes:
    """All units of array `name`, uint8 [num_units * unit_nbytes], the last padded with zeros."""
    data = np.zeros(LAYOUTS[name].nbytes, np.uint8)
    own = np.ascontiguousarray(values(name)).reshape(-1).view(np.uint8)
    data[: len(own)] = own
    return data


def write_page(writer: StoreWriter, name: str, page: int) -> None:
    layout = LAYOUTS[name]
    start = page * layout.units_per_page * layout.unit_nbytes
    slots = writer.page_file(name, page).num_slots
    writer.write_page(name, page, unit_bytes(name)[start : start + slots * layout.unit_nbytes])


def write_store(path: Path) -> Path:
    """A complete store at `path`."""
    writer = StoreWriter(path, HEADER, LAYOUTS)
    for name, layout in LAYOUTS.items():
        for page in range(layout.num_pages):
            write_page(writer, name, page)
    writer.finish()
    return path


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def shifted(nbytes: int, by: int) -> HostBytes:
    """Memory that begins `by` bytes behind a block."""
    memory = np.zeros(nbytes + 2 * BLOCK_NBYTES, np.uint8)
    return memory[-memory.ctypes.data % BLOCK_NBYTES + by :][:nbytes]


def random_units(count: int, unit_nbytes: int, seed: int = 0) -> HostBytes:
    """No byte is zero."""
    return np.random.default_rng(seed).integers(1, 256, count * unit_nbytes).astype(np.uint8)


def draw_units(data: st.DataObject, num_units: int, unit_nbytes: int) -> tuple[int, int, HostBytes]:
    """Some adjoining units, as their first and their number, and memory for them, aligned or not."""
    first = data.draw(st.integers(0, num_units - 1))
    count = data.draw(st.integers(1, num_units - first))
    return first, count, shifted(count * unit_nbytes, by=data.draw(st.sampled_from(SHIFTS)))
