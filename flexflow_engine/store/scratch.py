"""Regions of one run on a disk: written and read at random, gone when the run ends.

    <folder of the run>/<region>/         a Zarr v3 array uint8 [num_units, unit_nbytes], one shard file

The files are sparse: a unit takes room once it is written. Units follow each other as they do in memory, so that any
run of them is one request of as many bytes. Their checksums stay with the run, four bytes a unit.
"""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path
from threading import Lock

import numpy as np

from flexflow_engine.abc.tier import HostBytes, RegionSpec
from flexflow_engine.files import reporting
from flexflow_engine.store.access import Access
from flexflow_engine.store.array import ArrayLayout, create_array
from flexflow_engine.store.checksums import checksums_of, verify
from flexflow_engine.store.index import write_index
from flexflow_engine.store.settling import settle
from flexflow_engine.store.shard import round_up
from flexflow_engine.store.spans import read_span, write_span

_VERIFIED_NBYTES = 4 * 2**20
"""Units are read and verified so many bytes at a time, while they are in the processor's cache."""
_FIX = "run again; if it happens again, the disk or the memory may be failing"


class ScratchArray:
    """One region's array. Thread-safe as long as two calls at once concern different units.

    Changing state: `_written`, bool [num_units], which the index in the file also says after `flush`; `_checksums`,
    uint32 [num_units], of those that were written. `_edges` guards blocks of the file that several units share.
    """

    def __init__(self, folder: Path, spec: RegionSpec, access: Access) -> None:
        """Make the array in `folder`. Raises StorageError when that can't be written."""
        layout = _layout(spec)
        self._folder = folder / spec.name
        self._file = layout.page_file(self._folder, 0, name=spec.name, fix=_FIX)
        self._access = access
        self._written = np.zeros(spec.num_units, np.bool_)
        self._checksums = np.zeros(spec.num_units, np.uint32)
        self._edges = Lock()
        create_array(self._folder, layout)
        with reporting(self._file.path):
            self._file.path.parent.mkdir(parents=True)
            self._file.path.touch()

    def read(self, first: int, count: int, out: HostBytes) -> None:
        """Units [first, first + count) into `out`, uint8 [count * unit_nbytes]; zeros where none was written.

        Raises CorruptDataError or StorageError.
        """
        written = self._written[first : first + count]
        if written.all():
            self._read_written(first, count, out)
            return
        bounds = [0, *(np.flatnonzero(np.diff(written)) + 1).tolist(), count]
        for start, stop in pairwise(bounds):
            part = out[start * self._file.unit_nbytes : stop * self._file.unit_nbytes]
            if written[start]:
                self._read_written(first + start, stop - start, part)
            else:
                part.fill(0)

    def write(self, first: int, count: int, data: HostBytes) -> int:
        """`data` into units [first, first + count); how many of them had never been written.

        Raises StorageError when the disk is full or fails.
        """
        units = self._file.as_units(first, count, data)
        with self._access.lend(self._file.path, self._open) as file:
            write_span(self._file, file, first * self._file.stride, data, edges=self._edges)
        self._checksums[first : first + count] = checksums_of(units)
        fresh = count - int(np.count_nonzero(self._written[first : first + count]))
        self._written[first : first + count] = True
        return fresh

    def flush(self) -> None:
        """Write the index, so that any Zarr reader sees what was written so far. Raises StorageError."""
        with reporting(self._file.path):
            descriptor = os.open(self._file.path, os.O_WRONLY)
        try:
            write_index(self._file, descriptor, self._written)
        finally:
            os.close(descriptor)
        settle(self._file.path)

    @property
    def unwritten_nbytes(self) -> int:
        """Bytes that the file will still grow by, at most."""
        return self._file.stride * (self._file.num_slots - int(np.count_nonzero(self._written)))

    def close(self) -> None:
        """Close and remove the array; nobody may be using it."""
        self._access.drop(self._file.path)
        with reporting(self._folder):
            shutil.rmtree(self._folder)

    def _read_written(self, first: int, count: int, out: HostBytes) -> None:
        units = self._file.as_units(first, count, out)
        step = max(1, _VERIFIED_NBYTES // self._file.unit_nbytes)
        with self._access.lend(self._file.path, self._open) as file:
            for start in range(0, count, step):
                some, number = units[start : start + step], first + start
                read_span(self._file, file, number * self._file.stride, some.reshape(-1))
                stop = number + len(some)
                verify(self._file, range(number, stop), some, self._checksums[number:stop])

    def _open(self) -> int:
        with reporting(self._file.path):
            return os.open(self._file.path, os.O_RDWR | self._access.mode.flags)


def scratch_nbytes(spec: RegionSpec) -> int:
    """Bytes that a region's units take on the disk once all are written."""
    return round_up(spec.nbytes)


def _layout(spec: RegionSpec) -> ArrayLayout:
    return ArrayLayout.opaque(num_units=spec.num_units, unit_nbytes=spec.unit_nbytes, units_per_page=spec.num_units)
