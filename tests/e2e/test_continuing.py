"""A run that is killed, and the next one, which goes on where it stopped."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from commands import (
    CommandLine,
    Outcome,
    completions,
    ended,
    install,
    kept,
    start,
    token_ids,
    wait_until,
    write_recipe,
)
from harness import random_prompts, reference_tokens, save_opt

PROMPTS = random_prompts(6, seed=3, longest=12)
OUTPUT = "job.completions.jsonl"
PARTIAL = f"{OUTPUT}.partial"
HALTING = """
import signal
from pathlib import Path
from flexflow_engine import hookimpl
from flexflow_plugins.models.opt import OPTModel

class Halting(OPTModel):
    name = "halting"

    def embed(self, weights, rows, positions):
        while Path("halt").exists() and Path("job.completions.jsonl.partial").read_bytes().count(b'"custom_id"') > 1:
            time.sleep(0.01)
        return super().embed(weights, rows, positions)

@hookimpl
def flexflow_register_models():
    return [Halting]
"""
"""Where there is a file `halt`, computes nothing more after two completions."""


@dataclass(frozen=True)
class Killed:
    """A job of which a run was killed after two of six completions, and what it has left."""

    recipe: Path
    checkpoint: Path
    site: Path
    left: bytes
    whole: bytes
    """What a run writes that nothing cuts short."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    checkpoint, site = save_opt(folder / "checkpoint"), install(folder, "halting", HALTING)
    recipe = write_recipe(folder / "job", checkpoint, PROMPTS)
    arguments = ("flexflow_engine.run", recipe, "--set=model.plugin=halting", "--set=scheduler.gpu_batch_size=1")
    assert ended(start(*arguments, cwd=folder, PYTHONPATH=str(site))).status == 0
    whole = (folder / OUTPUT).read_bytes()
    (folder / "halt").touch()
    process = start(*arguments, cwd=folder, PYTHONPATH=str(site))
    partial = folder / PARTIAL
    wait_until(lambda: kept(partial) == 2, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had not ended by itself"
    assert (folder / OUTPUT).read_bytes() == whole, "the earlier file is left alone"
    return Killed(recipe, checkpoint, site, partial.read_bytes(), whole)


@pytest.fixture
def run(killed: Killed, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs the job, with further arguments, in a folder where the killed run has left its file."""
    monkeypatch.syspath_prepend(killed.site)
    Path(PARTIAL).write_bytes(killed.left)

    def again(*arguments: str) -> Outcome:
        return command("run", killed.recipe, "--set=model.plugin=halting", *arguments)

    return again


def test_a_killed_job_goes_on_and_ends_with_the_same_file(killed: Killed, run: Callable[..., Outcome]) -> None:
    outcome = run("--set=scheduler.gpu_batch_size=1", "--metrics=m.json")
    assert outcome.status == 0
    assert Path(OUTPUT).read_bytes() == killed.whole
    assert f"continuing: 2 of 6 completions are in {PARTIAL}\n" in outcome.stderr
    assert "6 of 6 sequences, 24 tokens" in outcome.stderr
    assert "completions: 2 of 6 come from earlier runs of the job" in outcome.stdout
    metrics, longest = json.loads(Path("m.json").read_text()), sorted(map(len, PROMPTS))[-2:]
    assert (metrics["completions"], metrics["earlier_completions"]) == (6, 2)
    assert metrics["prompt_tokens"] == sum(map(len, PROMPTS)) - sum(longest)
    assert not Path(PARTIAL).exists()


def test_a_job_goes_on_with_another_policy_and_other_tiers(killed: Killed, run: Callable[..., Outcome]) -> None:
    tiers = "--set=tiers={only: {plugin: cpu, budget: 32MiB}}"
    everything = [f"--set=scheduler.{kind}={{only: 100}}" for kind in ("weights", "kv_cache", "activations")]
    outcome = run(tiers, *everything)
    assert outcome.status == 0
    assert "continuing: 2 of 6" in outcome.stderr
    assert token_ids(Path(OUTPUT)) == reference_tokens(killed.checkpoint, PROMPTS, max_new_tokens=6)


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ("workload.max_new_tokens=5", "task"),
        ("workload.ignore_eos=true", "task"),
        ("workload.prompts=others.jsonl", "prompts"),
        ("codecs.weights=group-int8", "weights"),
        ("codecs.kv_cache=group-int8", "kv_cache"),
        ("model.dtype=bfloat16", "dtype"),
        ("model.plugin=opt", "model"),
    ],
)
def test_what_changes_completions_makes_another_job(
    killed: Killed, run: Callable[..., Outcome], change: str, different: str
) -> None:
    lines = (killed.recipe.parent / "prompts.jsonl").read_text().splitlines(keepends=True)
    (killed.recipe.parent / "others.jsonl").write_text("".join(lines[1:]))
    outcome = run(f"--set={change}")
    assert outcome.status == 0
    assert f"(different: {different}): it will be kept as {PARTIAL}.old\n" in outcome.stderr
    assert Path(f"{PARTIAL}.old").read_bytes() == killed.left
    assert len(completions(Path(OUTPUT))) == len(PROMPTS) - (different == "prompts")


def test_other_weights_make_another_job(killed: Killed, run: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run(f"--set=model.checkpoint={save_opt(tmp_path / 'other', seed=9)}")
    assert outcome.status == 0
    assert "(different: checkpoint)" in outcome.stderr


def test_weights_that_are_compressed_without_loss_make_no_other_job(run: Callable[..., Outcome]) -> None:
    outcome = run("--set=codecs.weights=numcodecs:zstd")
    assert outcome.status == 0
    assert "continuing: 2 of 6" in outcome.stderr


def test_a_job_starts_anew_when_it_is_asked_to(killed: Killed, run: Callable[..., Outcome]) -> None:
    outcome = run("--fresh", "--set=scheduler.gpu_batch_size=1")
    assert outcome.status == 0
    assert f"{PARTIAL} is not gone on with: it will be kept as {PARTIAL}.old\n" in outcome.stderr
    assert "continuing" not in outcome.stderr
    assert Path(f"{PARTIAL}.old").read_bytes() == killed.left
    assert Path(OUTPUT).read_bytes() == killed.whole


def leave_everything(killed: Killed) -> None:
    """What a kill between the last completion and the file's name leaves."""
    first, *_ = killed.left.splitlines(keepends=True)
    Path(PARTIAL).write_bytes(first + b"".join(reversed(killed.whole.splitlines(keepends=True))))


def test_a_job_with_every_completion_there_imports_and_runs_nothing(
    killed: Killed, run: Callable[..., Outcome], tmp_path: Path
) -> None:
    leave_everything(killed)
    outcome = run(f"--set=tiers.disk.path={tmp_path / 'new disk'}", "--metrics=m.json")
    assert outcome.status == 0
    assert Path(OUTPUT).read_bytes() == killed.whole
    assert not (tmp_path / "new disk").exists()
    assert "completions: 6 of 6 come from earlier runs of the job" in outcome.stdout
    metrics = json.loads(Path("m.json").read_text())
    assert (metrics["generated_tokens"], metrics["earlier_completions"], metrics["policy"]) == (0, 6, None)


def test_metrics_have_the_same_keys_where_there_is_nothing_to_run(killed: Killed, run: Callable[..., Outcome]) -> None:
    assert run("--metrics=some.json").status == 0
    leave_everything(killed)
    assert run("--metrics=none.json").status == 0
    assert json.loads(Path("none.json").read_text()).keys() == json.loads(Path("some.json").read_text()).keys()


def test_a_job_that_is_refused_leaves_what_was_there(killed: Killed, run: Callable[..., Outcome]) -> None:
    outcome = run("--set=tiers.device.budget=1KiB")
    outcome.assert_user_error()
    assert outcome.stderr.endswith(f"2 of 6 completions are in {PARTIAL}; run again to go on\n")
    assert Path(PARTIAL).read_bytes() == killed.left


def test_a_job_that_is_refused_when_it_is_to_start_anew_leaves_what_was_there(
    killed: Killed, run: Callable[..., Outcome]
) -> None:
    run("--fresh", "--set=tiers.device.budget=1KiB").assert_user_error()
    assert Path(PARTIAL).read_bytes() == killed.left
