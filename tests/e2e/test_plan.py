"""`plan` on the command line: needs no GPU, no weights and no measured machine if one is given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import CommandLine, Outcome, save_tokenizer, write_recipe
from flexflow_engine.cli.forecast import render_forecast
from flexflow_engine.cli.hardware import HARDWARE_VARIABLE
from flexflow_engine.engine import predict_recipe
from flexflow_engine.jobs.load import load_recipe
from flexflow_engine.planning.clock import VirtualDataflow
from flexflow_engine.planning.hardware import read_profile
from flexflow_engine.plugins import Registry
from harness import random_prompts, save_opt

ROOT = Path(__file__).parents[2]
T4 = ROOT / "recipes" / "hardware" / "t4_gcp.yaml"
SMALL = "--set=workload.prompts={synthetic: {count: 4, prompt_tokens: 32}}"
ON_HOST = (
    "--set=scheduler={plugin: fixed, gpu_batch_size: 4, num_gpu_batches: 1, weights: {host: 100}, kv_cache: {gpu: 100},"
    " activations: {gpu: 100}}"
)
KEYS = {"weight_store", "predicted_tokens_per_s", "policy", "tiers", "lanes", "bound_by", "fits"}


@pytest.fixture
def command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return CommandLine(capsys)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    checkpoint = save_opt(tmp_path / "opt")
    save_tokenizer(checkpoint)
    return write_recipe(tmp_path / "job", checkpoint, random_prompts(5, longest=9))


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The T4's figures, with a processor that computes in float32."""
    document = yaml.safe_load(T4.read_text())
    path = tmp_path / "machine.yaml"
    path.write_text(yaml.safe_dump(document | {"name": "desk"}))
    return path


def found(outcome: Outcome) -> dict[str, Any]:
    assert outcome.status == 0, outcome
    return dict(json.loads(outcome.stdout))


@pytest.mark.parametrize("name", ["opt30b_16gb", "opt175b_16gb"])
def test_a_shipped_recipe_is_predicted_for_a_machine_that_is_not_here(command_line: CommandLine, name: str) -> None:
    arguments = (ROOT / "recipes" / f"{name}.yaml", "--hardware", T4, "--json", SMALL, ON_HOST)
    plan = found(command_line("plan", *arguments))
    assert plan.keys() >= KEYS
    assert plan["fits"] is True
    assert plan["machine_lacks_bytes"] == {}
    assert plan["predicted_tokens_per_s"] > 0
    assert plan["hardware"] == "t4_gcp"
    assert plan["bound_by"] in plan["lanes"]
    assert max(lane["busy_share"] for lane in plan["lanes"].values()) <= 1 + 1e-9


def test_lp_plans_without_a_host_tier_in_the_recipe(command_line: CommandLine, recipe: Path) -> None:
    tiers = {
        "gpu": {"plugin": "cuda", "budget": "900KiB"},
        "disk": {"plugin": "zarr", "budget": "1GiB", "path": "disk"},
    }
    changes = (f"--set=tiers={json.dumps(tiers)}", "--set=scheduler={plugin: lp}", "--set=model.dtype=float16")
    plan = found(command_line("plan", recipe, "--hardware", T4, "--json", *changes))
    assert plan["fits"]
    assert plan["policy"]["weights"].keys() <= {"gpu", "disk"}
    assert plan["policy"]["attention"] == "device"


