"""`profile` on the command line, and what a run predicts. The machine is measured with tiny sizes, in this process."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import CommandLine, save_tokenizer, write_prompts, write_recipe
from flexflow_engine.abc.hardware import HardwareProfile
from flexflow_engine.cli.hardware import HARDWARE_VARIABLE
from flexflow_engine.cli.progress import PlainProgress
from flexflow_engine.cpu import settings
from flexflow_engine.engine import recipe_needs, run_recipe
from flexflow_engine.errors import HardwareError
from flexflow_engine.jobs.load import load_recipe
from flexflow_engine.planning.hardware import profile_as_document
from flexflow_engine.planning.profile.cache import this_machine
from flexflow_engine.planning.profile.needs import Needs
from flexflow_engine.plugins import Registry
from flexflow_engine.products import matmul
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
    return profile_as_document(this_machine(needs, extent=TINY, notice=lambda text: None))


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
    assert re.search(r"^first prompts: \d+ tokens$", outcome.stderr, re.MULTILINE)


@pytest.mark.parametrize("content", [None, "name: [", "{}"])
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_hardware_file_that_can_t_be_used_is_told_before_anything_is_done(
    command: CommandLine, recipe: Path, content: str | None, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe.parent / "machine.yaml"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv(HARDWARE_VARIABLE, str(file))
    for given in ((), ("--hardware", str(file))):
        outcome = command(verb, recipe, *given)
        outcome.assert_user_error()
        assert str(file) in outcome.stderr
        assert not list(Path.cwd().iterdir())


def test_products_are_computed_as_the_machine_was_measured(
    command: CommandLine, recipe: Path, measured: dict[str, Any], tmp_path: Path
) -> None:
    """Encoded weights are decoded to bfloat16 where that is multiplied faster, and rounded with that."""
    save_tokenizer(tmp_path / "opt")
    write_prompts(recipe.parent, [{"prompt_token_ids": [5, 7, 9], "completion": "w11 w17 w200 w3"}] * 3)
    file, perplexities = tmp_path / "machine.yaml", []
    changes = ("model.dtype=bfloat16", "codecs.weights=group-int4", "workload={prompts: prompts.jsonl, task: score}")
    for tokens in (1, 4, None):
        cpu = {**measured["processors"]["cpu"], "float32_from": {"bfloat16": tokens}}
        file.write_text(yaml.safe_dump({**measured, "processors": {"cpu": cpu}}))
        outcome = command("run", recipe, "--json", "--hardware", file, *(f"--set={setting}" for setting in changes))
        metrics = json.loads(outcome.stdout)
        assert metrics["float32_from"] == tokens
        perplexities.append(metrics["perplexity"])
    assert perplexities[0] == perplexities[1] != perplexities[2]


@pytest.mark.parametrize("share", [(True, 0), (True, 50), (False, 0)])
def test_torchs_threads_share_products_of_jobs_that_move_nothing(
    command: CommandLine,
    recipe: Path,
    measured: dict[str, Any],
    share: tuple[bool, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the machine was measured to be faster so."""
    faster, far = share
    teams = list[int]()

    def torch_team(threads: int) -> AbstractContextManager[None]:
        teams.append(threads)
        return settings.torch_team(threads)

    monkeypatch.setattr(matmul, "torch_team", torch_team)
    file = recipe.parent / "machine.yaml"
    team = {"matmul_flops_per_s": 1e12} if faster else None
    cpu = {**measured["processors"]["cpu"], "torch_team": {"float32": team}}
    file.write_text(yaml.safe_dump({**measured, "processors": {"cpu": cpu}}))
    near = {"device": 100}
    shares = ("weights", {"device": 100 - far, "disk": far}), ("kv_cache", near), ("activations", near)
    placed = [f"--set=scheduler.{name}={json.dumps(share)}" for name, share in shares]
    metrics = json.loads(command("run", recipe, "--json", "--hardware", file, *placed).stdout)
    assert metrics["torch_team"] == bool(teams) == (faster and not far)


def test_a_machine_of_which_nothing_can_be_known_is_asked_for_once(recipe: Path, tmp_path: Path) -> None:
    asked, told = list[Needs](), io.StringIO()

    def unknown(needs: Needs) -> HardwareProfile:
        asked.append(needs)
        raise HardwareError("no machine at all")

    registry = Registry.load()
    job = load_recipe(recipe, [], registry)
    progress = PlainProgress(told, time.monotonic)
    metrics = run_recipe(job, registry, output=tmp_path / "out.jsonl", trace=None, progress=progress, hardware=unknown)
    assert len(asked) == 1
    assert told.getvalue().count("no prediction: no machine at all") == 1
    assert metrics["predicted_tokens_per_s"] is None


def test_weights_of_4_bits_need_what_their_table_is_encoded_by(recipe: Path) -> None:
    registry = Registry.load()
    needs = recipe_needs(load_recipe(recipe, ["codecs.weights=group-int4"], registry), registry)
    assert {codec.name for codec in needs.codecs} == {"group-int4", "group-int8"}


def test_a_folder_that_is_no_place_for_the_profile_is_told(
    command: CommandLine, recipe: Path, measured: Mapping[str, Any], tmp_path: Path
) -> None:
    command("profile", recipe, "--output", tmp_path / "nowhere" / "machine.yaml").assert_user_error()


def test_what_was_measured_is_kept_where_a_new_measurement_has_no_place(
    command: CommandLine, recipe: Path, measured: Mapping[str, Any], tmp_path: Path
) -> None:
    command("profile", recipe, "--again", "--output", tmp_path / "nowhere" / "machine.yaml").assert_user_error()
    again = command("profile", recipe, "--json")
    assert "measuring" not in again.stderr
    assert json.loads(again.stdout) == json.loads(json.dumps(measured))


def test_a_setting_without_a_recipe_is_told(command: CommandLine) -> None:
    outcome = command("profile", "--set", "model.dtype=float16")
    outcome.assert_user_error()
    assert "--set model.dtype=float16: there is no recipe to change; name a RECIPE" in outcome.stderr
