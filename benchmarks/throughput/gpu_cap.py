"""A cap on what one process takes of a GPU's memory: torch gives out no more, as if the GPU had no more.

    python -m throughput.gpu_cap NBYTES PEAK_FILE -m MODULE ARGUMENT…

What CUDA itself takes beside it, half a gigabyte, is not counted.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class GpuMemoryCap:
    """For one command."""

    nbytes: int
    peak_file: Path

    @property
    def peak_bytes(self) -> int:
        """The most that torch held, for those who asked and in reserve, once the command has ended."""
        return int(self.peak_file.read_text())

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command, which begins with the interpreter, under the cap."""
        interpreter, *rest = command
        return [interpreter, "-m", "throughput.gpu_cap", str(self.nbytes), str(self.peak_file), *rest]


@contextmanager
def gpu_memory_cap(nbytes: int) -> Iterator[GpuMemoryCap]:
    """Of the first GPU that is visible."""
    with tempfile.TemporaryDirectory() as folder:
        yield GpuMemoryCap(nbytes, Path(folder) / "peak")


def _run(nbytes: int, peak_file: Path, module: str, arguments: Sequence[str]) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        peak_file.write_text(str(torch.cuda.max_memory_reserved()))


if __name__ == "__main__":
    _run(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[4], sys.argv[5:])
