"""`python -m flexflow_engine.run` on a small recipe: what it writes, and what it promises about it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

from commands import (
    CommandLine,
    Json,
    Outcome,
    completions,
    ended,
    save_tokenizer,
    start,
    token_ids,
    write_prompts,
    write_recipe,
)
from harness import random_prompts, reference_tokens, save_opt

PROMPTS = [*random_prompts(6, seed=1, longest=20), (7,)]
RUN = "flexflow_engine.run"


@dataclass(frozen=True)
class Run:
    """A finished run in a process of its own, in an empty working directory."""

    outcome: Outcome
    folder: Path
    checkpoint: Path

    def json(self, name: str) -> Json:
        content: Json = json.loads((self.folder / name).read_text())
        return content


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root, work = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("work")
    checkpoint = save_opt(root / "checkpoint")
    recipe = write_recipe(root, checkpoint, PROMPTS)
    process = start(RUN, recipe, "--metrics", "m.json", "--trace", "t.json", cwd=work)
    return Run(ended(process), work, checkpoint)


def test_the_run_says_what_it_achieved_and_leaves_what_was_asked_for(run: Run) -> None:
    assert run.outcome.status == 0, run.outcome.stderr
    for expected in ("throughput: ", "bound by: ", "device", "host", "disk", "completions: job.completions.jsonl"):
        assert expected in run.outcome.stdout
    assert sorted(path.name for path in run.folder.iterdir()) == ["cache", "job.completions.jsonl", "m.json", "t.json"]


def test_what_takes_its_time_before_the_first_step_ends_is_told_in_order(run: Run) -> None:
    first = sum(sorted(map(len, PROMPTS), reverse=True)[:4])
    told = run.outcome.stderr.splitlines()
    (loading,) = [number for number, line in enumerate(told) if line.startswith("loading resident weights: ")]
    predicted = rf"first prompts: {first} tokens, about .*; the whole job about .* \(predicted\)"
    assert re.fullmatch(predicted, told[loading + 1])
    assert " of 7 sequences, " in told[loading + 2]


def test_progress_goes_to_stderr(run: Run) -> None:
    assert "reading the checkpoint: " in run.outcome.stderr
    assert "importing weights: " in run.outcome.stderr
    assert "7 of 7 sequences, 42 tokens" in run.outcome.stderr
    assert "error" not in run.outcome.stderr.lower()


def test_completions_are_those_of_transformers_in_input_order(run: Run) -> None:
    path = run.folder / "job.completions.jsonl"
    assert token_ids(path) == reference_tokens(run.checkpoint, PROMPTS, max_new_tokens=6)
    assert [line["custom_id"] for line in completions(path)] == [f"line-{n + 1}" for n in range(len(PROMPTS))]


def test_a_completion_has_the_promised_keys(run: Run) -> None:
    for prompt, line in zip(PROMPTS, completions(run.folder / "job.completions.jsonl"), strict=True):
        assert list(line) == ["custom_id", "text", "token_ids", "finish_reason", "usage"]
        assert line["text"] is None, "the checkpoint has no tokenizer"
        assert line["finish_reason"] == "length"
        assert line["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 6}


def test_the_metrics_have_the_promised_keys_and_agree_with_each_other(run: Run) -> None:
    metrics = run.json("m.json")
    assert set(metrics) >= {
        "prompt_tokens",
        "generated_tokens",
        "prefill_s",
        "decode_s",
        "tokens_per_s",
        "decode_tokens_per_s",
        "policy",
        "tiers",
        "lanes",
        "bound_by",
        "predicted_tokens_per_s",
        "predicted_tokens_per_s_as_ended",
    }
    assert (metrics["prompt_tokens"], metrics["generated_tokens"]) == (sum(map(len, PROMPTS)), 6 * len(PROMPTS))
    seconds = metrics["prefill_s"] + metrics["decode_s"]
    assert metrics["tokens_per_s"] == pytest.approx(metrics["generated_tokens"] / seconds)
    assert metrics["decode_tokens_per_s"] == pytest.approx(5 * len(PROMPTS) / metrics["decode_s"])
    assert set(metrics["tiers"]) == {"device", "host", "disk"}
    for tier in metrics["tiers"].values():
        assert 0 < tier["peak_bytes"] <= tier["budget_bytes"]
    assert metrics["bound_by"] == max(metrics["lanes"], key=lambda lane: metrics["lanes"][lane]["busy_s"])
    for lane, use in metrics["lanes"].items():
        assert set(use) == {"busy_s", "flops" if lane == "compute" else "bytes"}


def test_the_trace_is_chrome_events_of_every_busy_lane(run: Run) -> None:
    events, metrics = run.json("t.json")["traceEvents"], run.json("m.json")
    moved: dict[str, int] = defaultdict(int)
    for event in events:
        assert event["ph"] == "X"
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert event["pid"] in {"device", "host", "disk"}
        moved[event["tid"].split(" ")[0]] += event["args"]["bytes"]
    busy = {lane for lane, use in metrics["lanes"].items() if use["busy_s"]}
    assert busy == set(moved)
    assert {lane: moved[lane] for lane in busy - {"compute"}} == {
        lane: metrics["lanes"][lane]["bytes"] for lane in busy - {"compute"}
    }


def test_the_policy_of_the_metrics_is_what_fixed_takes(run: Run, command: CommandLine, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, run.checkpoint, PROMPTS)
    policy = run.json("m.json")["policy"]
    settings = [f"--set=scheduler.{key}={json.dumps(value)}" for key, value in policy.items()]
    outcome = command("run", recipe, "--dry-run", "--json", "--set", "scheduler.plugin=fixed", *settings)
    assert json.loads(outcome.stdout)["policy"] == policy


def test_json_alone_is_on_stdout(run: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", run.checkpoint, PROMPTS[:2])
    outcome = ended(start(RUN, recipe, "--json", "--output", "out.jsonl", cwd=tmp_path))
    assert outcome.status == 0, outcome.stderr
    assert json.loads(outcome.stdout)["generated_tokens"] == 12
    assert len(completions(tmp_path / "out.jsonl")) == 2


def test_a_dry_run_shows_the_memory_table_and_touches_nothing(run: Run, command: CommandLine, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", run.checkpoint, PROMPTS)
    before = sorted(tmp_path.rglob("*"))
    outcome = command("run", recipe, "--dry-run")
    assert "weight store: " in outcome.stdout
    assert outcome.status == 0
    assert "kv_cache" in outcome.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_the_dry_run_s_table_is_what_the_run_takes(run: Run, command: CommandLine, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, run.checkpoint, PROMPTS)
    planned = json.loads(command("run", recipe, "--dry-run", "--json").stdout)["memory"]
    tiers = run.json("m.json")["tiers"]
    assert {name: tier["peak_bytes"] for name, tier in planned.items()} == {
        name: tier["peak_bytes"] for name, tier in tiers.items()
    }


def test_set_changes_the_recipe_and_the_name_names_the_output(run: Run, command: CommandLine, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, run.checkpoint, PROMPTS)
    outcome = command("run", recipe, "--set", "name=other", "--set", "workload.max_new_tokens=2")
    assert outcome.status == 0, outcome.stderr
    expected = reference_tokens(run.checkpoint, PROMPTS, max_new_tokens=2)
    assert token_ids(Path("other.completions.jsonl")) == expected


def test_eos_ends_a_sequence_and_is_not_among_its_tokens(run: Run, command: CommandLine, tmp_path: Path) -> None:
    generated = reference_tokens(run.checkpoint, PROMPTS, max_new_tokens=6)
    eos = generated[0][3]
    checkpoint = save_opt(tmp_path / "checkpoint", eos_token_id=eos)
    recipe = write_recipe(tmp_path, checkpoint, PROMPTS)
    assert command("run", recipe).status == 0
    lines = completions(Path("job.completions.jsonl"))
    assert lines[0]["token_ids"] == list(generated[0][: generated[0].index(eos)])
    assert lines[0]["usage"]["completion_tokens"] == len(lines[0]["token_ids"])
    reasons = ["stop" if eos in ids else "length" for ids in generated.values()]
    assert [line["finish_reason"] for line in lines] == reasons
    assert not any(eos in line["token_ids"] for line in lines)


def test_eos_is_a_token_like_any_other_when_it_is_ignored(run: Run, command: CommandLine, tmp_path: Path) -> None:
    generated = reference_tokens(run.checkpoint, PROMPTS, max_new_tokens=6)
    checkpoint = save_opt(tmp_path / "checkpoint", eos_token_id=generated[0][3])
    recipe = write_recipe(tmp_path, checkpoint, PROMPTS, ignore_eos=True)
    assert command("run", recipe).status == 0
    assert token_ids(Path("job.completions.jsonl")) == generated


def test_a_sequence_may_end_with_its_first_token(run: Run, command: CommandLine, tmp_path: Path) -> None:
    eos = reference_tokens(run.checkpoint, PROMPTS[:1], max_new_tokens=1)[0][0]
    checkpoint = save_opt(tmp_path / "checkpoint", eos_token_id=eos)
    recipe = write_recipe(tmp_path, checkpoint, PROMPTS[:1])
    assert command("run", recipe, "--metrics", "m.json").status == 0
    (line,) = completions(Path("job.completions.jsonl"))
    assert (line["token_ids"], line["finish_reason"]) == ([], "stop")
    assert json.loads(Path("m.json").read_text())["generated_tokens"] == 0


def test_text_goes_in_and_comes_out_where_there_is_a_tokenizer(run: Run, command: CommandLine, tmp_path: Path) -> None:
    """`expected` is compared with the text, white space around it aside; a line without it does not count."""
    generated = reference_tokens(run.checkpoint, [(5, 9, 11), (12, 13)], max_new_tokens=6)
    texts = [" ".join(f"w{token}" for token in ids) for ids in generated.values()]
    checkpoint = save_opt(tmp_path / "checkpoint")
    save_tokenizer(checkpoint)
    recipe = write_recipe(tmp_path, checkpoint, [])
    write_prompts(
        tmp_path,
        [
            {"custom_id": "right", "prompt": "w5 w9 w11", "expected": f" {texts[0]}\n"},
            {"custom_id": "wrong", "prompt": "w12 w13", "expected": "something else"},
            {"custom_id": "unknown", "prompt_token_ids": [5, 9, 11]},
        ],
    )
    outcome = command("run", recipe, "--metrics", "m.json")
    assert outcome.status == 0, outcome.stderr
    lines = completions(Path("job.completions.jsonl"))
    assert [(line["custom_id"], line["text"]) for line in lines] == [
        ("right", texts[0]),
        ("wrong", texts[1]),
        ("unknown", texts[0]),
    ]
    assert json.loads(Path("m.json").read_text())["exact_match"] == {"matched": 1, "total": 2}
    assert "exact match: 1 of 2 (50.0 %)" in outcome.stdout


def test_the_weights_are_imported_once_whatever_the_checkpoint_s_path(command: CommandLine, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_opt(tmp_path / "checkpoint"), PROMPTS[:2])
    assert "importing" in command("run", recipe).stderr
    first = token_ids(Path("job.completions.jsonl"))
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    again = command("run", recipe, "--set", f"model.checkpoint={tmp_path / 'moved'}")
    assert (again.status, "importing" in again.stderr) == (0, False)
    assert token_ids(Path("job.completions.jsonl")) == first


def test_a_disk_tier_s_scratch_is_gone_and_its_weights_stay(command: CommandLine, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_opt(tmp_path / "checkpoint"), PROMPTS[:2])
    assert command("run", recipe).status == 0
    assert not any((tmp_path / "disk" / "runs").iterdir())
    assert any((tmp_path / "disk" / "weights").iterdir())


def test_synthetic_weights_of_a_published_shape_run_end_to_end(command: CommandLine, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "synthetic:opt-125m", [])
    outcome = command(
        "run",
        recipe,
        *("--set", "model.dtype=bfloat16"),
        *("--set", "workload={synthetic: {count: 2, prompt_tokens: 4}, max_new_tokens: 2}"),
        *("--set", "tiers.device.budget=512MiB"),
        *("--set", "tiers.host.budget=512MiB"),
        *("--set", "tiers.disk.budget=512MiB"),
    )
    assert outcome.status == 0, outcome.stderr
    lines = completions(Path("job.completions.jsonl"))
    assert [line["custom_id"] for line in lines] == ["synthetic-1", "synthetic-2"]
    assert [len(line["token_ids"]) for line in lines] == [2, 2]
    assert all(0 <= token < 50272 for line in lines for token in line["token_ids"])
