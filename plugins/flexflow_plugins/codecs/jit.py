"""Compiling with Numba: no compiler is needed on the user's machine, and what was compiled is kept on disk.

Importing this module imports Numba. Only the kernels import it, and codecs import the kernels when the first tensor
is encoded or decoded, so that plugins are listed without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compiled, and run without Python's lock. IEEE arithmetic in the order as written, the same on every processor."""
    return _compiled(function, fastmath=False)


def finite_kernel(function: Callable[P, R]) -> Callable[P, R]:
    """The same for finite numbers only: sums and extremes are reordered, which vectorises them."""
    return _compiled(function, fastmath=True)


def _compiled(function: Callable[P, R], *, fastmath: bool) -> Callable[P, R]:
    try:
        return cast("Callable[P, R]", numba.njit(cache=True, nogil=True, fastmath=fastmath)(function))
    except RuntimeError:  # neither this folder nor the user's cache can be written: compile in every process
        return cast("Callable[P, R]", numba.njit(nogil=True, fastmath=fastmath)(function))
