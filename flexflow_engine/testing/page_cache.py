"""How much of a folder's files the system's page cache holds."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def cached_nbytes(folder: Path) -> int:
    """Bytes of all files under `folder` that are in the page cache, in whole pages of memory."""
    return sum(_cached_pages(path) for path in _files(folder)) * mmap.PAGESIZE


def drop_cached(folder: Path) -> None:
    """Write all files under `folder` to the disk and take them out of the page cache."""
    for path in _files(folder):
        with _opened(path) as descriptor:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def _cached_pages(path: Path) -> int:
    """mincore(2) tells for each page of a mapping whether it is in memory; mapping a file reads nothing."""
    with _opened(path) as descriptor, mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapping:
        content = np.frombuffer(mapping, np.uint8)
        resident = np.empty(-(-len(content) // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content)), ctypes.c_void_p(resident.ctypes.data)
        )
        del content  # a mapping that is looked at can't be closed
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}")
    return int(np.count_nonzero(resident & 1))


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
