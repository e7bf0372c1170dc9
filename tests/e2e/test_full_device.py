"""A device with less memory than a plan takes, or than its kernels want beside it: refused by the budget's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import CommandLine, install, write_recipe
from harness import random_prompts, save_opt

ROWS = "--set=workload={synthetic: {count: 64, prompt_tokens: 32}, max_new_tokens: 6}"
MANY = ("--set=scheduler.gpu_batch_size=64", ROWS)
"""A plan of many MiB on the device."""
PLUGIN = """
import torch

from flexflow_engine import hookimpl
from flexflow_engine.testing.tiers import IslandTier

class Taken(IslandTier):
    name = "taken"

    @classmethod
    def free_bytes(cls, options):
        return 3 * 2**20

class Crowded(IslandTier):
    name = "crowded"

    def read(self, region, first, count, out):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

@hookimpl
def flexflow_register_tiers():
    return [Taken, Crowded]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(install(tmp_path, "devices", PLUGIN))
    return write_recipe(tmp_path / "job", save_opt(tmp_path / "checkpoint"), random_prompts(3, longest=6))


def test_a_plan_larger_than_the_devices_free_memory_is_refused_before_anything_is_read(
    command: CommandLine, recipe: Path
) -> None:
    outcome = command("run", recipe, "--set=tiers.device={plugin: taken, budget: 64MiB}", *MANY)
    outcome.assert_user_error()
    assert "error: tiers.device.budget: the plan takes " in outcome.stderr
    assert "3072KiB are free; a policy that takes 3072KiB at most would do" in outcome.stderr
    assert not (recipe.parent / "disk").exists()


def test_a_plan_that_the_devices_free_memory_holds_runs(command: CommandLine, recipe: Path) -> None:
    assert command("run", recipe, "--set=tiers.device={plugin: taken, budget: 64MiB}").status == 0


def test_a_device_that_is_full_in_a_lane_is_told_by_its_budget(command: CommandLine, recipe: Path) -> None:
    outcome = command("run", recipe, "--set=tiers.device={plugin: crowded, budget: 64MiB}")
    assert (outcome.status, outcome.stdout) == (2, "")
    assert "error: tiers.device.budget: the device's memory is full" in outcome.stderr
    assert "the budget of 64MiB; lower it" in outcome.stderr
