"""`profile` on the command line, and what a run predicts. The machine is measured with tiny sizes, in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import CommandLine, write_recipe
from flexflow_engine.cli.hardware import HARDWARE_VARIABLE
from flexflow_engine.engine import recipe_needs
from flexflow_engine.jobs.load import load_recipe
from flexflow_engine.planning.hardware import profile_as_document
from flexflow_engine.planning.profile.cache import this_machine
from flexflow_engine.plugins import Registry
from harness import random_prompts, save_opt
from profiles import TINY


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "job", save_opt(tmp_path / "opt"), random_prompts(3, longest=6))


@pytest.fixture
def measured(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """The cache has what the recipe needs."""
    monkeypatch.delenv(HARDWARE_VARIABLE)
    registry = Registry.load()
    needs = recipe_needs(load_recipe(recipe, [], registry), registry)
    return profile_as_document(this_machine(needs, sizes=TINY, notice=lambda text: None))


def test_a_profile_is_printed_and_written_for_plan(
    command: CommandLine, recipe: Path, measured: Mapping[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "machine.yaml"
    outcome = command("profile", recipe, "--json", "--output", file)
    assert json.loads(outcome.stdout) == json.loads(json.dumps(measured))
    assert "measuring" not in outcome.stderr
    assert set(measured["links"]) == {"disk"}, "the pinned tier is computed on in place"
    assert command("plan", recipe, "--hardware", file, "--json").status == 0
    shown = command("profile", recipe).stdout
    assert all(part in shown for part in (measured["name"], "matmul, float32", "disk"))


def test_a_run_predicts_by_what_was_measured(
    command: CommandLine, recipe: Path, measured: Mapping[str, Any], tmp_path: Path
) -> None:
    outcome = command("run", recipe, "--json")
    assert "measuring" not in outcome.stderr
    assert json.loads(outcome.stdout)["predicted_tokens_per_s"] > 0


def test_a_run_on_a_machine_of_which_too_little_is_known_goes_on_without_a_prediction(
    command: CommandLine, recipe: Path, measured: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text(yaml.safe_dump({**measured, "links": {}}))
    outcome = command("run", recipe, "--json", "--hardware", file)
    assert json.loads(outcome.stdout)["predicted_tokens_per_s"] is None
    assert "no prediction: " in outcome.stderr


def test_a_folder_that_is_no_place_for_the_profile_is_told(
    command: CommandLine, recipe: Path, measured: Mapping[str, Any], tmp_path: Path
) -> None:
    command("profile", recipe, "--output", tmp_path / "nowhere" / "machine.yaml").assert_user_error()
