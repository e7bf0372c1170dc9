"""Tests run again in a process that compiles kernels as for a processor that lacks some of this one's instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


def run_without(lacking: Sequence[str], test: str, *options: str, cache: Path) -> None:
    """lacking: words of LLVM's names of the instructions. test: pytest's name of it. cache: an empty folder for what
    is compiled.
    """
    from flexflow_engine.cpu.jit import features  # noqa: PLC0415  # Numba takes half a second to import

    def is_lacking(name: str) -> bool:
        return any(word in name for word in lacking)

    if not any(is_lacking(name) for name in features() if name.startswith("+")):
        pytest.skip(f"this processor has none of {', '.join(lacking)}")
    names = [f"-{name[1:]}" if is_lacking(name) else name for name in features()]
    environment = {**os.environ, "NUMBA_CPU_FEATURES": ",".join(names), "NUMBA_CACHE_DIR": str(cache)}
    asked = [sys.executable, "-c", "from flexflow_engine.cpu.jit import features; print(*features())"]
    left = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert not any(is_lacking(name) for name in left if name.startswith("+")), left
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", test, *options]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
    assert " skipped" not in ended.stdout
