"""The index of a shard file on the disk: read when the file is opened, written once units are there."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.files import reporting
from flexflow_engine.store.access import Access, OpenFile
from flexflow_engine.store.blocks import fetch, fetch_nbytes, write_from
from flexflow_engine.store.shard import ShardFile


def open_complete(shard: ShardFile, access: Access) -> int:
    """Open a finished file for reading; size and index are checked. The caller closes the descriptor.

    Raises StorageError when it can't be opened, CorruptDataError when it is not a whole shard of this layout.
    """
    descriptor = open_to_read(shard, access)
    try:
        with access.using(descriptor) as file:
            _check_complete(shard, file)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_to_read(shard: ShardFile, access: Access) -> int:
    """Open a file that was found complete before. Raises StorageError."""
    with reporting(shard.path):
        return os.open(shard.path, os.O_RDONLY | access.mode.flags)


def read_index(shard: ShardFile, file: OpenFile) -> NDArray[np.bool_]:
    """Which units hold data, bool [num_slots]. Raises CorruptDataError when the index is not one of ours."""
    return shard.parse_index(fetch_index(shard, file, shard.index_offset))


def fetch_index(shard: ShardFile, file: OpenFile, offset: int) -> HostBytes:
    """The bytes of the index that begins at `offset`, unverified. Raises CorruptDataError when the file ends before."""
    found = np.empty(shard.index_nbytes, np.uint8)
    for start in range(0, len(found), fetch_nbytes(file)):
        part = found[start : start + fetch_nbytes(file)]
        part[:] = fetch(shard, file, offset + start, len(part))
    return found


def write_index(shard: ShardFile, descriptor: int, written: NDArray[np.bool_]) -> None:
    """Write the index behind the last slot; written: bool [num_slots], which units hold data.

    descriptor: opened without direct I/O, because the index ends where it ends. Raises StorageError.
    """
    write_from(shard, descriptor, shard.index_offset, [shard.index(written)])


def _check_complete(shard: ShardFile, file: OpenFile) -> None:
    with reporting(shard.path):
        found = os.fstat(file.descriptor).st_size
    if found != shard.nbytes:
        raise shard.corrupt(f"a page of {shard.name} has {found} bytes instead of {shard.nbytes}")
    if not read_index(shard, file).all():
        raise shard.corrupt(f"a page of {shard.name} lacks some of its units")