@pytest.mark.parametrize("read", ["prompts.jsonl", "../opt/config.json"])
@pytest.mark.parametrize("written", ["plan --trace", "profile --output", "run --trace"])
def test_no_file_of_the_job_is_written_over(command_line: CommandLine, recipe: Path, read: str, written: str) -> None:
    verb, option = written.split()
    path = recipe.parent / read
    before = path.read_bytes()
    outcome = command_line(verb, recipe, option, path)
    outcome.assert_user_error()
    assert f"and {option} are the same file" in outcome.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "written", ["plan --trace", "profile --output", "run --output", "run --metrics", "run --trace"]
)
def test_no_file_of_the_job_is_taken_for_one_that_is_not_whole_yet(
    command_line: CommandLine, recipe: Path, written: str
) -> None:
    """Prompts may have been called so by a run that did not end."""
    verb, option = written.split()
    prompts = (recipe.parent / "prompts.jsonl").rename(recipe.parent / "more.jsonl.partial")
    before = prompts.read_bytes()
    asked = ("--set=workload.prompts=more.jsonl.partial", option, recipe.parent / "more.jsonl")
    outcome = command_line(verb, recipe, *asked)
    outcome.assert_user_error()
    assert f"{prompts}: prompts and {option} are the same file" in outcome.stderr
    assert prompts.read_bytes() == before


def test_no_overlap_takes_longer(command_line: CommandLine, recipe: Path, machine: Path) -> None:
    overlapped = found(command_line("plan", recipe, "--hardware", machine, "--json"))
    alone = found(command_line("plan", recipe, "--hardware", machine, "--json", "--no-overlap"))
    assert alone["predicted_tokens_per_s"] < overlapped["predicted_tokens_per_s"]
    assert alone["policy"] == overlapped["policy"]
    assert overlapped["what_would_help"]
    assert not alone["what_would_help"], "its gains are of a run"


def test_the_printed_policy_is_the_same_plan(command_line: CommandLine, recipe: Path, machine: Path) -> None:
    arguments = (recipe, "--hardware", machine)
    printed = command_line("plan", *arguments).stdout
    (line,) = [line for line in printed.splitlines() if line.strip().startswith("--set scheduler=")]
    pasted = line.strip().removeprefix("--set ").replace("'", "")
    again = found(command_line("plan", *arguments, "--json", "--set", pasted))
    assert again == found(command_line("plan", *arguments, "--json"))


def test_the_answer_comes_first_and_the_policy_in_full_last(
    command_line: CommandLine, recipe: Path, machine: Path
) -> None:
    parts = command_line("plan", recipe, "--hardware", machine, "--set=scheduler={plugin: lp}").stdout.split("\n\n")
    begin = [part.split()[0] for part in parts]
    assert begin[:3] == ["predicted", "lane", "tier"]
    assert begin[-3:] == ["policy", "tier", "to"]
    (weighed,) = [part.splitlines()[0] for part in parts if part.startswith("runner-up")]
    assert weighed.endswith("attention  tokens/s  beside the choice")


@pytest.mark.parametrize(("error", "told"), [(0.0004, False), (0.0006, True)])
def test_a_sampling_error_is_told_unless_it_is_nothing(recipe: Path, error: float, told: bool) -> None:
    registry = Registry.load()
    asked = load_recipe(recipe, (), registry)
    forecast = predict_recipe(
        asked, registry, hardware=lambda needs: read_profile(T4), executor=VirtualDataflow, trace=None
    )
    uncertain = replace(forecast, prediction=replace(forecast.prediction, relative_error=error))
    assert ("sampling error" in render_forecast(uncertain)) is told


def test_a_policy_that_does_not_fit_is_predicted_and_run_refuses_it(
    command_line: CommandLine, recipe: Path, machine: Path
) -> None:
    small = "--set=tiers.host.budget=100KiB"
    plan = found(command_line("plan", recipe, "--hardware", machine, "--json", small))
    assert plan["fits"] is False
    lacking = plan["tiers"]["host"]["peak_bytes"] - 100 * 1024
    assert plan["exceeded_bytes"] == {"host": lacking}
    assert plan["predicted_tokens_per_s"] > 0
    told = command_line("plan", recipe, "--hardware", machine, small)
    assert "it does not fit: host lacks" in told.stdout
    command_line("run", recipe, small).assert_user_error()


def test_a_plan_shows_memory_lanes_and_what_binds(command_line: CommandLine, recipe: Path, machine: Path) -> None:
    shown = command_line("plan", recipe, "--hardware", machine).stdout
    for part in ("device  [", "disk.read", "predicted for desk", "tokens/s", "bound by: ", "it fits"):
        assert part in shown


