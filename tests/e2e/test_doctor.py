"""`doctor`: what hinders is told with what would help, what works is told too, and nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from commands import SCHEDULER, CommandLine, Outcome, install, write_recipe
from flexflow_engine.plugins import Registry
from harness import random_prompts, save_opt

Findings = list[dict[str, Any]]
PLUGIN = """
from flexflow_engine import hookimpl
from flexflow_engine.errors import PluginError
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_plugins.schedulers.fixed import FixedScheduler

class Stuck(FixedScheduler):
    name = "stuck"

    @classmethod
    def check_available(cls):
        raise PluginError("its solver is missing", fix="install one")

class Slow(NoneCodec):
    name = "slow"

    def notices(self, memory):
        return (f"one byte at a time on {memory}",)

@hookimpl
def flexflow_register_schedulers():
    return [Stuck]

@hookimpl
def flexflow_register_codecs():
    return [Slow]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "job", save_opt(tmp_path / "checkpoint"), random_prompts(3, longest=6))


def findings(outcome: Outcome) -> Findings:
    found: Findings = json.loads(outcome.stdout)
    return found


def about(found: Findings, subject: str) -> Findings:
    return [finding for finding in found if finding["about"] == subject]


def test_a_recipe_that_nothing_hinders(command: CommandLine, recipe: Path, tmp_path: Path) -> None:
    outcome = command("doctor", recipe, "--json", "--set=tiers.disk.path=deep/down")
    assert (outcome.status, outcome.stderr) == (0, "")
    found = findings(outcome)
    assert {finding["state"] for finding in found} == {"fine"}
    subjects = {finding["about"] for finding in found}
    assert {"tier device", "tier host", "tier disk", "scheduler fixed", "codec none", "checkpoint"} <= subjects
    assert torch.__version__ in about(found, "versions")[0]["found"]
    assert not list(Path.cwd().iterdir()), "no folder is left that was not there"
    disk = tmp_path / "job" / "disk"
    disk.mkdir()
    lines = command("doctor", recipe).stdout.splitlines()
    assert not list(disk.iterdir())
    assert all(line.startswith("fine ") for line in lines)
    assert any(line.split() == ["fine", "tier", "disk", "zarr", "is", "available"] for line in lines)


def test_what_would_help_stands_beneath_what_was_found(command: CommandLine, recipe: Path) -> None:
    outcome = command("doctor", recipe, "--set=tiers.host.budget=900000TiB", "--set=scheduler={plugin: lp}")
    lines = outcome.stdout.splitlines()
    (room,) = [number for number, line in enumerate(lines) if "room of device, host" in line]
    assert lines[room].startswith("note ")
    assert lines[room + 1].strip().startswith("budgets are limits: ")
    assert any(re.search(r"scheduler lp +it works, with \w+", line) for line in lines)


def test_what_is_installed_is_looked_at_without_a_recipe(command: CommandLine) -> None:
    outcome = command("doctor", "--json")
    assert outcome.status == 0, outcome
    registry = Registry.load()
    subjects = {finding["about"] for finding in findings(outcome)}
    assert {f"{kind} {name}" for kind in ("tier", "codec", "scheduler") for name in registry.names(kind)} <= subjects
    assert "checkpoint" not in subjects


def test_a_setting_without_a_recipe_is_told(command: CommandLine) -> None:
    outcome = command("doctor", "--set", "model.dtype=float16")
    outcome.assert_user_error()
    assert "there is no recipe to change" in outcome.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_a_tier_that_this_machine_lacks_fails_a_recipe_and_is_a_note_without_one(
    command: CommandLine, recipe: Path
) -> None:
    outcome = command("doctor", recipe, "--json", "--set=tiers.device.plugin=cuda")
    assert outcome.status == 2
    (tier,) = about(findings(outcome), "tier device")
    assert (tier["state"], "needs an NVIDIA GPU" in tier["found"]) == ("fails", True)
    assert "plugin: cpu" in tier["help"]
    assert outcome.stderr == f"error: tier device: {tier['found']}; {tier['help']}\n"
    (tier,) = about(findings(command("doctor", "--json")), "tier cuda")
    assert tier["state"] == "note"


@pytest.mark.usefixtures("no_direct_io")
def test_a_disk_without_direct_io_is_a_note(command: CommandLine, recipe: Path) -> None:
    outcome = command("doctor", recipe, "--json")
    assert outcome.status == 0, outcome
    told = [finding["found"] for finding in about(findings(outcome), "tier disk") if finding["state"] == "note"]
    assert len(told) == 1
    assert "refuses direct I/O" in told[0]


