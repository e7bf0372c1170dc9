"""How the C library hands out memory in the command line's process; docs/decisions/0025."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

MMAP_THRESHOLD_NBYTES = 2**20
"""Blocks of this size and more are mappings of their own."""
_M_MMAP_THRESHOLD = -3
"""glibc's number for it (malloc.h)."""
_SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def return_freed_blocks(environment: Mapping[str, str] = os.environ) -> None:
    """Have large blocks go back to the machine as soon as they are freed. Elsewhere than with glibc, and where the user
    has set its allocator, nothing changes.
    """
    if os.name != "posix" or any(name in environment for name in _SET_BY_USER):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_NBYTES)
