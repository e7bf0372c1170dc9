"""Compiling with Numba: no compiler is needed on the user's machine, and what was compiled is kept on disk, as long as
the files in the kernel's own folder and in this one stay as they are. Numba itself looks at the kernel's file alone,
and would go on with numbers and functions that it took from others before these were changed.

Importing this module imports Numba. Only kernels import it, and kernels are imported when the first tensor is computed
on, so that plugins are listed without.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numba.extending
from numba.core.registry import cpu_target

from flexflow_engine.user_cache import user_cache

P = ParamSpec("P")
R = TypeVar("R")
_CONFIG: Any = numba.config
_DECORATING = Lock()
"""Held while Numba is told another folder than the process's."""
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
    folder = _folder_of(Path(function.__code__.co_filename))
    if folder is None:
        return compiler()(function)
    with _DECORATING:
        before, _CONFIG.CACHE_DIR = _CONFIG.CACHE_DIR, str(folder)
        try:
            return compiler(cache=True)(function)
        except RuntimeError:  # that folder can't be used after all
            return compiler()(function)
        finally:
            _CONFIG.CACHE_DIR = before


def _folder_of(source: Path) -> Path | None:
    """For what is compiled of a file: the user's, beside the file, or in this user's cache. None where nothing can be
    written, and every process compiles.
    """
    if not source.is_file():
        return None
    chosen = _CONFIG.CACHE_DIR
    for base in [Path(chosen)] if chosen else [source.parent / "__pycache__", user_cache() / "kernels"]:
        folder = base / f"kernels-{_digest(source.parent)}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return None


@cache
def _digest(folder: Path) -> str:
    """Of all files that a kernel in a folder is made of."""
    digest = sha256()
    for file in sorted({*folder.glob("*.py"), *Path(__file__).parent.glob("*.py")}):
        digest.update(b"%b\0%d\0" % (file.name.encode(), file.stat().st_size))
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
