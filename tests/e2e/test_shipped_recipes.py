"""Every recipe that ships: it is planned on this machine and fits; the quickstart does its whole job."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flexflow_engine.abc.sizes import format_size
from flexflow_engine.engine import plan_recipe, recipe_store_room
from flexflow_engine.jobs.load import load_recipe
from flexflow_engine.planning.hardware import read_profile
from flexflow_engine.plugins import Registry

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SCHEDULED = [path for path in RECIPES if "scheduler: {plugin: lp}" in path.read_text()]


def hardware(recipe: Path) -> Path:
    """The machine that the recipe's comment plans for; any with a processor and a disk where it says this one."""
    named = re.search(r"--hardware recipes/(\S+)", recipe.read_text())
    return FOLDER / (named[1] if named else "hardware/rtx4090_24gb.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_planned_and_fits(path: Path) -> None:
    registry = Registry.load()
    recipe = load_recipe(path, [], registry)
    plan_recipe(recipe, registry, lambda needs: read_profile(hardware(path))).plan.require_fit()
    assert recipe.name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_asks_for_no_more_than_its_machine_has(path: Path) -> None:
    tiers = load_recipe(path, [], Registry.load()).tiers
    machine = read_profile(hardware(path))
    assert machine.lacking_bytes((tier.plugin, tier.budget_bytes) for tier in tiers) == {}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_begins_with_the_command_that_runs_it(path: Path) -> None:
    assert path.read_text().splitlines()[0] == f"# python -m flexflow_engine.run recipes/{path.name}"


@pytest.mark.parametrize("path", SCHEDULED, ids=lambda path: path.stem)
def test_a_scheduled_recipe_says_how_to_plan_it(path: Path) -> None:
    command = path.read_text().splitlines()[1]
    assert re.fullmatch(
        rf"# python -m flexflow_engine plan recipes/{path.name}( --hardware recipes/hardware/\w+\.yaml)?", command
    )


@pytest.mark.parametrize("path", SCHEDULED, ids=lambda path: path.stem)
def test_a_scheduled_recipe_says_what_its_weight_store_takes(path: Path) -> None:
    registry = Registry.load()
    takes = format_size(recipe_store_room(load_recipe(path, [], registry), registry).nbytes)
    assert f"# the weight store takes {takes} of this disk, whatever the budget\n" in path.read_text()


def test_the_quickstart_does_its_job_on_all_three_tiers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flexflow_engine.run", str(FOLDER / "quickstart.yaml")]
    subprocess.run([*command, "--metrics", "metrics.json", "--output", "out.jsonl"], cwd=tmp_path, check=True)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["exact_match"]["total"] == 600
    assert metrics["exact_match"]["matched"] >= 570
    assert all(min(placed.values()) > 0 for placed in metrics["placement"].values())
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"rec-{n:04}" for n in range(1, 601)]


def test_the_quickstart_is_small_and_its_prompts_are_of_many_lengths() -> None:
    checkpoint = FOLDER / "data" / "quickstart-opt"
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) <= 12 * 2**20
    prompts = [json.loads(line)["prompt"] for line in (FOLDER / "data" / "quickstart.jsonl").read_text().splitlines()]
    assert len({len(re.findall(r"\S+", prompt)) for prompt in prompts}) > 20
