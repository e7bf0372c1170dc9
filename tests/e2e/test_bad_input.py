"""What a user can get wrong: exit status 2, one message that says what, where and what would work, no output file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from commands import CommandLine, Outcome, completions, save_tokenizer, token_ids, write_prompts, write_recipe
from flexflow_engine.abc.sizes import parse_size
from flexflow_engine.cli.hardware import HARDWARE_VARIABLE
from harness import random_prompts, reference_tokens, save_opt

PROMPTS = random_prompts(5, seed=1, longest=12)
LONG_NAME = "x" * 300
FC1 = "model.decoder.layers.1.fc1.weight"


class Job:
    """A recipe that works until a test spoils it; `refused` runs it and returns what stderr says."""

    def __init__(self, command: CommandLine, folder: Path) -> None:
        self._command = command
        self.folder = folder
        self.checkpoint = save_opt(folder / "checkpoint")
        self.recipe = write_recipe(folder, self.checkpoint, PROMPTS)

    def run(self, *settings: str) -> Outcome:
        return self._command("run", self.recipe, *(f"--set={setting}" for setting in settings))

    def refused(self, *settings: str) -> str:
        outcome = self.run(*settings)
        outcome.assert_user_error()
        assert not list(Path.cwd().iterdir()), "no output, and no `.partial` of nothing"
        return outcome.stderr

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        recipe = yaml.safe_load(self.recipe.read_text())
        change(recipe)
        self.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False))

    def write_lines(self, *lines: str) -> None:
        (self.folder / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def job(command: CommandLine, tmp_path: Path) -> Job:
    return Job(command, tmp_path / "job")


def test_the_unspoilt_job_runs(job: Job) -> None:
    assert job.run().status == 0
    assert token_ids(Path("job.completions.jsonl")) == reference_tokens(job.checkpoint, PROMPTS, max_new_tokens=6)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("modle.plugin=opt", "modle: unknown key `modle`; did you mean `model`?"),
        ("model.chekpoint=x", "model.chekpoint: unknown key `chekpoint`; did you mean `checkpoint`?"),
        ("tiers.disk.pth=/tmp", "tiers.disk.pth: unknown key `pth`; did you mean `path`?"),
        ("scheduler.gpu_batchsize=4", "unknown key `gpu_batchsize`; did you mean `gpu_batch_size`?"),
        ("workload.max_tokens=4", "unknown key `max_tokens`; did you mean `max_new_tokens`?"),
        ("tiers.device.plugin=gpu", "unknown tier plugin 'gpu'; did you mean `cpu`?; known: cpu, "),
        ("scheduler.plugin=fixd", "unknown scheduler plugin 'fixd'; did you mean `fixed`?; known: "),
        ("model.plugin=llama", "unknown model plugin 'llama'; known: "),
        ("codecs.weights=nun", "unknown codec plugin 'nun'; known: "),
        ("tiers.host.budget=8Gb", "tiers.host.budget: '8Gb' is not a size; did you mean 8GB?"),
        ("tiers.host.budget=lots", "tiers.host.budget: 'lots' is not a size; write 15GiB"),
        ("tiers.host.budget=-1", "tiers.host.budget: a size must be more than 0, not -1"),
        ("tiers.host.budget=1.5", "tiers.host.budget: 1.5 is not a size"),
        ("scheduler.weights={device: 20, host: 30}", "the shares of `weights` add up to 50 and not to 100"),
        ("scheduler.kv_cache={device: 50, gpu: 50}", "`kv_cache` has a share on `gpu`, which is no tier of the recipe"),
        ("scheduler.activations={device: 120, host: -20}", "`activations.host` must be a percentage, not -20"),
        ("scheduler.gpu_batch_size=0", "`gpu_batch_size` must be more than 0"),
        ("model.checkpoint=/nowhere/opt", "model.checkpoint: there is no folder /nowhere/opt"),
        ("model.checkpoint=synthetic:opt-9b", "synthetic:opt-9b"),
        ("workload.prompts=missing.jsonl", "workload.prompts: there is no file"),
        ("workload.max_new_tokens=0", "workload.max_new_tokens: "),
        ("model.dtype=fp16", "did you mean `float16`?"),
        ("name=a/b", "'a/b' can't be a name"),
    ],
)
def test_a_recipe_that_is_wrong_in_one_place(job: Job, setting: str, message: str) -> None:
    assert message in job.refused(setting)


def test_every_problem_of_a_recipe_is_told_at_once(job: Job) -> None:
    stderr = job.refused(
        "nam=x",
        "model.plugin=otp",
        "tiers.host.budget=8Gb",
        "scheduler.weights={device: 20}",
        "workload.prompts=missing.jsonl",
        "codecs.kv_cache=int5",
        "model.checkpoint=./nowhere",
    )
    expected = ("`nam`", "'otp'", "'8Gb'", "add up to 20", "missing.jsonl", "'int5'", "there is no folder")
    assert [part for part in expected if part not in stderr] == []
    assert stderr.count("error: ") == len(expected)


def test_what_needs_the_machine_and_the_files_is_told_at_once_too(job: Job) -> None:
    """Problems that only show behind a valid recipe: of tiers, of prompts."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand")
    job.write_lines("not json", '{"prompt_token_ids": [9999]}')
    stderr = job.refused("tiers.device.plugin=cuda", "tiers.disk.path=/dev/null/x")
    expected = ("tiers.device", "/dev/null", "line 1: not valid JSON", "line 2: token id 9999")
    assert [part for part in expected if part not in stderr] == []


