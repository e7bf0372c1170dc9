"""How parameters are cut into pages, whatever the policy: the geometry of the weight store.

A page is a run of rows (output features) of one tensor and the unit of placement, of I/O and of overlap. A page is
made of units, the smallest thing that is read and verified: one unit for a matrix, a few rows for a table, because
a table's rows are looked up one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.compressor import Compressor
from flexflow_engine.abc.dtypes import ITEM_NBYTES, DType
from flexflow_engine.abc.model import Model, Role, TensorSpec
from flexflow_engine.errors import PluginError

MAX_PAGE_NBYTES = 16 * 2**20
"""Of a page as it is encoded; of a table's, before."""
PAGES_PER_LAYER = 8
"""A layer is cut at least this finely, so that a few percent of a small model can be placed too. More would be smaller
requests: beside products on 2 cores a disk of 3.8 GB/s gave 2.4 in requests of 4 MiB, and 3.0 of 8 and of 16.
"""
MIN_UNIT_NBYTES = 4096
"""A table's unit is as many rows as fill a block of the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedTensor:
    """One parameter and its cut."""

    name: str
    shape: tuple[int, ...]
    role: Role
    page_rows: int
    """Rows of a page; a multiple of `unit_rows`; the last page may hold fewer."""
    unit_rows: int
    unit_nbytes: int
    """Encoded size of one whole unit."""
    codec: Codec
    """What its units are encoded by."""

    @property
    def rows(self) -> int:
        """Rows of the tensor; a vector is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def units_per_page(self) -> int:
        return self.page_rows // self.unit_rows

    @property
    def num_pages(self) -> int:
        return ceil(self.rows / self.page_rows)

    @property
    def num_units(self) -> int:
        """Units that hold rows; the last may be padded with zeros."""
        return ceil(self.rows / self.unit_rows)

    @property
    def nbytes(self) -> int:
        return self.num_units * self.unit_nbytes

    def page_units(self, page: int) -> range:
        """The units of one page; the last page may have fewer than `units_per_page`."""
        length = self.page_rows // self.unit_rows
        return range(page * length, min((page + 1) * length, self.num_units))


def paged_tensors(model: Model, codec: Codec, small_codec: Codec) -> tuple[PagedTensor, ...]:
    """The cut of every parameter of `model`: matrices encoded by `codec`, tables by its `for_table`, small ones by
    `small_codec`. Raises PluginError where a codec has one for tables that is not of its kind.
    """
    table_codec, dtype = _table_codec(codec, model.dtype), model.dtype

    def encoded_nbytes(shape: tuple[int, ...]) -> int:
        return codec.encoded_nbytes(shape, dtype)

    def plain_nbytes(shape: tuple[int, ...]) -> int:
        return prod(shape) * ITEM_NBYTES[dtype]

    matrix_page, table_page = (_page_nbytes(model, nbytes) for nbytes in (encoded_nbytes, plain_nbytes))
    paged = []
    for spec in model.tensors():
        if spec.role == "small":
            paged.append(_whole(spec, model, small_codec))
        elif spec.role == "table":  # cut alike whatever it is encoded by: stores share what they can of it
            page_rows = _page_rows(spec, plain_nbytes(spec.shape), table_page)
            unit_rows = ceil(MIN_UNIT_NBYTES / plain_nbytes(spec.shape[1:]))
            paged.append(_in_pages(spec, model, table_codec, page_rows, unit_rows))
        else:
            page_rows = _page_rows(spec, encoded_nbytes(spec.shape), matrix_page)
            paged.append(_in_pages(spec, model, codec, page_rows, page_rows))
    return tuple(paged)


def _table_codec(codec: Codec, dtype: DType) -> Codec:
    table = codec.for_table()
    if _kind(table, dtype) != _kind(codec, dtype):
        raise PluginError(
            f"the codec {codec.name} wants tables encoded by {table.name}, which is of another kind",
            fix="both must keep bytes, decode in kernels, or have equal compressors, or neither",
        )
    return table


def _kind(codec: Codec, dtype: DType) -> tuple[bool, bool, Compressor | None]:
    """What is one decision for all weights of a run."""
    return codec.keeps_bytes, codec.decodes_in_kernels, codec.compressor(dtype) if codec.compresses else None


def _page_nbytes(model: Model, nbytes: Callable[[tuple[int, ...]], int]) -> int:
    """What a page has at most. nbytes: of a matrix of a shape."""
    shapes = {spec.name: spec.shape for spec in model.tensors()}
    largest = max(
        sum(nbytes(shapes[name]) for name in layer.matrices.values())
        for layer in model.layers()
        if layer.kind == "decoder"
    )
    return min(MAX_PAGE_NBYTES, largest // PAGES_PER_LAYER)


def _page_rows(spec: TensorSpec, nbytes: int, page_nbytes: int) -> int:
    """Of a tensor of so many bytes, in even pages: the last one, stored whole, pads next to nothing."""
    rows = spec.shape[0]
    num_pages = ceil(rows / max(1, page_nbytes * rows // nbytes))
    return ceil(rows / num_pages)


def _in_pages(spec: TensorSpec, model: Model, codec: Codec, page_rows: int, unit_rows: int) -> PagedTensor:
    """Pages are of whole units."""
    unit_rows = min(page_rows, unit_rows)
    return PagedTensor(
        name=spec.name,
        shape=spec.shape,
        role=spec.role,
        page_rows=page_rows + -page_rows % unit_rows,
        unit_rows=unit_rows,
        unit_nbytes=codec.encoded_nbytes((unit_rows, spec.shape[1]), model.dtype),
        codec=codec,
    )


def _whole(spec: TensorSpec, model: Model, codec: Codec) -> PagedTensor:
    rows = spec.shape[0] if len(spec.shape) > 1 else 1
    return PagedTensor(
        name=spec.name,
        shape=spec.shape,
        role=spec.role,
        page_rows=rows,
        unit_rows=rows,
        unit_nbytes=codec.encoded_nbytes(spec.shape, model.dtype),
        codec=codec,
    )
