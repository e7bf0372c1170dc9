"""Log-probabilities of given tokens equal those of transformers' logits; the job's perplexity follows from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import OPTForCausalLM

from commands import CommandLine, completions, save_tokenizer, write_prompts, write_recipe
from flexflow_engine.abc.policy import Policy
from flexflow_engine.runtime.executor import DataflowExecutor, SequentialExecutor
from flexflow_plugins.codecs.group_quant import GroupInt8Codec
from harness import JobResult, policy, random_prompts, run_job, save_opt, three_tiers
from layouts import DEVICE_FAR_DISK, DEVICE_HOST_DISK, ISLAND_HOST_DISK, disk_setups, policies
from watched import random_delays, with_run

Scores = Mapping[int, Sequence[float]]

PROMPTS = [*random_prompts(10, seed=3), (7,)]
COMPLETIONS = [(11,), *random_prompts(10, seed=4, longest=18)]
"""From 1 to 18 tokens, so that rows of a batch end at different steps."""
HARDWARE = Path(__file__).parents[2] / "recipes" / "hardware" / "t4_gcp.yaml"
TOLERANCE = 2e-4
"""Of a log-probability, absolute. Logits here go up to 100, and float32 in another order of summing differs by 1e-5."""
SPREAD = {"device": 30.0, "host": 30.0, "disk": 40.0}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "tied head": {},
    "untied head": {"tie_word_embeddings": False},
    "untied head, projected": {"tie_word_embeddings": False, "word_embed_proj_dim": 32},
    "a head in several parts": {"ffn_dim": 16, "vocab_size": 307},
}


def reference_logprobs(folder: Path) -> Scores:
    """log_softmax of transformers' float32 logits, at each completion's tokens."""
    model = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for index, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        found[index] = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()
    return found


class Checkpoints:
    """Small checkpoints with what transformers makes of COMPLETIONS; each made once."""

    def __init__(self, root: Path) -> None:
        self._made: dict[str, tuple[Path, Scores]] = {}
        self._root, self.store = root, root / "store"

    def __getitem__(self, name: str) -> tuple[Path, Scores]:
        if name not in self._made:
            folder = save_opt(self._root / str(len(self._made)), **CONFIGS[name])
            self._made[name] = folder, reference_logprobs(folder)
        return self._made[name]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("scoring"))


def assert_scored(result: JobResult, expected: Scores, *, count: int = len(COMPLETIONS)) -> None:
    assert result.tokens == dict(enumerate(COMPLETIONS[:count]))
    assert {finished.finish_reason for finished in result.sequences.values()} == {"length"}
    for index, logprobs in result.logprobs.items():
        assert logprobs == pytest.approx(expected[index], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "gpu_batch_size", "num_gpu_batches"),
    [*((name, 4, 2) for name in CONFIGS), ("tied head", 1, 1), ("tied head", 11, 1), ("a head in several parts", 3, 5)],
)
def test_log_probabilities_are_those_of_transformers(
    checkpoints: Checkpoints, tmp_path: Path, name: str, gpu_batch_size: int, num_gpu_batches: int
) -> None:
    folder, expected = checkpoints[name]
    tiers = three_tiers(tmp_path)
    chosen = policy(
        tiers,
        gpu_batch_size=gpu_batch_size,
        num_gpu_batches=num_gpu_batches,
        weights=SPREAD,
        kv_cache=SPREAD,
        activations=SPREAD,
    )
    result = run_job(folder, tiers, chosen, PROMPTS, store=checkpoints.store, completions=COMPLETIONS)
    assert_scored(result, expected)
    heads = [layer for layer in result.layout.weights.layers if layer.spec.kind == "head"]
    assert len(heads) == (2 if name == "a head in several parts" else 1)


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_policy_on_any_tiers_scores_alike(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Within the tolerance whatever the policy; and lanes that are late change no bit."""
    classes = data.draw(st.sampled_from([DEVICE_HOST_DISK, DEVICE_FAR_DISK, ISLAND_HOST_DISK]), label="tiers")
    chosen: Policy = data.draw(policies(classes), label="policy")
    folder, expected = checkpoints["tied head"]
    tiers = disk_setups(classes, tmp_path_factory.getbasetemp() / "disk")
    late = with_run(DataflowExecutor, random_delays(data.draw(st.integers(0, 2**32), label="delays")))
    first = 5
    sequential, dataflow = (
        run_job(
            folder,
            tiers,
            chosen,
            PROMPTS[:first],
            store=checkpoints.store,
            completions=COMPLETIONS[:first],
            executor=executor,
        )
        for executor in (SequentialExecutor, late)
    )
    assert_scored(sequential, expected, count=first)
    assert dataflow.logprobs == sequential.logprobs


