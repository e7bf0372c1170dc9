"""What is wrong with a recipe is told all at once: what, where, and what would work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flexflow_engine.errors import ProblemsError
from flexflow_engine.jobs.load import load_recipe
from flexflow_engine.plugins import Registry

RECIPE: dict[str, Any] = {
    "name": "small",
    "model": {"plugin": "opt", "checkpoint": "synthetic:opt-125m", "dtype": "float32"},
    "tiers": {
        "device": {"plugin": "cpu", "budget": "64MiB"},
        "disk": {"plugin": "zarr", "budget": "1GiB", "path": "scratch"},
    },
    "scheduler": {
        "plugin": "fixed",
        "gpu_batch_size": 4,
        "num_gpu_batches": 2,
        "weights": {"device": 100},
        "kv_cache": {"device": 100},
        "activations": {"device": 100},
    },
    "workload": {"synthetic": {"count": 8, "prompt_tokens": 16}, "max_new_tokens": 4},
}


CHAIN = "a0: &a0 x\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}]\n" for n in range(1500))
"""Each value is a list of the one before: no line is nested, and the last value is, 1500 times."""


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


def problems_of(path: Path, registry: Registry, *overrides: str) -> list[str]:
    with pytest.raises(ProblemsError) as caught:
        load_recipe(path, overrides, registry)
    return [str(problem).replace(str(path), "FILE") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("modle.plugin=opt", "modle: unknown key `modle`; did you mean `model`?"),
        ("model.chekpoint=x", "model.chekpoint: unknown key `chekpoint`; did you mean `checkpoint`?"),
        ("workload.synthetic.counts=3", "workload.synthetic.counts: unknown key `counts`; did you mean `count`?"),
        ("tiers.disk.paht=x", "tiers.disk.paht: unknown key `paht`; did you mean `path`?"),
        ("tiers.disk.buget=1", "tiers.disk.buget: unknown key `buget`; did you mean `budget`?"),
        (
            "codecs.weights=numcodecs:zst",
            "codecs.weights: unknown codec plugin 'numcodecs:zst'; did you mean `numcodecs:zstd`?; known: group-int4, "
            "group-int8, none, numcodecs:blosc, numcodecs:lz4, numcodecs:zstd",
        ),
        (
            "codecs.weights={plugin: numcodecs:blosc, levle: 3, clevel: 3}",
            "codecs.weights.levle: unknown key `levle`; did you mean `clevel`?",
        ),
        (
            "codecs.weights={plugin: numcodecs:blosc, clevel: 10}",
            "codecs.weights: clevel is 10; choose one from 1 to 9",
        ),
        (
            "codecs.kv_cache={plugin: group-int4, group_size: 63}",
            "FILE: codecs.kv_cache: group_size is 63, and groups are of an even number of values; choose one from 2",
        ),
        (
            "codecs.kv_cache=numcodecs:zstd",
            "codecs.kv_cache: numcodecs:zstd compresses the files of a weight store, and pages of a cache are "
            "rewritten while the job runs; choose one of group-int4, group-int8, none",
        ),
        ("scheduler.weight={}", "scheduler.weight: unknown key `weight`; did you mean `weights`?"),
        ("tiers.device.budget=15G", "tiers.device.budget: '15G' is not a size; did you mean 15GiB?"),
        ("tiers.device.budget=0", "tiers.device.budget: a size must be more than 0, not 0"),
        ("model.dtype=half", "did you mean `float16`?"),
        ("model.dtype=bf16", "did you mean `bfloat16`?"),
        ("model.dtype=int8", "model.dtype: should be 'float32', 'float16' or 'bfloat16', not \"int8\""),
        ("model.plugin=otp", "model.plugin: unknown model plugin 'otp'; did you mean `opt`?"),
        ("tiers.device.plugin=cpus", "tiers.device.plugin: unknown tier plugin 'cpus'; did you mean `cpu`?"),
        ("scheduler.plugin=best", "scheduler.plugin: unknown scheduler plugin 'best'; known: "),
        ("codecs.kv_cache=group-int3", "codecs.kv_cache: unknown codec plugin 'group-int3'; "),
        ("tiers.device.plugin=zarr", "the first tier is where the model computes, and the zarr tier can't; begin with"),
        ("scheduler.weights={device: 90}", "scheduler: the shares of `weights` add up to 90 and not to 100"),
        ("scheduler.weights={devise: 100}", "share on `devise`, which is no tier of the recipe; did you mean `device`"),
        ("scheduler.weights={device: -5, disk: 105}", "scheduler: `weights.device` must be a percentage, not -5"),
        ("scheduler.weights={device: x}", 'scheduler.weights.device: should be a valid number, not "x"'),
        ("scheduler.weights=[100]", "scheduler.weights: should be a mapping, not [100]"),
        ("scheduler.weights={device: .nan}", "scheduler: `weights.device` must be a percentage, not nan"),
        ("scheduler.gpu_batch_size=0", "scheduler: `gpu_batch_size` must be more than 0, not 0"),
        ("scheduler.gpu_batch_size=true", "scheduler.gpu_batch_size: should be a valid integer, not true"),
        ("scheduler.attention=hots", "scheduler.attention: should be 'device', 'host' or 'auto', not \"hots\""),
        ("workload.max_new_tokens=0", "workload.max_new_tokens: should be greater than 0, not 0"),
        ("workload.synthetic.count=-1", "workload.synthetic.count: should be greater than 0, not -1"),
        ("workload.prompts=p.jsonl", "workload: both `prompts` and `synthetic` are given; give exactly one"),
        ("workload.synthetic=", "workload: neither `prompts` nor `synthetic` is given; give exactly one"),
        ("workload={prompts: p.jsonl, max_new_tokens: 1}", "workload.prompts: there is no file"),
        ("workload={prompts: {path: p}, max_new_tokens: 1}", "workload.prompts: should be a valid string"),
        ("workload={synthetic: {count: 8, prompt_tokens: 16}}", "workload.max_new_tokens: `max_new_tokens` is missing"),
        ("workload.task=scores", "workload.task: should be 'generate' or 'score', not \"scores\""),
        (
            "workload.task=score",
            "workload.task: synthetic prompts have no completions to score; give a file of `prompts`",
        ),
        ("workload.task=score", "workload.max_new_tokens: a job that scores generates nothing; leave it out"),
        ("workload={task: score, prompts: p, ignore_eos: false}", "workload.ignore_eos: a job that scores generates"),
        ("model.checkpoint=./missing", "model.checkpoint: there is no folder"),
        ("model.checkpoint=gpt2", "model.checkpoint: there is no folder"),
        ("model.checkpoint=a/b/missing", "model.checkpoint: there is no folder"),
        ("name=../up", "name: '../up' can't be a name; letters, digits, `.`, `_` and `-` can"),
        ("tiers={a b: {plugin: cpu, budget: 1}}", "tiers.a b: 'a b' can't be a tier's name"),
        ("tiers={}", "tiers: should have at least 1 key, not {}"),
        ("tiers.disk=5", "tiers.disk: should be a mapping, not 5"),
        ("tiers.disk={plugin: zarr, budget: 1GiB}", "tiers.disk.path: `path` is missing"),
        ("tiers.disk.path=3", "tiers.disk.path: should be a valid string, not 3"),
        ("model=", "model: should be a mapping, not null"),
        ("nothing", "--set nothing: not of the form dotted.path=value; try tiers.gpu.budget=8GiB"),
        ("a..b=1", "--set a..b=1: not of the form dotted.path=value"),
        ("name=[1", "--set name=[1, line 1: not valid YAML"),
        ("name.first=x", "--set name.first=x: `name` holds a value and no keys"),
    ],
)
def test_one_wrong_thing_is_named_with_its_place(path: Path, registry: Registry, override: str, problem: str) -> None:
    assert any(problem in found for found in problems_of(path, registry, override))


@pytest.mark.parametrize("key", ["name", "model", "tiers", "scheduler", "workload"])
def test_a_missing_section_is_named(path: Path, registry: Registry, key: str) -> None:
    path.write_text(yaml.safe_dump({other: value for other, value in RECIPE.items() if other != key}))
    assert f"FILE: {key}: `{key}` is missing" in problems_of(path, registry)


def test_without_tiers_nothing_is_said_of_shares(path: Path, registry: Registry) -> None:
    scheduler = {**RECIPE["scheduler"], "attention": "host"}
    path.write_text(yaml.safe_dump({**RECIPE, "tiers": {}, "scheduler": scheduler}))
    assert problems_of(path, registry) == ["FILE: tiers: should have at least 1 key, not {}"]


def test_all_problems_are_told_together(path: Path, registry: Registry) -> None:
    found = problems_of(
        path,
        registry,
        "nonsense",
        "modell=1",
        "tiers.disk.budget=big",
        "tiers.disk.paths=x",
        "model.plugin=unknown",
        "scheduler.kv_cache={device: 1}",
        "workload.max_new_tokens=none",
    )
    assert len(found) == 7


def test_a_plugins_own_problems_are_told_although_the_rest_does_not_validate(path: Path, registry: Registry) -> None:
    found = problems_of(path, registry, "workload=", "scheduler.weights={device: 1}")
    assert any(problem.startswith("FILE: scheduler: the shares") for problem in found)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: [", "FILE, line 1: not valid YAML"),
        ("name: a\nname: b\n", "FILE, line 2: not valid YAML: the key `name` is given twice"),
        ("tiers:\n  a: {}\n  a: {}\n", "FILE, line 3: not valid YAML: the key `a` is given twice"),
        ("- a\n", "FILE: a recipe is a mapping of keys"),
        ("", "FILE: a recipe is a mapping of keys"),
        ("a: !!python/object:os.system {}", "FILE, line 1: not valid YAML: could not determine a constructor"),
        ("a: !!set {b}", "FILE, line 1: not valid YAML: values of the type set have no place here"),
        ("? [a, b]\n: c\n", "FILE, line 1: not valid YAML: a key must be a text"),
        ("a: &a [*a]", "FILE: an alias refers to what it is part of"),
        (CHAIN, "FILE: it is nested too deeply"),
    ],
)
def test_a_file_that_is_no_recipe_says_the_line(path: Path, registry: Registry, text: str, problem: str) -> None:
    path.write_text(text)
    (found,) = problems_of(path, registry)
    assert found.startswith(problem)


def test_a_missing_or_unreadable_file_is_named(path: Path, registry: Registry, tmp_path: Path) -> None:
    path.write_bytes(b"name: \xff\n")
    assert problems_of(path, registry) == ["FILE: the recipe can't be read (it is not UTF-8)"]
    missing = tmp_path / "missing.yaml"
    assert problems_of(missing, registry) == ["FILE: the recipe can't be read (No such file or directory)"]


def test_dates_are_texts(path: Path, registry: Registry) -> None:
    assert load_recipe(path, ["name=2024-01-01"], registry).name == "2024-01-01"