def test_an_empty_recipe_and_none_at_all(job: Job) -> None:
    job.recipe.write_text("")
    assert "a recipe is a mapping of keys" in job.refused()
    job.recipe.unlink()
    assert "the recipe can't be read (No such file or directory)" in job.refused()


def test_broken_yaml_is_told_with_its_line(job: Job) -> None:
    job.recipe.write_text("name: x\nmodel: {plugin: opt\n")
    assert re.search(r"job\.yaml, line \d: not valid YAML", job.refused())


def test_a_checkpoint_without_config_or_weights(job: Job) -> None:
    (job.checkpoint / "model.safetensors").unlink()
    assert re.search(r"checkpoint.*model\.safetensors", job.refused())
    (job.checkpoint / "config.json").unlink()
    assert "there is no config.json" in job.refused()


def test_a_missing_tensor_is_named(job: Job) -> None:
    tensors = load_file(job.checkpoint / "model.safetensors")
    del tensors[FC1], tensors["model.decoder.layers.0.self_attn.k_proj.bias"]
    save_file(tensors, job.checkpoint / "model.safetensors")
    stderr = job.refused()
    assert f"the tensor {FC1} is missing" in stderr
    assert "the tensor model.decoder.layers.0.self_attn.k_proj.bias is missing" in stderr


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(job: Job) -> None:
    tensors = load_file(job.checkpoint / "model.safetensors")
    tensors[FC1] = tensors[FC1][:-1].contiguous()
    save_file(tensors, job.checkpoint / "model.safetensors")
    assert f"{FC1} has shape [255, 64], and the config asks for [256, 64]" in job.refused()


def test_a_cut_off_weight_file(job: Job) -> None:
    path = job.checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in job.refused()


def test_a_config_of_another_architecture(job: Job) -> None:
    path = job.checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))
    stderr = job.refused()
    assert "model plugin `opt` does not read model_type 'mamba'; it reads opt; `plugins` lists the model" in stderr


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", "64"),
        ("num_attention_heads", 5),
        ("num_hidden_layers", True),
        ("activation_function", "swish"),
        ("word_embed_proj_dim", "x"),
        ("do_layer_norm_before", "no"),
    ],
)
def test_a_config_that_makes_no_sense(job: Job, key: str, value: object) -> None:
    path = job.checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    stderr = job.refused()
    assert f"error: {job.checkpoint}: config.json" in stderr
    assert key in stderr or "heads" in stderr


@pytest.mark.parametrize(
    ("name", "place"),
    [("config.json", "{}: config.json"), ("generation_config.json", "{}/generation_config.json")],
)
def test_an_end_that_is_no_token_id(job: Job, name: str, place: str) -> None:
    (job.checkpoint / "generation_config.json").unlink()
    path = job.checkpoint / name
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | {"eos_token_id": "</s>"}))
    message = "eos_token_id is '</s>'; a token id or a list of them would do"
    assert f"error: {place.format(job.checkpoint)}: {message}\n" in job.refused()


def test_a_config_that_lacks_a_size_says_so(job: Job) -> None:
    path = job.checkpoint / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "hidden_size"}))
    assert f"error: {job.checkpoint}: config.json: hidden_size is missing; a positive integer" in job.refused()