def test_budgets_beyond_what_is_free_are_a_note(command: CommandLine, recipe: Path) -> None:
    beyond = [f"--set=tiers.{tier}.budget=900000TiB" for tier in ("host", "disk")]
    outcome = command("doctor", recipe, "--json", *beyond)
    assert outcome.status == 0, outcome
    for subject in ("room of device, host", "room of disk"):
        (room,) = about(findings(outcome), subject)
        assert room["state"] == "note"
        assert "budgets of 900000" in room["found"]
        assert "--dry-run" in room["help"]


def test_the_room_of_the_weight_store_is_told_until_it_is_imported(command: CommandLine, recipe: Path) -> None:
    (store,) = about(findings(command("doctor", recipe, "--json")), "weight store")
    assert store["state"] == "fine"
    assert "imported once" in store["found"]
    assert str(recipe.parent / "disk") in store["found"]
    assert command("import", recipe).status == 0
    (store,) = about(findings(command("doctor", recipe, "--json")), "weight store")
    assert store["found"].endswith(", imported")
    (other,) = about(findings(command("doctor", recipe, "--json", "--set=codecs.weights=group-int4")), "weight store")
    assert "imported once" in other["found"]


def test_a_disk_too_small_for_the_weight_store_fails_unless_stores_are_there(
    command: CommandLine, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_full_disk(*changes: str) -> tuple[int, dict[str, Any]]:
        with monkeypatch.context() as full:
            full.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
            outcome = command("doctor", recipe, "--json", *changes)
        (store,) = about(findings(outcome), "weight store")
        return outcome.status, store

    status, store = on_a_full_disk()
    assert (status, store["state"]) == (2, "fails")
    assert "and 1000 B free" in store["found"]
    assert "a larger disk" in store["help"]
    assert command("import", recipe).status == 0
    status, store = on_a_full_disk("--set=codecs.weights=group-int4")
    assert (status, store["state"]) == (0, "note")
    assert "at most, and 1000 B free" in store["found"]
    assert "stores there have of it already is not written again" in store["help"]


def test_every_problem_of_a_checkpoint_fails(command: CommandLine, recipe: Path, tmp_path: Path) -> None:
    weights = tmp_path / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    outcome = command("doctor", recipe)
    assert outcome.status == 2
    assert f"error: checkpoint: {weights}: the file is damaged" in outcome.stderr
    assert "fetch the checkpoint again" in outcome.stdout


def test_a_checkpoint_that_is_not_fetched_yet_is_a_note_and_its_room_is_told(
    command: CommandLine, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    changes = ("--set=model.checkpoint=facebook/opt-125m", "--set=codecs.weights=group-int4")
    outcome = command("doctor", recipe, "--json", *changes)
    assert outcome.status == 0, outcome
    (checkpoint,), (store,) = (about(findings(outcome), subject) for subject in ("checkpoint", "weight store"))
    assert (checkpoint["state"], checkpoint["found"]) == ("note", "facebook/opt-125m, 12 layers, not fetched yet")
    assert "an import fetches it" in checkpoint["help"]
    assert (store["state"], "imported once" in store["found"]) == ("fine", True)


def test_schedulers_and_codecs_of_plugins_are_asked(
    command: CommandLine, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, "hindered", PLUGIN))
    broken = "from flexflow_engine import hookimpl\nimport no_such_module\n"
    monkeypatch.syspath_prepend(install(tmp_path, "unloadable", broken))
    scheduler = f"--set=scheduler={json.dumps(SCHEDULER | {'plugin': 'stuck'})}"
    outcome = command("doctor", recipe, "--json", scheduler, "--set=codecs.weights=slow")
    assert outcome.status == 2
    found = findings(outcome)
    (stuck,), (slow,) = about(found, "scheduler stuck"), about(found, "codec slow")
    assert (stuck["state"], stuck["found"], stuck["help"]) == ("fails", "its solver is missing", "install one")
    assert (slow["state"], slow["found"]) == ("note", "one byte at a time on cpu")
    (plugin,) = about(found, "plugins")
    assert (plugin["state"], "no_such_module" in plugin["found"]) == ("note", True)
    (stuck,) = about(findings(command("doctor", "--json")), "scheduler stuck")
    assert stuck["state"] == "note"


@pytest.mark.cuda
def test_a_gpu_s_memory_and_kernels_are_looked_at(command: CommandLine, recipe: Path) -> None:
    changes = ("--set=tiers.device.plugin=cuda", "--set=codecs.weights=group-int4")
    outcome = command("doctor", recipe, "--json", *changes)
    assert outcome.status == 0, outcome
    found = findings(outcome)
    (room,), (codec,) = about(found, "room of device"), about(found, "codec group-int4")
    assert (room["state"], codec["state"]) == ("fine", "fine")
    assert codec["found"].endswith("on cuda")
