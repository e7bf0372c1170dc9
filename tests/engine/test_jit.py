"""Compiled kernels are kept, until a file that they are made of changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL = """
from flexflow_engine.cpu.jit import kernel
from numbers_of_it import NUMBER

@kernel
def twice():
    return 2 * NUMBER
"""
RUN = """
from kernel_of_it import twice
print(twice(), sum(twice.stats.cache_hits.values()))
"""


@pytest.mark.parametrize("chosen", [False, True])
def test_a_kernel_is_kept_until_a_number_in_another_file_changes(tmp_path: Path, chosen: bool) -> None:
    folder, elsewhere = tmp_path / "kernels", tmp_path / "cache"
    folder.mkdir()
    (folder / "kernel_of_it.py").write_text(KERNEL, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    if chosen:
        environment["NUMBA_CACHE_DIR"] = str(elsewhere)

    (folder / ".#kernel_of_it.py").symlink_to("nowhere")  # as editors leave them

    def run(number: int) -> str:
        (folder / "numbers_of_it.py").write_text(f"NUMBER = {number}\n", encoding="utf-8")
        done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert [run(3), run(3), run(4), run(4)] == ["6 0", "6 1", "8 0", "8 1"]
    assert elsewhere.exists() == chosen


def test_kernels_are_compiled_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "kernel_of_it.py").write_text(KERNEL, encoding="utf-8")
    (tmp_path / "numbers_of_it.py").write_text("NUMBER = 3\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": "/proc/nothing"}
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "6 0"
