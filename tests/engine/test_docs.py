"""What the documents say is so: their examples run, and every key, option, metric and hook is mentioned."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexflow_engine.abc.sizes import UNITS
from flexflow_engine.cli.app import main
from flexflow_engine.declared.classes import CONTRACTS, Kind
from flexflow_engine.jobs.load import load_recipe
from flexflow_engine.jobs.prompt_lines import PromptLine
from flexflow_engine.jobs.schema import recipe_schema
from flexflow_engine.planning.hardware import ProfileSection
from flexflow_engine.plugins import BLOCK_VARIABLE, HOOKS, Registry

ROOT = Path(__file__).parents[2]
RECIPES, PLUGINS, STORE, PERFORMANCE, PLANNING = (
    ROOT / "docs" / f"{name}.md" for name in ("recipes", "plugins", "store", "performance", "planning")
)
DOCUMENTS = (ROOT / "README.md", RECIPES, PLUGINS, STORE, PERFORMANCE, PLANNING)
DECISIONS = ROOT / "docs" / "decisions" / "README.md"
FOR_DEVELOPERS = (ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", DECISIONS)
SMALL_JOB = (
    "--set=workload.prompts={synthetic: {count: 3, prompt_tokens: 8}}",
    "--set=workload.max_new_tokens=3",
)
"""Changes to the quickstart that make it a matter of a second."""
GPU_JOB = {
    "name": "gpu",
    "model": {"plugin": "opt", "checkpoint": "synthetic:opt-125m", "dtype": "float16"},
    "tiers": {
        "gpu": {"plugin": "cuda", "budget": "4GiB"},
        "disk": {"plugin": "zarr", "budget": "4GiB", "path": "disk"},
    },
    "codecs": {"weights": "group-int4", "kv_cache": "group-int8"},
    "scheduler": {
        "plugin": "fixed",
        "gpu_batch_size": 2,
        "num_gpu_batches": 2,
        "weights": {"gpu": 50, "disk": 50},
        "kv_cache": {"gpu": 50, "disk": 50},
        "activations": {"gpu": 50, "disk": 50},
    },
    "workload": {"prompts": {"synthetic": {"count": 4, "prompt_tokens": 40}}, "max_new_tokens": 4},
}
"""Every line of the memory table appears in its plan, those of attention on the host if that is asked for."""


@dataclass(frozen=True)
class Block:
    """A fenced piece of a document."""

    language: str
    text: str

    @property
    def file_name(self) -> str | None:
        """`# NAME.py` in the first line says that the block is that file."""
        found = re.match(r"# (\w+\.py)\n", self.text)
        return found[1] if found else None


def blocks(document: Path, language: str) -> list[Block]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*parts) for parts in found if parts[0] == language]


def missing(names: Iterator[str] | set[str], document: Path) -> set[str]:
    """Those that the document never has as code: `name`, or as the last part of `a.name`, or before arguments."""
    text = document.read_text()
    return {name for name in names if not re.search(rf"`(?:[\w.]+\.)?{re.escape(name)}(?:[ (][^`]+)?`", text)}


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A Python process in `cwd`, which finds modules and distributions there; fails the test when it fails."""
    variables = {
        "PYTHONPATH": os.pathsep.join([str(cwd), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(cwd / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done


def run_blocks(document: Path, cwd: Path) -> int:
    """Write the python blocks that are files, run their tests, and then the other blocks. How many there were."""
    examples = blocks(document, "python")
    files = {block.file_name: block.text for block in examples if block.file_name}
    for name, text in files.items():
        (cwd / name).write_text(text)
    if tests := [name for name in files if name.startswith("test_")]:
        run("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=cwd)
    for block in examples:
        if not block.file_name:
            run("-c", block.text, cwd=cwd)
    return len(examples)


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    """The recipe in a copy, beside which a run may leave its files."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns(".flexflow"))
    return tmp_path / "recipes" / "quickstart.yaml"


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The distribution that docs/plugins.md builds, installed in a folder."""
    for block in blocks(PLUGINS, "python"):
        if block.file_name:
            (tmp_path / block.file_name).write_text(block.text)
    (packaging,) = blocks(PLUGINS, "toml")
    project = tomllib.loads(packaging.text)["project"]
    metadata = tmp_path / "flexflow_example-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n")
    lines = [f"{name} = {module}\n" for name, module in project["entry-points"]["flexflow_engine"].items()]
    (metadata / "entry_points.txt").write_text("[flexflow_engine]\n" + "".join(lines))
    return tmp_path


def test_the_examples_of_recipes_run(tmp_path: Path, quickstart: Path) -> None:
    run("-m", "flexflow_engine.run", str(quickstart), *SMALL_JOB, "--metrics", "metrics.json", cwd=tmp_path)
    assert run_blocks(RECIPES, tmp_path) >= 3


def test_the_examples_of_the_store_run(tmp_path: Path, quickstart: Path) -> None:
    run("-m", "flexflow_engine", "import", str(quickstart), "--set", "model.dtype=bfloat16", cwd=tmp_path)
    assert run_blocks(STORE, tmp_path) >= 3


def test_the_example_plugins_keep_their_contracts_and_run_a_job(example: Path) -> None:
    assert run_blocks(PLUGINS, example) >= 8
    rows = json.loads(run("-m", "flexflow_engine", "plugins", "--json", cwd=example).stdout)
    ours = {row["kind"]: row["error"] for row in rows if row["distribution"] == "flexflow-example"}
    assert ours == dict.fromkeys(HOOKS), "one plugin of each kind, without an error"
    (recipe,) = blocks(PLUGINS, "yaml")
    (example / "example.yaml").write_text(recipe.text)
    policy = (
        "--set=scheduler={plugin: fixed, gpu_batch_size: 2, num_gpu_batches: 1, weights: {disk: 100},"
        " kv_cache: {disk: 100}, activations: {disk: 100}, kv_page_tokens: 2}"
    )
    outputs = []
    for changes in ((), (policy,)):
        run("-m", "flexflow_engine.run", "example.yaml", "--output", "o.jsonl", *changes, cwd=example)
        outputs.append([json.loads(line)["token_ids"] for line in (example / "o.jsonl").read_text().splitlines()])
    assert [len(tokens) for tokens in outputs[0]] == [4, 4]
    assert outputs[0] == outputs[1], "in memory, and on the example's disk"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_recipe_in_a_document_loads(
    document: Path, example: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.syspath_prepend(example)
    request.addfinalizer(lambda: _forget_examples(example))
    (example / "prompts.jsonl").touch()
    (example / "plain").mkdir()
    for index, block in enumerate(blocks(document, "yaml")):
        path = example / f"{index}.yaml"
        path.write_text(block.text)
        assert load_recipe(path, (), Registry.load()).name == yaml.safe_load(block.text)["name"]


def test_the_readmes_recipe_is_planned_as_the_readme_says(tmp_path: Path) -> None:
    (recipe,) = blocks(ROOT / "README.md", "yaml")
    (tmp_path / "my_job.yaml").write_text(recipe.text)
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [2, 3, 4]}\n')
    machine = ROOT / "recipes" / "hardware" / "t4_gcp.yaml"
    plan = json.loads(
        run("-m", "flexflow_engine", "plan", "my_job.yaml", "--json", f"--hardware={machine}", cwd=tmp_path).stdout
    )
    assert plan["fits"]
    assert plan["machine_lacks_bytes"] == {}


def _forget_examples(folder: Path) -> None:
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(folder))]:
        del sys.modules[name]


def test_every_recipe_key_is_explained() -> None:
    keys = set(_schema_keys(recipe_schema())) | set(_option_keys(Registry.load()))
    assert {"gpu_batch_size", "budget", "path", "seed"} <= keys, "the collection itself works"
    assert missing(keys, RECIPES) == set()
    assert missing(set(UNITS), RECIPES) == set()


def _schema_keys(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        for part in schema.values():
            yield from _schema_keys(part)


def _option_keys(registry: Registry) -> Iterator[str]:
    for name in registry.names("tier"):
        yield from (option.name for option in fields(registry.tier(name).Options))
    for name in registry.names("codec"):
        yield from (option.name for option in fields(registry.codec(name).Options))
    for name in registry.names("scheduler"):
        yield from (option.name for option in fields(registry.scheduler(name).Options))


def test_every_key_of_a_hardware_file_and_of_a_plan_is_explained(quickstart: Path) -> None:
    keys = set(_schema_keys(ProfileSection.model_json_schema()))
    assert {"bytes_per_s", "reverse", "task_s"} <= keys, "the collection itself works"
    assert missing(keys, PLANNING) == set()
    machine = quickstart.parent / "hardware" / "t4_gcp.yaml"
    command = ("-m", "flexflow_engine", "plan", str(quickstart), *SMALL_JOB, "--json", "--hardware", str(machine))
    assert missing(set(json.loads(run(*command, cwd=quickstart.parent).stdout)), PLANNING) == set()


def test_every_metric_trace_key_and_line_is_explained(tmp_path: Path, quickstart: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "expected": "b"}\n{"prompt": "b c"}\n')
    prompts = f"--set=workload.prompts={tmp_path / 'prompts.jsonl'}"
    files = ("--output", "o.jsonl", "--metrics", "metrics.json", "--trace", "trace.json")
    run("-m", "flexflow_engine.run", str(quickstart), prompts, SMALL_JOB[1], *files, cwd=tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert missing(set(_metric_keys(metrics)), RECIPES) == set()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert missing({key for event in events for key in event["args"]}, RECIPES) == set()
    completion = json.loads((tmp_path / "o.jsonl").read_text().partition("\n")[0])
    assert missing({*completion, *completion["usage"], *PromptLine.model_fields}, RECIPES) == set()


def _metric_keys(metrics: dict[str, Any]) -> Iterator[str]:
    """All keys but names of tiers and of their lanes."""
    yield from metrics
    yield from metrics["exact_match"]
    for name in ("policy", "placement", "page_bytes"):
        yield from metrics[name]
    for name in ("tiers", "lanes"):
        for entry in metrics[name].values():
            yield from entry
    yield from (lane for lane in metrics["lanes"] if "." not in lane)


def test_every_line_of_the_memory_table_is_explained(tmp_path: Path) -> None:
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(GPU_JOB, sort_keys=False))
    lines = set[str]()
    for changes in ((), ("--set=scheduler.kv_cache={disk: 100}", "--set=scheduler.attention=host")):
        plan = run("-m", "flexflow_engine", "run", "gpu.yaml", *changes, "--dry-run", "--json", cwd=tmp_path)
        memory = json.loads(plan.stdout)["memory"]
        lines |= {line["what"] for tier in memory.values() for line in tier["lines"]}
    explained = set(re.findall(r"^\| ([a-z_ ]+) \|", RECIPES.read_text(), re.MULTILINE))
    assert {"staging", "decoded kv", "attention slots", "prompt slots", "workspace"} <= lines, "the plans have them all"
    assert lines <= explained


def help_of(capsys: pytest.CaptureFixture[str], *verb: str) -> str:
    with pytest.raises(SystemExit):
        main([*verb, "--help"])
    return capsys.readouterr().out


def test_verbs_and_options_are_those_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    verbs, options = set[str](), set[str]()
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        verb = waiting.pop()
        options |= set(re.findall(r"^  (--[a-z-]+)", text := help_of(capsys, *verb), re.MULTILINE))
        commands = re.findall(r"^  ([a-z]+) ", text.partition("Commands:")[2], re.MULTILINE)
        waiting += [(*verb, command) for command in commands]
        verbs |= {" ".join(verb)} if verb and not commands else set()
    assert {"run", "store list"} <= verbs
    assert missing(options | verbs, RECIPES) == set()
    of_the_program = [
        document for document in DOCUMENTS if document != PERFORMANCE
    ]  # benchmarks have options of their own
    text = "\n".join(document.read_text() for document in of_the_program)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) == options, "no option is described that isn't there"
    shown = set(re.findall(r"python -m flexflow_engine (store [a-z]+|[a-z]+)", text))
    assert shown <= verbs, "no verb is shown that isn't there"


def test_hooks_contracts_and_the_variable_are_explained() -> None:
    assert missing(set(HOOKS.values()), PLUGINS) == set()
    assert BLOCK_VARIABLE in PLUGINS.read_text()
    for kind in HOOKS:
        assert missing(_contract(kind), PLUGINS) == set(), kind


def _contract(kind: Kind) -> set[str]:
    """What an author may write or meet: public names, and those that must be written."""
    contract, _ = CONTRACTS[kind]
    return set(contract.__abstractmethods__) | {name for name in vars(contract) if not name.startswith("_")}


def test_every_decision_is_in_the_index_under_its_title() -> None:
    listed = [line for line in DECISIONS.read_text().splitlines() if line.startswith("- ")]
    headings = {path.name: path.read_text().partition("\n")[0] for path in sorted(DECISIONS.parent.glob("[0-9]*.md"))}
    assert listed == [f"- [{name[:4]}]({name}) {text.removeprefix('# ')}" for name, text in headings.items()]


@pytest.mark.parametrize("document", [*DOCUMENTS, *FOR_DEVELOPERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", document.read_text()):
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
