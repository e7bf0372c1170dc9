"""Anonymous memory whose pages are there from the beginning, huge ones where the system has them.

On a virtual machine a disk's direct reads go faster into huge pages: 3.3 GB a second, and 1.3 into pages of 4 KiB, each
of which is a piece of its own to the host.
"""

from __future__ import annotations

import errno
import sys
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import numpy as np

from flexflow_engine.abc.tier import HostBytes

_MADV_POPULATE_WRITE = 23
"""Linux's number for it (madvise(2)), since 5.14."""
_POPULATED_AT_ONCE = 2**26
"""Bytes, in tens of milliseconds: Python's lock is held meanwhile."""


def populated(nbytes: int) -> mmap:
    """Zero-filled, exactly as long as asked: huge pages never take more, its ends stay in small ones.

    Raises OSError when the machine has no room for the mapping.
    """
    mapping = mmap(-1, max(nbytes, 1), flags=MAP_PRIVATE | MAP_ANONYMOUS)
    if sys.platform == "linux":
        from mmap import MADV_HUGEPAGE  # noqa: PLC0415  # Linux only

        _advise(mapping, MADV_HUGEPAGE, 0, len(mapping))
        for start in range(0, len(mapping), _POPULATED_AT_ONCE):
            _advise(mapping, _MADV_POPULATE_WRITE, start, min(_POPULATED_AT_ONCE, len(mapping) - start))
    return mapping


def populated_bytes(nbytes: int) -> HostBytes:
    """The same as an array, uint8 [nbytes], that owns the mapping; aligned to the machine's pages."""
    return np.frombuffer(populated(nbytes), np.uint8, count=nbytes)


def _advise(mapping: mmap, advice: int, start: int, nbytes: int) -> None:
    """Where the kernel knows the advice; without it pages are small, and come when they are touched."""
    try:
        mapping.madvise(advice, start, nbytes)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
