"""Bringing what was written through the page cache to the disk, and out of the cache.

Whole pages of weights are written once and read much later: the cache is only there so that the disk may write one page
while the next is made.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from flexflow_engine.files import reporting

UNSETTLED_NBYTES = 32 * 2**20
"""What may be in the cache while further pages are made: two of the largest."""


def settle(path: Path) -> None:
    """Wait until a file is on the disk, then drop it from the page cache. Raises StorageError."""
    with reporting(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def begin_writing(descriptor: int) -> None:
    """Let the disk take what was written to an open file so far, without waiting for it."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # drops nothing yet: it writes what is dirty


class Unsettled:
    """The files written last, whose bytes the disk may still be taking. Used from one thread.

    Changing state: `_files`, oldest first, each with its size.
    """

    def __init__(self) -> None:
        self._files: deque[tuple[Path, int]] = deque()

    def add(self, path: Path, nbytes: int) -> None:
        """Take a file on whose writing has begun, and settle the oldest while there are too many bytes.

        Raises StorageError.
        """
        self._files.append((path, nbytes))
        while sum(size for _, size in self._files) > UNSETTLED_NBYTES:
            settle(self._files.popleft()[0])
