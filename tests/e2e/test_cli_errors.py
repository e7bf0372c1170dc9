"""The command line in its own process: exit statuses, what goes to which stream, and what is not imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from flexflow_engine.plugins import BLOCK_VARIABLE

VERBS = ("run", "plan", "profile", "import", "doctor", "plugins", "store", "schema")


def command(*arguments: str, module: str = "flexflow_engine") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("arguments", [[], *([verb] for verb in VERBS), ["store", "list"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from flexflow_engine.cli.app import main\n"
        f"try: main({[*arguments, '--help']!r})\n"
        "except SystemExit as exit: assert not exit.code, exit.code\n"
        "assert not {'torch', 'transformers', 'zarr'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: flexflow-engine" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["store"]])
def test_no_verbs_description_is_cut(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    described = command(*arguments, "--help").stdout.partition("Commands:\n")[2].splitlines()
    assert len(described) >= 2
    assert not [line for line in described if line.endswith("...")]


def test_the_version_is_told() -> None:
    assert command("--version").stdout == f"flexflow-engine {version('flexflow-engine')}\n"


def test_the_run_module_is_the_run_verb() -> None:
    assert command("--help", module="flexflow_engine.run").stdout == command("run", "--help").stdout


def test_plugins_are_listed_as_a_table_and_as_json() -> None:
    table, listing = command("plugins"), command("plugins", "--json")
    assert (table.returncode, listing.returncode) == (0, 0)
    names = {(row["kind"], row["name"]) for row in json.loads(listing.stdout)}
    assert {("tier", "zarr"), ("model", "opt"), ("scheduler", "fixed"), ("codec", "none")} <= names
    assert "zarr" in table.stdout


def test_the_schema_is_json() -> None:
    assert json.loads(command("schema").stdout)["required"] == ["name", "model", "tiers", "scheduler", "workload"]


def test_a_wrong_recipe_exits_with_2_and_every_problem_on_stderr(tmp_path: Path) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("nam: x\ntiers: {a: {plugin: cpu, budget: 1G}}\n")
    done = command(str(recipe), "--set", "model.plugin=otp", module="flexflow_engine.run")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {recipe}: nam: unknown key `nam`; did you mean `name`?" in done.stderr
    assert "tiers.a.budget: '1G' is not a size; did you mean 1GiB?" in done.stderr
    assert "unknown model plugin 'otp'; did you mean `opt`?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["rum"], ["run"], ["run", "--ouput", "x", "y.yaml"], ["run", "missing.yaml"]])
def test_a_wrong_command_line_exits_with_2(arguments: list[str]) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "rror: " in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_folder_has_no_stores_and_an_unknown_store_is_an_error(tmp_path: Path) -> None:
    listing = command("store", "list", "--under", str(tmp_path), "--json")
    assert (listing.returncode, json.loads(listing.stdout)) == (0, [])
    assert "--under" not in command("store", "list", "--under", str(tmp_path)).stdout
    assert "store list --under .flexflow" in command("store", "list").stdout
    removal = command("store", "remove", "nothing", "--under", str(tmp_path))
    assert removal.returncode == 2
    assert removal.stderr.startswith("error: ")


@pytest.mark.parametrize(("blocked", "told"), [("tierz", ["tierz"]), ("codecs, flexflow-engine", [])])
def test_a_name_that_blocks_no_plugin_is_told(blocked: str, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BLOCK_VARIABLE, blocked)
    done = command("plugins", "--json")
    assert done.returncode == 0
    assert re.findall(rf"^{BLOCK_VARIABLE}: nothing is blocked by '(\w+)'; did you mean `tiers`", done.stderr) == told