@pytest.mark.parametrize("setting", ["scheduler.gpu_batch_size=1000000000", "scheduler.num_gpu_batches=100000000"])
def test_rows_that_no_prompt_needs_take_no_memory(job: Job, setting: str) -> None:
    """They were laid out one by one, until the machine had no memory left."""
    assert job.run(setting).status == 0
    assert token_ids(Path("job.completions.jsonl")) == reference_tokens(job.checkpoint, PROMPTS, max_new_tokens=6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("", "line 2: the line is blank"),
        ("[1, 2]", "line 2: a line is a JSON object"),
        ('{"promt": "x"}', "line 2: unknown key `promt`, did you mean `prompt`?"),
        ('{"custom_id": "a"}', "line 2: neither `prompt` nor `prompt_token_ids` given"),
        ('{"prompt": "x", "prompt_token_ids": [5]}', "line 2: both `prompt` and `prompt_token_ids` given"),
        ('{"prompt_token_ids": []}', "line 2: the prompt is empty"),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        ('{"prompt": "x"}', "line 2: the checkpoint has no tokenizer for a text prompt; give `prompt_token_ids`"),
        ('{"prompt_token_ids": [300]}', "line 2: token id 300 is out of the model's vocabulary; ids go from 0 to 299"),
        ('{"prompt_token_ids": [-1]}', "line 2: token id -1 is out of the model's vocabulary"),
        ('{"prompt_token_ids": [1.5]}', "line 2: `prompt_token_ids.0`"),
        ('{"prompt_token_ids": [true]}', "line 2: `prompt_token_ids.0`"),
        ('{"custom_id": "one", "prompt_token_ids": [5]}', "line 2: the custom_id 'one' is taken by line 1"),
        (
            json.dumps({"prompt_token_ids": [5] * 123}),
            "line 2: 123 prompt tokens and 6 new ones are more than the model's 128 positions; shorten the prompt to 1",
        ),
    ],
)
def test_a_prompt_line_is_told_by_its_number(job: Job, line: str, message: str) -> None:
    job.write_lines('{"custom_id": "one", "prompt_token_ids": [5, 6]}', line, '{"prompt_token_ids": [7]}')
    assert message in job.refused()


def test_the_longest_prompt_that_fits_runs(job: Job) -> None:
    job.write_lines(json.dumps({"prompt_token_ids": [5] * 122}))
    assert job.run().status == 0


def test_a_text_of_which_the_tokenizer_makes_nothing(job: Job) -> None:
    save_tokenizer(job.checkpoint)
    write_prompts(job.folder, [{"prompt": "w5"}, {"prompt": "   "}])
    assert "line 2: the prompt is empty" in job.refused()


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_empty_prompt_file(job: Job, content: str) -> None:
    (job.folder / "prompts.jsonl").write_text(content, encoding="utf-8")
    assert "prompts.jsonl: the prompt file is empty" in job.refused()


@pytest.mark.parametrize("path", ["/dev/null/x", "/proc/flexflow", "{folder}/prompts.jsonl"])
def test_a_disk_path_that_can_t_be_written(job: Job, path: str) -> None:
    named = path.format(folder=job.folder)
    assert named in job.refused(f"tiers.disk.path={named}")


def test_what_a_tier_lacks_is_told_with_its_name(job: Job) -> None:
    assert "tiers.disk: /dev/null/x" in job.refused("tiers.disk.path=/dev/null/x")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_cuda_is_asked_for_and_absent(job: Job) -> None:
    stderr = job.refused("tiers.device.plugin=cuda")
    assert "tiers.device" in stderr
    assert "cuda needs an NVIDIA GPU" in stderr
    assert "plugin: cpu" in stderr, "what would work"


