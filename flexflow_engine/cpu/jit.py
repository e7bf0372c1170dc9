"""Compiling with Numba: no compiler is needed on the user's machine, and what was compiled is kept on disk, as long as
the kernel's own file stays as it is: who changes another one that it is made of touches that file, too.

Importing this module imports Numba. Only kernels import it, and kernels are imported when the first tensor is computed
on, so that plugins are listed without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numba.extending
from numba.core.registry import cpu_target

P = ParamSpec("P")
R = TypeVar("R")
_SUMS = {"reassoc", "nsz", "contract", "arcp"}
"""LLVM's names of the liberties that are taken."""
_njit = partial(numba.njit, nogil=True, error_model="numpy")
"""Python's model would raise where a float is divided by zero, and a loop with such a branch is not vectorised."""


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compiled, and run without Python's lock. IEEE arithmetic in the order as written, the same on every processor."""
    return cast("Callable[P, R]", _kept(partial(_njit, fastmath=False), function))


def finite_kernel(function: Callable[P, R]) -> Callable[P, R]:
    """The same for finite numbers only: sums and extremes are reordered, which vectorises them."""
    return cast("Callable[P, R]", _kept(partial(_njit, fastmath=True), function))


def summing_kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Sums are reordered, which vectorises them; what is infinite or not a number stays so."""
    return cast("Callable[P, R]", _kept(partial(_njit, fastmath=_SUMS), function))


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Numba's decorator of functions that tell a kernel's LLVM instructions."""
    return cast("Callable[..., Any]", numba.extending.intrinsic(function))


def features() -> list[str]:
    """Of the processors that kernels are compiled for: LLVM's names behind `+`, or behind `-` for what they lack."""
    names: str = cpu_target.target_context.codegen().magic_tuple()[2]
    return names.split(",")


def has_feature(name: str) -> bool:
    return f"+{name}" in features()


def c_function(signature: str) -> Callable[[Callable[..., None]], Any]:
    """A decorator: compiled at once to a C function of a Numba signature. The result's `address` is the function's."""
    return partial(_kept, partial(numba.cfunc, signature))


def _kept(compiler: Callable[..., Callable[..., Any]], function: Callable[..., Any]) -> Any:
    try:
        return compiler(cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written: compile in every process
        return compiler()(function)
