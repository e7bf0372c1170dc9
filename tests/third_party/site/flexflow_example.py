"""What a third party may write: a tier, a model and a scheduler in one module, with the contracts alone."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from flexflow_engine import hookimpl
from flexflow_engine.abc.model import LayerWeights, Model
from flexflow_engine.abc.policy import Placement, Policy
from flexflow_engine.abc.scheduler import PlanRequest, Scheduler
from flexflow_engine.abc.tier import HostBytes, Region, RegionSpec, Tier
from flexflow_plugins.models.opt import OPTModel


@dataclass(frozen=True, slots=True)
class FolderOptions:
    path: Path
    """An existing folder."""


class NamelessFileTier(Tier):
    """A file for each region, without a name: the system removes it with the last descriptor."""

    name: ClassVar[str] = "nameless-file"
    Options = FolderOptions
    read_concurrency = 2

    def read(self, region: Region, first: int, count: int, out: HostBytes) -> None:
        done = os.preadv(region.handle, [out.data], first * region.spec.unit_nbytes)
        assert done == out.nbytes

    def write(self, region: Region, first: int, count: int, data: HostBytes) -> None:
        done = os.pwritev(region.handle, [data.data], first * region.spec.unit_nbytes)
        assert done == data.nbytes

    def _allocate(self, spec: RegionSpec) -> int:
        with tempfile.TemporaryFile(dir=self.options.path) as file:
            file.truncate(spec.nbytes)
            return os.dup(file.fileno())

    def _free(self, region: Region) -> None:
        os.close(region.handle)


class ContraryOPT(OPTModel):
    """OPT whose least likely token comes first."""

    name: ClassVar[str] = "contrary-opt"

    def logits(self, weights: LayerWeights, features: torch.Tensor) -> torch.Tensor:
        return super().logits(weights, features).neg_()


@dataclass(frozen=True, slots=True)
class FarthestOptions:
    rows: int = 2


class FarthestScheduler(Scheduler):
    """Puts everything on the last tier."""

    name: ClassVar[str] = "farthest"
    Options = FarthestOptions

    def choose(self, request: PlanRequest) -> Policy:
        last = Placement(((request.tiers[-1].name, 100.0),))
        return Policy(
            gpu_batch_size=self.options.rows,
            num_gpu_batches=2,
            weights=last,
            kv_cache=last,
            activations=last,
            attention="device",
            kv_page_tokens=4,
        )


@hookimpl
def flexflow_register_tiers() -> list[type[Tier]]:
    return [NamelessFileTier]


@hookimpl
def flexflow_register_models() -> list[type[Model]]:
    return [ContraryOPT]


@hookimpl
def flexflow_register_schedulers() -> list[type[Scheduler]]:
    return [FarthestScheduler]
