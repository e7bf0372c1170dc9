"""A package that the engine has never heard of adds a tier, a model and a scheduler; a recipe uses all three.

`site/` is what pip would leave in site-packages: a module and its dist-info. On sys.path it is an installed
distribution.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import OPTForCausalLM

from commands import CommandLine, completions, token_ids, write_recipe
from flexflow_engine.abc.tier import Tier
from flexflow_engine.plugins import BLOCK_VARIABLE, Registry
from flexflow_engine.testing.model_suite import ModelTests
from flexflow_engine.testing.tier_suite import TierTests
from harness import random_prompts, save_opt
from third_party.site.flexflow_example import ContraryOPT, FolderOptions, NamelessFileTier

SITE = Path(__file__).parent / "site"
PROMPTS = random_prompts(5, seed=4, longest=15)


@pytest.fixture(autouse=True)
def site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SITE)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = write_recipe(tmp_path / "job", save_opt(tmp_path / "checkpoint"), PROMPTS)
    (tmp_path / "files").mkdir()
    return path


def settings(tmp_path: Path) -> list[str]:
    """The recipe with all three plugins."""
    tiers = {
        "device": {"plugin": "cpu", "budget": "8MiB"},
        "host": {"plugin": "pinned", "budget": "8MiB"},
        "files": {"plugin": "nameless-file", "budget": "8MiB", "path": str(tmp_path / "files")},
    }
    return [f"--set=tiers={json.dumps(tiers)}", "--set=model.plugin=contrary-opt", "--set=scheduler.plugin=farthest"]


def test_a_recipe_runs_on_plugins_of_a_third_party(command: CommandLine, recipe: Path, tmp_path: Path) -> None:
    outcome = command("run", recipe, *settings(tmp_path), "--metrics", "m.json")
    assert outcome.status == 0, outcome.stderr
    assert token_ids(Path("job.completions.jsonl")) == least_likely_tokens(tmp_path / "checkpoint")
    metrics = json.loads(Path("m.json").read_text())
    for placed in metrics["placement"].values():
        assert placed["files"] > 0
        assert placed["device"] == placed["host"] == 0
    assert metrics["lanes"]["files.read"]["bytes"] > 0
    assert metrics["lanes"]["files.write"]["bytes"] > 0
    assert not list((tmp_path / "files").iterdir())


def test_the_scheduler_s_options_are_the_recipe_s_keys(command: CommandLine, recipe: Path, tmp_path: Path) -> None:
    outcome = command("run", recipe, *settings(tmp_path), "--set=scheduler.rows=1", "--dry-run", "--json")
    assert json.loads(outcome.stdout)["policy"]["gpu_batch_size"] == 1
    wrong = command("run", recipe, *settings(tmp_path), "--set=scheduler.row=1", "--set=tiers.files.pth=x")
    assert wrong.status == 2
    assert "unknown key `row`; did you mean `rows`?" in wrong.stderr
    assert "unknown key `pth`; did you mean `path`?" in wrong.stderr


def test_the_built_in_model_is_not_replaced(command: CommandLine, recipe: Path) -> None:
    assert command("run", recipe).status == 0
    assert len(completions(Path("job.completions.jsonl"))) == len(PROMPTS)
    assert Registry.load().model("opt").__module__ == "flexflow_plugins.models.opt"


def test_the_listing_names_the_distribution(command: CommandLine) -> None:
    rows = json.loads(command("plugins", "--json").stdout)
    found = {(row["kind"], row["name"]) for row in rows if row["distribution"] == "flexflow-example"}
    assert found == {("tier", "nameless-file"), ("model", "contrary-opt"), ("scheduler", "farthest")}


def test_a_blocked_package_is_not_loaded(
    command: CommandLine, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BLOCK_VARIABLE, "flexflow-example")
    outcome = command("run", recipe, *settings(tmp_path))
    outcome.assert_user_error()
    assert "unknown tier plugin 'nameless-file'" in outcome.stderr
    assert f"blocked by {BLOCK_VARIABLE}" in outcome.stderr


class TestNamelessFileTier(TierTests):
    """The shipped suite is what such a package tests itself with."""

    def make_tier(self, tmp_path: Path, budget_bytes: int) -> Tier:
        return NamelessFileTier(label="files", budget_bytes=budget_bytes, options=FolderOptions(tmp_path))


class TestContraryOPT(ModelTests):
    """So is this one."""

    model_class = ContraryOPT

    def make_checkpoint(self, tmp_path: Path) -> Path:
        return save_opt(tmp_path)


def least_likely_tokens(folder: Path, *, count: int = 6) -> dict[int, tuple[int, ...]]:
    model = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def continued(prompt: Sequence[int]) -> tuple[int, ...]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmin()))
        return tuple(ids[len(prompt) :])

    with torch.inference_mode():
        return {index: continued(prompt) for index, prompt in enumerate(PROMPTS)}