POLICIES = {
    "spread": {},
    "all on the device": {
        "scheduler.weights": "{device: 100}",
        "scheduler.kv_cache": "{device: 100}",
        "scheduler.activations": "{device: 100}",
    },
    "nothing on the device": {
        "scheduler.weights": "{disk: 100}",
        "scheduler.kv_cache": "{host: 100}",
        "scheduler.activations": "{disk: 100}",
    },
    "long pages": {"scheduler.kv_page_tokens": "16"},
    "large batches": {"scheduler.gpu_batch_size": "5", "scheduler.num_gpu_batches": "1"},
    "long sequences": {"workload.max_new_tokens": "100"},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_does_not_fit_is_refused_with_the_smallest_budgets_that_would_do(job: Job, policy: str) -> None:
    """The named budgets are enough, and one KiB less on any of the tiers is not."""
    settings = [f"{key}={value}" for key, value in POLICIES[policy].items()]
    tiny = [f"tiers.{tier}.budget=1kB" for tier in ("device", "host", "disk")]
    stderr = job.refused(*settings, *tiny)
    assert re.search(r"device needs \d+[KM]iB \(the most for (\w+ [^,]*, ){2}[^,]*\) and has 1000B", stderr)
    named = dict(re.findall(r"(device|host|disk) (\d+[KM]?i?B)", stderr.partition("would do: ")[2]))
    budgets = {tier: parse_size(named.get(tier, "1kB")) for tier in ("device", "host", "disk")}
    for tier in named:
        short = budgets | {tier: budgets[tier] - 2**10}
        assert f"{tier} needs" in job.refused(*settings, *(f"tiers.{name}.budget={n}" for name, n in short.items()))
    outcome = job.run(*settings, *(f"tiers.{tier}.budget={n}" for tier, n in budgets.items()))
    assert outcome.status == 0, outcome.stderr
    assert len(completions(Path("job.completions.jsonl"))) == len(PROMPTS)


def test_what_does_not_fit_is_refused_before_any_weight_is_read(job: Job) -> None:
    (job.checkpoint / "model.safetensors").write_bytes(b"not one byte of this may matter")
    assert "the policy does not fit" in job.refused("tiers.device.budget=1kB")
    assert not (job.folder / "disk").exists()


def test_a_dry_run_shows_what_does_not_fit_and_exits_with_2(command: CommandLine, job: Job) -> None:
    outcome = command("run", job.recipe, "--dry-run", "--set", "tiers.host.budget=1kB")
    assert outcome.status == 2
    assert "too small" in outcome.stdout
    assert "the smallest budgets that would do: host" in outcome.stderr


@pytest.mark.parametrize(
    ("options", "file"),
    [
        (["--output", "{recipe}"], "{recipe}"),
        (["--output", "{prompts}"], "{prompts}"),
        (["--metrics", "{recipe}"], "{recipe}"),
        (["--trace", "{prompts}"], "{prompts}"),
        (["--output", "same", "--metrics", "./same"], "same"),
        (["--metrics", "same", "--trace", "same"], "same"),
        (["--metrics", "job.completions.jsonl"], "job.completions.jsonl"),
        (["--metrics", "job.completions.jsonl.partial"], "job.completions.jsonl.partial"),
        (["--metrics", "same", "--trace", "same.partial"], "same.partial"),
    ],
)
def test_no_file_is_written_over_another_of_the_same_run(
    command: CommandLine, job: Job, options: list[str], file: str
) -> None:
    names = {"recipe": str(job.recipe), "prompts": str(job.folder / "prompts.jsonl")}
    before = {name: Path(name).read_bytes() for name in names.values()}
    outcome = command("run", job.recipe, *(option.format(**names) for option in options))
    outcome.assert_user_error()
    assert file.format(**names) in outcome.stderr
    assert {name: Path(name).read_bytes() for name in names.values()} == before


def test_an_earlier_output_survives_a_refused_run(job: Job) -> None:
    output = Path("job.completions.jsonl")
    output.write_text("kept\n")
    assert job.run("tiers.device.budget=1kB").status == 2
    assert output.read_text() == "kept\n"


@pytest.mark.parametrize("output", [".", LONG_NAME, "missing/out.jsonl", "/dev/null", "/proc/out.jsonl"])
@pytest.mark.parametrize("option", ["--output", "--metrics", "--trace"])
def test_a_file_that_can_t_be_made_is_told_before_the_weights_are_read(
    command: CommandLine, job: Job, option: str, output: str
) -> None:
    outcome = command("run", job.recipe, option, output)
    outcome.assert_user_error()
    assert str(Path(output)) in outcome.stderr
    assert "importing" not in outcome.stderr


@pytest.mark.parametrize("output", [".", LONG_NAME, "missing/out.jsonl", "/dev/null"])
def test_an_output_that_has_no_place_is_told_before_the_machine_is_measured(
    command: CommandLine, job: Job, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(HARDWARE_VARIABLE)
    outcome = command("run", job.recipe, "--output", output)
    outcome.assert_user_error()
    assert outcome.stderr.startswith(f"error: {Path(output)}: ")
