"""The imported weights of one model: a Zarr group with an array a parameter, read unit by unit.

`StoredUnits` reads one array; tiers that serve weights in place use it too. `WeightStore` finds arrays by the names
that the model gives its tensors.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from flexflow_engine.abc.compressor import Compressor
from flexflow_engine.abc.tier import HostBytes, StoredTensor
from flexflow_engine.errors import CorruptDataError, StorageError
from flexflow_engine.files import reporting
from flexflow_engine.store.access import Access
from flexflow_engine.store.array import METADATA, ArrayLayout, read_layout
from flexflow_engine.store.compressed import Bounds, buffer_nbytes, read_bounds, read_compressed, units_nbytes
from flexflow_engine.store.encoding import Compression
from flexflow_engine.store.header import StoreHeader, read_header
from flexflow_engine.store.index import open_complete, open_to_read
from flexflow_engine.store.shard import ShardFile
from flexflow_engine.store.units import gather_units, read_units

FIX = "remove the weight store and import the checkpoint again"


class StoredUnits:
    """The units of one stored array, across its page files. Thread-safe; its access belongs to the caller.

    Changing state: `_checked`, the pages whose file was found whole when it was opened first, and `_bounds`, where the
    units of compressed pages lie. More pages than stay open are opened again and again, and the index would be another
    read each time.
    """

    def __init__(self, tensor: StoredTensor, layout: ArrayLayout, access: Access) -> None:
        """layout: what `tensor` was made of."""
        self.tensor = tensor
        self._layout = layout
        self._access = access
        self._checked: set[int] = set()
        self._bounds: dict[int, Bounds] = {}
        if tensor.compressor is not None:
            access.widen(buffer_nbytes(tensor.unit_nbytes, tensor.compressor))

    @classmethod
    def open(cls, tensor: StoredTensor, access: Access) -> StoredUnits:
        """Raises CorruptDataError when zarr.json is not what `tensor` says, StorageError when there is none."""
        layout = read_layout(tensor.path)
        if stored_tensor(tensor.name, tensor.path, layout, tensor.compressor) != tensor:
            raise CorruptDataError(f"{tensor.name} is cut otherwise than expected", where=str(tensor.path), fix=FIX)
        return cls(tensor, layout, access)

    def check_pages(self) -> None:
        """Raise CorruptDataError when a page file is missing or of the wrong size; their content is not read.

        The right size of a compressed one stands in it, and is checked when it is read first.
        """
        for page in range(self._layout.num_pages):
            _check_size(self.page_file(page), compressed=self.tensor.compressor is not None)

    def page_nbytes(self, page: int) -> int:
        """Bytes that the units of `page` take in its file, checksums not counted. Raises StorageError."""
        file = self.page_file(page)
        return file.num_slots * file.unit_nbytes if self.tensor.compressor is None else units_nbytes(file)

    def page_file(self, page: int) -> ShardFile:
        return self._layout.page_file(self.tensor.path, page, name=self.tensor.name, fix=FIX)

    def close(self) -> None:
        """Close this array's page files; nobody may be reading. Idempotent."""
        for page in range(self._layout.num_pages):
            self._access.drop(self._layout.page_path(self.tensor.path, page))

    def read(self, first: int, count: int, out: HostBytes) -> None:
        """Read units [first, first + count) into `out`, uint8 [count * unit_nbytes], verifying each.

        Raises CorruptDataError or StorageError.
        """
        unit_nbytes, units_per_page = self.tensor.unit_nbytes, self.tensor.units_per_page
        assert 0 <= first <= first + count <= self.tensor.num_units
        done = 0
        while done < count:
            page, start = divmod(first + done, units_per_page)
            stop = min(start + count - done, units_per_page)
            part = out[done * unit_nbytes : (done + stop - start) * unit_nbytes]
            self._read_page(page, start, stop - start, part)
            done += stop - start

    def gather(self, units: NDArray[np.int64], out: HostBytes) -> None:
        """Read single units, ascending int64 [n], into `out`, uint8 [n * unit_nbytes], verifying each.

        Raises CorruptDataError or StorageError.
        """
        assert not len(units) or (units[0] >= 0 and units[-1] < self.tensor.num_units), units
        assert (np.diff(units) > 0).all(), units
        rows = out.reshape(len(units), self.tensor.unit_nbytes)
        pages = units // self.tensor.units_per_page
        for page in np.unique(pages).tolist():
            start, stop = np.searchsorted(pages, (page, page + 1)).tolist()
            within = units[start:stop] - page * self.tensor.units_per_page
            self._gather_page(page, within, rows[start:stop])

    def _gather_page(self, page: int, units: NDArray[np.int64], out: HostBytes) -> None:
        if self.tensor.compressor is not None:
            for unit, into in zip(units.tolist(), out, strict=True):
                self._read_page(page, unit, 1, into)
            return
        file = self.page_file(page)
        with self._access.lend(file.path, partial(self._open, page, file)) as opened:
            gather_units(file, opened, units, out)

    def _read_page(self, page: int, first: int, count: int, out: HostBytes) -> None:
        file = self.page_file(page)
        compressor = self.tensor.compressor
        with self._access.lend(file.path, partial(self._open, page, file)) as opened:
            if compressor is None:
                read_units(file, opened, first, count, out)
                return
            if page not in self._bounds:
                self._bounds[page] = read_bounds(file, opened, compressor)
            read_compressed(file, opened, self._bounds[page], first, out, compressor=compressor)

    def _open(self, page: int, file: ShardFile) -> int:
        if page in self._checked or self.tensor.compressor is not None:
            return open_to_read(file, self._access)
        descriptor = open_complete(file, self._access)
        self._checked.add(page)
        return descriptor