def test_what_would_help_comes_with_its_gain_the_best_first(
    command_line: CommandLine, recipe: Path, machine: Path
) -> None:
    slow = yaml.safe_load(machine.read_text())
    slow["links"]["zarr"] = {way: {"bytes_per_s": 1e4, "latency_s": 0} for way in ("read", "write")}
    slow["processors"]["cpu"]["codecs"] = slow["processors"]["cuda"]["codecs"]
    machine.write_text(yaml.safe_dump(slow))
    on_disk = "--set=scheduler.weights={disk: 100}"
    plan = found(command_line("plan", recipe, "--hardware", machine, "--json", on_disk))
    gains = [change["gain"] for change in plan["what_would_help"]]
    assert gains == sorted(gains, reverse=True)
    told = {change["change"]: change for change in plan["what_would_help"]}
    faster = told["disk: a disk of twice the rate"]
    assert faster["gain"] == pytest.approx(1, rel=0.1)
    assert faster["predicted_tokens_per_s"] == pytest.approx(2 * plan["predicted_tokens_per_s"], rel=0.1)
    assert any(change.startswith("codecs.weights: group-int4") for change in told)
    assert "what would help" in command_line("plan", recipe, "--hardware", machine, on_disk).stdout


def test_runners_up_lose_to_the_choice(command_line: CommandLine, recipe: Path, machine: Path) -> None:
    chosen = found(command_line("plan", recipe, "--hardware", machine, "--json", "--set=scheduler={plugin: lp}"))
    losses = [other["loses"] for other in chosen["runners_up"]]
    assert losses == sorted(losses)
    assert all(loss >= 0 for loss in losses)
    assert all(other["policy"] != chosen["policy"] for other in chosen["runners_up"])
    assert found(command_line("plan", recipe, "--hardware", machine, "--json"))["runners_up"] == []


def test_a_trace_of_the_virtual_clock_is_one_of_a_run(
    command_line: CommandLine, recipe: Path, machine: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    plan = found(command_line("plan", recipe, "--hardware", machine, "--json", "--trace", trace))
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["tid"].split()[0] for event in events} <= plan["lanes"].keys()
    computed = sum(event["dur"] for event in events if event["tid"] == "compute") / 1e6
    assert computed == pytest.approx(plan["lanes"]["compute"]["busy_s"])


@pytest.mark.parametrize("verb", [("plan",), ("run", "--dry-run")])
def test_a_machine_that_can_not_be_measured_here_is_refused_and_the_way_out_told(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    monkeypatch.delenv(HARDWARE_VARIABLE)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = command_line(*verb, ROOT / "recipes" / "opt30b_16gb.yaml", SMALL)
    outcome.assert_user_error()
    assert outcome.stderr.startswith("error: tiers.gpu: this machine can't be measured: "), "nothing is tried before"
    assert outcome.stderr.endswith("; plan for a machine from a file: --hardware FILE\n")


def test_a_machine_without_the_recipes_link_is_refused(command_line: CommandLine, recipe: Path, machine: Path) -> None:
    document = yaml.safe_load(machine.read_text())
    del document["links"]["zarr"]
    machine.write_text(yaml.safe_dump(document))
    outcome = command_line("plan", recipe, "--hardware", machine)
    outcome.assert_user_error()
    assert "links.zarr" in outcome.stderr
    assert str(machine) in outcome.stderr


def test_a_machine_without_a_rate_of_the_recipes_dtype_is_refused_by_its_file(
    command_line: CommandLine, recipe: Path, machine: Path
) -> None:
    document = yaml.safe_load(machine.read_text())
    del document["processors"]["cpu"]["matmul_flops_per_s"]["float32"]
    machine.write_text(yaml.safe_dump(document))
    outcome = command_line("plan", recipe, "--hardware", machine)
    outcome.assert_user_error()
    assert f"{machine}: there is no matmul rate for float32" in outcome.stderr
