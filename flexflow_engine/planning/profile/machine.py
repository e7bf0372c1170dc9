"""Which machine this is, and with which versions it computes: whatever makes a measurement an old one."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Self

import torch

from flexflow_engine.cpu.settings import torch_threads

DISTRIBUTIONS = ("flexflow-engine", "torch", "numba", "numpy")
MEASUREMENTS = 8
"""Counted up where a run computes or reads otherwise than before, and what was measured then is worth nothing now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Equal where measurements are worth the same."""

    processor: str
    cores: int
    """That this process may use."""
    threads: int
    """That torch computes with."""
    memory_gib: int
    gpus: tuple[str, ...]
    versions: tuple[str, ...]

    @classmethod
    def here(cls) -> Self:
        """This one. Starts no device that is not there."""
        return cls(
            processor=_processor_name(),
            cores=len(os.sched_getaffinity(0)),
            threads=torch_threads(),
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
            versions=(
                f"measurements {MEASUREMENTS}",
                platform.python_version(),
                *(f"{name} {version(name)}" for name in DISTRIBUTIONS),
            ),
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        parts = [self.processor, f"{self.cores} cores", f"{self.memory_gib} GiB", *self.gpus]
        return ", ".join(parts)


def _processor_name() -> str:
    """`platform.processor` says no more than x86_64 on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
