"""Compiling with Numba: no compiler is needed on the user's machine, and what was compiled is kept on disk, as long as
the files in the kernel's own folder and in this one stay as they are. Numba itself looks at the kernel's file alone,
and would go on with numbers and functions that it took from others before these were changed.

Importing this module imports Numba. Only kernels import it, and kernels are imported when the first tensor is computed
on, so that plugins are listed without.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from threading import RLock
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numba.extending
from numba.core.registry import cpu_target

from flexflow_engine.user_cache import user_cache

P = ParamSpec("P")
R = TypeVar("R")
_CONFIG: Any = numba.config
_DECORATING = RLock()
"""Held while Numba is told another folder than the process's."""
_OLD_SECONDS = 60 * 86400
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
    source = Path(function.__code__.co_filename)
    with _DECORATING:
        before = _CONFIG.CACHE_DIR
        folder = _folder_of(source.parent, before) if source.is_file() else None
        if folder is None:
            return compiler()(function)
        _CONFIG.CACHE_DIR = str(folder)
        try:
            return compiler(cache=True)(function)
        finally:
            _CONFIG.CACHE_DIR = before


@cache
def _folder_of(sources: Path, chosen: str) -> Path | None:
    """For what is compiled of a folder's files: the one chosen by the user, one beside them, or one in this user's
    cache. None where nothing can be written, and every process compiles.
    """
    return _made(sources, lambda: Path(chosen or sources / "__pycache__")) or (
        None if chosen else _made(sources, lambda: user_cache() / "kernels")
    )


def _made(sources: Path, base: Callable[[], Path]) -> Path | None:
    with suppress(OSError, RuntimeError):  # a file is gone, nothing can be written, or no home is known
        folder = base() / f"kernels-{_digest(sources)}"
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
        if is_new:
            _forget_old(folder.parent)
        return folder
    return None


def _digest(sources: Path) -> str:
    """Of all files that a kernel in a folder is made of."""
    digest, own = sha256(), Path(__file__).parent
    for file in sorted({*sources.glob("[!.]*.py"), *own.glob("[!.]*.py")}):
        digest.update(b"%b\0%d\0" % (file.name.encode(), file.stat().st_size))
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _forget_old(base: Path) -> None:
    """What was kept of files as they were weeks ago."""
    for folder in base.glob("kernels-*"):
        if folder.stat().st_mtime < time.time() - _OLD_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
