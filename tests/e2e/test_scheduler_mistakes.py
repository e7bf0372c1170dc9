"""A scheduler's mistakes: each is told in its name, and nothing is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import CommandLine, install, write_recipe
from harness import random_prompts, save_opt

SOURCE = """
from dataclasses import dataclass, replace
from math import inf, nan

from flexflow_engine import hookimpl
from flexflow_engine.abc.policy import Placement, Policy
from flexflow_engine.abc.scheduler import Scheduler

@dataclass(frozen=True)
class Options:
    mistake: str = "policy"
    problems: str = "[]"
    candidates: str = "Scheduler.candidates(self, request)"
    made: str = "None"

    def __post_init__(self):
        eval(self.made)

def shares(**percent):
    return Placement(tuple(percent.items()))

class Erring(Scheduler):
    name = "erring"
    Options = Options

    def problems(self, tiers):
        return eval(self.options.problems)

    def choose(self, request):
        first = shares(device=100.0)
        policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights=first, kv_cache=first, activations=first,
                        attention="device", kv_page_tokens=4)
        return eval(self.options.mistake, globals(), locals())

    def candidates(self, request):
        return eval(self.options.candidates)

@hookimpl
def flexflow_register_schedulers():
    return [Erring]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(install(tmp_path, "erring_scheduler", SOURCE))
    return write_recipe(tmp_path / "job", save_opt(tmp_path / "checkpoint"), random_prompts(2, longest=5))


def setting(**options: str) -> str:
    keys = "".join(f', {name}: "{value}"' for name, value in options.items())
    return f"--set=scheduler={{plugin: erring{keys}}}"


def test_the_policy_without_a_mistake_runs(command: CommandLine, recipe: Path) -> None:
    assert command("run", recipe, setting()).status == 0


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("None", "it is a NoneType and no Policy"),
        ("{'gpu_batch_size': 4}", "it is a dict and no Policy"),
        ("replace(policy, gpu_batch_size=0)", "`gpu_batch_size` must be a whole number above 0, not 0"),
        ("replace(policy, num_gpu_batches=4.0)", "`num_gpu_batches` must be a whole number above 0, not 4.0"),
        ("replace(policy, kv_page_tokens=True)", "`kv_page_tokens` must be a whole number above 0, not True"),
        ("replace(policy, attention='gpu')", "`attention` must be one of device, host, not 'gpu'"),
        ("replace(policy, weights=shares(device=nan))", "`weights.device` must be a percentage, not nan"),
        ("replace(policy, weights=shares(device=inf))", "`weights.device` must be a percentage, not inf"),
        ("replace(policy, weights=shares(device=150.0, disk=-50.0))", "`weights.disk` must be a percentage, not -50"),
        ("replace(policy, kv_cache=shares(device=60.0))", "the shares of `kv_cache` add up to 60 and not to 100"),
        ("replace(policy, kv_cache=shares(device=100, disk=60))", "the shares of `kv_cache` add up to 160"),
        ("replace(policy, activations=shares(dsk=100))", "a share on `dsk`, which is no tier of the recipe; did you"),
        ("replace(policy, weights={'device': 100.0})", "`weights` must be a Placement of (tier, percent) pairs"),
        ("replace(policy, weights=Placement({'device': 100.0}))", "`weights` must be a Placement of (tier, percent)"),
        ("replace(policy, weights=Placement((('device', '100'),)))", "`weights` must be a Placement of (tier,"),
        ("replace(policy, weights=Placement((('disk', 50), ('disk', 100))))", "each tier once"),
        ("request.memory_table(replace(policy, weights=shares(device=nan)))", "`weights.device` must be a percentage"),
        ("request.predict(replace(policy, gpu_batch_size=0))", "`gpu_batch_size` must be a whole number above 0"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(
    command: CommandLine, recipe: Path, mistake: str, message: str
) -> None:
    for verb in ("run", "plan"):
        outcome = command(verb, recipe, setting(mistake=mistake))
        outcome.assert_user_error()
        assert "scheduler: the policy of erring makes no sense" in outcome.stderr
        assert message in outcome.stderr


@pytest.mark.parametrize("problems", ["None", "'a bad thing'", "[1]"])
def test_problems_that_are_no_list_of_sentences_are_told_once(
    command: CommandLine, recipe: Path, problems: str
) -> None:
    outcome = command("run", recipe, setting(problems=problems))
    outcome.assert_user_error()
    assert outcome.stderr.count("error: ") == 1
    assert "scheduler.plugin: `problems` of erring gave" in outcome.stderr


@pytest.mark.parametrize("candidates", ["()", "None", "[self.choose(request)]"])
def test_candidates_that_are_none_are_refused(command: CommandLine, recipe: Path, candidates: str) -> None:
    outcome = command("plan", recipe, setting(candidates=candidates))
    outcome.assert_user_error()
    assert "scheduler: the candidates of erring are no Candidates" in outcome.stderr


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("None + 1", "scheduler: the plugin's erring_scheduler.Options can't be read (TypeError: unsupported"),
        ("{}['rows']", "scheduler: the plugin's erring_scheduler.Options can't be read (KeyError: 'rows')"),
    ],
)
def test_options_that_fail_to_be_made_are_their_plugins_mistake(
    command: CommandLine, recipe: Path, made: str, message: str
) -> None:
    outcome = command("run", recipe, setting(made=made))
    outcome.assert_user_error()
    assert message in outcome.stderr
