"""What is run: a model's shape, a memory cap, a workload and the engine's policy, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from throughput.checkpoint import checkpoint_folder
from throughput.child import Cap
from throughput.gpu_cap import gpu_memory_cap
from throughput.memory_cap import memory_cap

MIB = 2**20
GIB = 2**30

RESERVE_NBYTES = 500 * MIB
"""What a run takes beside its budgets: interpreter, libraries, and the page cache that they are read through."""
DISK_BUDGET = "400GB"
HOST_BUDGET = "100GiB"
"""Where a GPU computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One row of a table: a job on two tiers. The compute tier's budget is the cap less the reserve."""

    name: str
    model: str
    """A published OPT checkpoint's short name, such as opt-1.3b."""
    cap_nbytes: int
    """Of the whole process, page cache included; with a GPU of its memory alone."""
    prompt_tokens: int
    new_tokens: int
    sequences: int
    gpu_batch_size: int
    num_gpu_batches: int
    kv_page_tokens: int
    weights_percent: float
    """On the compute tier; the rest is on the far tier. The same of the next two."""
    kv_cache_percent: float
    activations_percent: float
    codecs: Mapping[str, Any] = field(default_factory=dict)
    gpu: bool = False
    """Whether a GPU computes and the host's memory is far; else the host computes and a disk is."""

    def cap(self) -> AbstractContextManager[Cap]:
        """What one process may take."""
        return gpu_memory_cap(self.cap_nbytes) if self.gpu else memory_cap(self.cap_nbytes)

    @property
    def far(self) -> str:
        """The tier that doesn't compute."""
        return "host" if self.gpu else "disk"

    @property
    def encoded(self) -> bool:
        return bool(self.codecs)

    @property
    def multiplies_integers(self) -> bool:
        """Whether the host does."""
        weights = self.codecs.get("weights")
        return not self.gpu and isinstance(weights, Mapping) and weights.get("int8_activations", False)

    def recipe(self, work: Path) -> dict[str, Any]:
        """The engine's recipe; the disk tier and the checkpoint lie in the folder `work`."""
        return {
            "name": self.name,
            "model": {"plugin": "opt", "checkpoint": str(checkpoint_folder(work, self.model)), "dtype": "bfloat16"},
            "tiers": {
                "device": {"plugin": "cuda" if self.gpu else "cpu", "budget": self.cap_nbytes - RESERVE_NBYTES},
                **({"host": {"plugin": "pinned", "budget": HOST_BUDGET}} if self.gpu else {}),
                "disk": {"plugin": "zarr", "budget": DISK_BUDGET, "path": str(work / "disk")},
            },
            "codecs": dict(self.codecs),
            "scheduler": {
                "plugin": "fixed",
                "gpu_batch_size": self.gpu_batch_size,
                "num_gpu_batches": self.num_gpu_batches,
                "kv_page_tokens": self.kv_page_tokens,
                "attention": "device",
                "weights": self._shares(self.weights_percent),
                "kv_cache": self._shares(self.kv_cache_percent),
                "activations": self._shares(self.activations_percent),
            },
            "workload": {
                "prompts": {"synthetic": {"count": self.sequences, "prompt_tokens": self.prompt_tokens}},
                "max_new_tokens": self.new_tokens,
            },
        }

    def _shares(self, device_percent: float) -> dict[str, float]:
        return {"device": device_percent, self.far: 100 - device_percent}
