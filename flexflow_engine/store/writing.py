"""Making a weight store page by page. A page appears under its final name only when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from flexflow_engine.abc.compressor import Compressor
from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.errors import CorruptDataError, StorageError
from flexflow_engine.files import make_folder, replacing, reporting
from flexflow_engine.store.access import BUFFERED, Access
from flexflow_engine.store.array import METADATA, ArrayLayout, create_array, read_layout, sync_file
from flexflow_engine.store.compressed import units_nbytes, write_compressed
from flexflow_engine.store.header import StoreHeader, write_header
from flexflow_engine.store.index import open_complete, write_index
from flexflow_engine.store.settling import Unsettled, begin_writing, settle
from flexflow_engine.store.shard import ShardFile
from flexflow_engine.store.units import write_units
from flexflow_engine.store.weights import FIX, StoredUnits, stored_tensor

_BLOCK_OF_STAT = 512
"""Bytes, by POSIX."""


class StoreWriter:
    """Writes the arrays of one store; what an earlier, interrupted writer finished is kept.

    One writer at a time: the caller holds a lock. Constant state: the folder, the header, each array's layout. Changing
    state: `_unsettled`, the pages that the disk may still be taking; all others are on the disk and not in the cache.
    """

    def __init__(
        self, path: Path, header: StoreHeader, layouts: dict[str, ArrayLayout], compressor: Compressor | None = None
    ) -> None:
        """layouts: by array name. compressor: of those that have a compression.

        Raises StorageError when `path` can't be written.
        """
        self.path = path
        self._header = replace(header, complete=False)
        self._layouts = layouts
        self._compressor = compressor
        self._access = Access(BUFFERED)
        self._unsettled = Unsettled()
        make_folder(path)
        write_header(path, self._header)
        for name, layout in layouts.items():
            self._prepare(name, layout)

    @property
    def dtype(self) -> str:
        """Number format of the tensors before they are encoded."""
        return self._header.dtype

    def page_file(self, name: str, page: int) -> ShardFile:
        return self._layouts[name].page_file(self.path / name, page, name=name, fix=FIX)

    def has_page(self, name: str, page: int) -> bool:
        """Whether the page is there with every unit right; then it is on the disk and not in the cache.

        Size and index are not enough: after a power cut a file may have them without its data. Raises StorageError
        when it can't be read, or brought to the disk.
        """
        file, layout = self.page_file(name, page), self._layouts[name]
        if not file.path.exists():
            return False
        units = StoredUnits(stored_tensor(name, self.path / name, layout, self._compressor), layout, self._access)
        try:
            first, out = page * layout.units_per_page, np.empty(file.num_slots * file.unit_nbytes, np.uint8)
            units.read(first, file.num_slots, out)
        except CorruptDataError:
            return False
        finally:
            self._access.drop(file.path)
        settle(file.path)
        return True

    def write_page(self, name: str, page: int, data: HostBytes) -> None:
        """Write a page's units, uint8 [num_slots * unit_nbytes]. Raises StorageError, and then leaves no file."""
        file, compressor = self.page_file(name, page), self._compressor_of(name)
        with _unfinished(file.path) as descriptor:
            if compressor is None:
                write_units(file, descriptor, data)
                write_index(file, descriptor, np.ones(file.num_slots, np.bool_))
            else:
                write_compressed(file, descriptor, data, compressor)
            begin_writing(descriptor)
        self._unsettled.add(file.path, file.nbytes)

    def share_page(self, name: str, page: int, source: Path) -> bool:
        """Take the page over from the store at `source` as a hard link; False where that can't be done.

        Pages are never changed in place, and each store can be removed without the other's pages going.
        """
        own = self.page_file(name, page)
        other = self._layouts[name].page_file(source / name, page, name=name, fix=FIX)
        try:
            os.close(open_complete(other, self._access))
            own.path.parent.mkdir(parents=True, exist_ok=True)
            own.path.unlink(missing_ok=True)
            own.path.hardlink_to(other.path)
        except (OSError, CorruptDataError, StorageError):  # another file system, or one without links: written instead
            return False
        return True

    def finish(self) -> None:
        """Declare the store complete, once every page is on the disk and out of the system's cache."""
        nbytes = 0
        for name, layout in self._layouts.items():
            for page in range(layout.num_pages):
                file = self.page_file(name, page)
                settle(file.path)
                nbytes += units_nbytes(file)
        write_header(self.path, replace(self._header, complete=True, nbytes=nbytes))
        sync_file(self.path / METADATA)
        sync_file(self.path)

    def _compressor_of(self, name: str) -> Compressor | None:
        return None if self._layouts[name].compression is None else self._compressor

    def _prepare(self, name: str, layout: ArrayLayout) -> None:
        """Make the array, unless it is there in this very layout."""
        folder = self.path / name
        if (folder / METADATA).exists() and _layout_or_none(folder) == layout:
            return
        with reporting(folder):
            if folder.exists():
                shutil.rmtree(folder)
        create_array(folder, layout)


def missing_nbytes(path: Path, layouts: dict[str, ArrayLayout]) -> int:
    """Bytes that writing the store at `path` will still take, checksums and indices included; before compression. What
    arrays of another layout give back, which are removed first, is counted off.
    """
    missing = sum(
        file.nbytes
        for name, layout in layouts.items()
        for file in (layout.page_file(path / name, page, name=name, fix=FIX) for page in range(layout.num_pages))
        if not _is_there(file, compressed=layout.compression is not None)
    )
    outdated = (path / name for name, layout in layouts.items() if _layout_or_none(path / name) != layout)
    return missing - sum(_own_nbytes(file) for folder in outdated for file in folder.rglob("*") if file.is_file())


def _own_nbytes(file: Path) -> int:
    """Bytes on the disk that are free once this file is removed: none where another store shares it."""
    with reporting(file):
        found = file.stat()
    return found.st_blocks * _BLOCK_OF_STAT if found.st_nlink == 1 else 0


def _is_there(file: ShardFile, *, compressed: bool) -> bool:
    with reporting(file.path):
        return file.path.exists() and (compressed or file.path.stat().st_size == file.nbytes)


def _layout_or_none(folder: Path) -> ArrayLayout | None:
    try:
        return read_layout(folder)
    except (CorruptDataError, StorageError):
        return None


@contextmanager
def _unfinished(path: Path) -> Iterator[int]:
    """A descriptor of a new file that takes the name `path` when the body succeeds, and is removed when it fails."""
    with replacing(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