class WeightStore:
    """A complete weight store, open for reading. Thread-safe; close it, or use it as a context manager."""

    def __init__(self, path: Path, header: StoreHeader, compressor: Compressor | None = None) -> None:
        """compressor: of the arrays that are compressed, if there are any."""
        self.path = path
        self.header = header
        self._access = Access.tried_on(path / METADATA)
        self._compressor = compressor
        self._units: dict[str, StoredUnits] = {}

    @classmethod
    def open(cls, path: Path, compressor: Compressor | None = None) -> WeightStore:
        """Open the store at `path`; its page files are opened and checked when they are read.

        Raises StorageError when there is none, or one that is unfinished or newer; CorruptDataError if it is foreign.
        """
        if not (path / METADATA).exists():
            raise StorageError("there is no weight store", where=str(path), fix="import the checkpoint first")
        header = read_header(path)
        if not header.complete:
            raise StorageError(
                "the weight store is incomplete", where=str(path), fix="import the checkpoint again: it goes on"
            )
        return cls(path, header, compressor)

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know about the file system that the store lies on, a line each."""
        return self._access.notices(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of all units as they lie in the files, checksums not counted."""
        return self.header.nbytes

    def stored(self, name: str) -> StoredTensor:
        """Where the model's tensor `name` lies.

        Raises CorruptDataError when the store has no such tensor, or its array is damaged.
        """
        return self._open_units(name).tensor

    def page_nbytes(self, name: str, page: int) -> int:
        """Bytes that a page of tensor `name` takes in its file, checksums and index not counted: what reading it costs.

        Raises CorruptDataError or StorageError.
        """
        return self._open_units(name).page_nbytes(page)

    def read_units(self, name: str, first: int, count: int, out: HostBytes) -> None:
        """Read units [first, first + count) of tensor `name` into `out`, uint8 [count * unit_nbytes], verified.

        Units are counted over all pages of the tensor. Raises CorruptDataError or StorageError.
        """
        self._open_units(name).read(first, count, out)

    def close(self) -> None:
        """Close the open page files. Idempotent; reading again opens them anew."""
        self._access.close()

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_units(self, name: str) -> StoredUnits:
        array = self.header.arrays.get(name)
        if array is None:
            raise CorruptDataError(f"the weight store has no tensor {name}", where=str(self.path), fix=FIX)
        if array not in self._units:
            folder = self.path / array
            layout = read_layout(folder)
            tensor = stored_tensor(array, folder, layout, self._compressor)
            self._units[array] = StoredUnits(tensor, layout, self._access)
        return self._units[array]


def stored_tensor(name: str, folder: Path, layout: ArrayLayout, compressor: Compressor | None) -> StoredTensor:
    """compressor: of arrays that are compressed. Raises CorruptDataError when this one was by another."""
    if layout.compression is None:
        compressor = None
    elif compressor is None or Compression.parse(compressor.zarr_codec()) != layout.compression:
        what = f"{name} is compressed by {layout.compression.name}, otherwise than expected"
        raise CorruptDataError(what, where=str(folder), fix=FIX)
    return StoredTensor(
        name=name,
        path=folder,
        num_units=layout.num_units,
        unit_nbytes=layout.unit_nbytes,
        units_per_page=layout.units_per_page,
        compressor=compressor,
    )


def _check_size(file: ShardFile, *, compressed: bool) -> None:
    with reporting(file.path):
        found = file.path.stat().st_size if file.path.exists() else None
    if found is None or (found != file.nbytes and not compressed):
        what = "is missing" if found is None else f"has {found} bytes instead of {file.nbytes}"
        raise CorruptDataError(f"a page of {file.name} {what}", where=str(file.path), fix=FIX)