def test_an_encoded_cache_is_in_the_numbers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Completions are fed token by token, over the cache as it is stored: that is what they are scored for."""
    folder, expected = checkpoints["tied head"]
    tiers = three_tiers(tmp_path)
    result = run_job(
        folder,
        tiers,
        policy(tiers, kv_cache=SPREAD),
        PROMPTS,
        store=checkpoints.store,
        completions=COMPLETIONS,
        kv_codec=GroupInt8Codec(),
    )
    differences = [abs(a - b) for n, found in result.logprobs.items() for a, b in zip(found, expected[n], strict=True)]
    assert 10 * TOLERANCE < max(differences) < 5.0
    first = [abs(result.logprobs[n][0] - expected[n][0]) for n in expected]
    assert max(first) <= TOLERANCE, "a prompt attends to its own exact keys and values"


def test_a_recipe_scores_text_and_reports_its_perplexity(command: CommandLine, tmp_path: Path) -> None:
    checkpoint = save_opt(tmp_path / "checkpoint")
    save_tokenizer(checkpoint)
    recipe = write_recipe(tmp_path, checkpoint, [])
    lines = [
        {"prompt": " ".join(f"w{token}" for token in prompt), "completion": " ".join(f"w{token}" for token in given)}
        for prompt, given in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    write_prompts(tmp_path, [*lines[:-1], {"prompt_token_ids": PROMPTS[-1], "completion_token_ids": COMPLETIONS[-1]}])
    changes = ("--set", "workload={task: score, prompts: prompts.jsonl}")
    outcome = command("run", recipe, *changes, "--metrics", "m.json")
    assert outcome.status == 0, outcome.stderr
    expected, written = reference_logprobs(checkpoint), completions(Path("job.completions.jsonl"))
    for index, line in enumerate(written):
        assert line["token_ids"] == list(COMPLETIONS[index])
        assert line["token_logprobs"] == pytest.approx(expected[index], abs=TOLERANCE)
        assert line["usage"] == {"prompt_tokens": len(PROMPTS[index]), "completion_tokens": len(COMPLETIONS[index])}
    assert written[0]["text"] == "w11"
    every = [logprob for found in expected.values() for logprob in found]
    metrics = json.loads(Path("m.json").read_text())
    assert metrics["scored_tokens"] == len(every)
    assert metrics["perplexity"] == pytest.approx(math.exp(-sum(every) / len(every)), rel=TOLERANCE)
    plan = command("plan", recipe, *changes, "--json", "--hardware", HARDWARE)
    assert json.loads(plan.stdout)["generated_tokens"] == metrics["generated_tokens"] == len(every)
    assert f"perplexity: {metrics['perplexity']:.4f} over {len(every)} tokens" in outcome.stdout


def test_a_line_without_a_completion_ends_a_job_that_scores(command: CommandLine, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_opt(tmp_path / "checkpoint"), PROMPTS[:1])
    outcome = command("run", recipe, "--set", "workload={task: score, prompts: prompts.jsonl}")
    outcome.assert_user_error()
    assert "line 1: the line has no completion to score" in outcome.stderr
