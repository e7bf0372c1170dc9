"""A recipe file and `--set` become a Recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flexflow_engine.abc.codec import NoCodecOptions
from flexflow_engine.abc.sizes import format_size, parse_size, rounded_down, rounded_up
from flexflow_engine.jobs.load import load_recipe
from flexflow_engine.jobs.recipe import CodecRecipe, CodecsRecipe, Generate, Recipe, Score, SyntheticPrompts, Workload
from flexflow_engine.jobs.schema import recipe_schema
from flexflow_engine.plugins import Registry

RECIPE = """
name: small
model: {plugin: opt, checkpoint: synthetic:opt-125m, dtype: float32}
tiers:
  device: {plugin: cpu, budget: 64MiB}
  host: {plugin: pinned, budget: 1.5GB}
  disk: {plugin: zarr, budget: 4096, path: scratch}
scheduler:
  plugin: fixed
  gpu_batch_size: 4
  num_gpu_batches: 2
  weights: {device: 20, host: 80}
  kv_cache: {host: 100}
  activations: {host: 33.5, disk: 66.5}
workload:
  synthetic: {count: 8, prompt_tokens: 16}
  max_new_tokens: 4
"""


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def load(path: Path, registry: Registry, *overrides: str) -> Recipe:
    return load_recipe(path, overrides, registry)


def test_a_recipe_is_read_whole(path: Path, registry: Registry) -> None:
    recipe = load(path, registry)
    assert (recipe.name, recipe.model.plugin, recipe.model.dtype) == ("small", "opt", "float32")
    assert recipe.model.checkpoint == "synthetic:opt-125m"
    assert [(tier.name, tier.plugin, tier.budget_bytes) for tier in recipe.tiers] == [
        ("device", "cpu", 64 * 2**20),
        ("host", "pinned", 1_500_000_000),
        ("disk", "zarr", 4096),
    ]
    assert recipe.scheduler.options.weights == {"device": 20.0, "host": 80.0}
    plain = CodecRecipe(plugin="none", options=NoCodecOptions())
    assert recipe.codecs == CodecsRecipe(weights=plain, kv_cache=plain)
    assert recipe.workload.prompts == SyntheticPrompts(count=8, prompt_tokens=16)


def test_synthetic_prompts_imply_ignoring_eos(path: Path, registry: Registry) -> None:
    assert load(path, registry).workload.task == Generate(max_new_tokens=4, ignore_eos=True)


def test_synthetic_prompts_may_stand_under_prompts(path: Path, registry: Registry) -> None:
    plain = load(path, registry)
    nested = "workload={prompts: {synthetic: {count: 8, prompt_tokens: 16}}, max_new_tokens: 4}"
    assert load(path, registry, nested) == plain


def test_a_prompt_file_and_a_local_checkpoint_lie_beside_the_recipe(path: Path, registry: Registry) -> None:
    (path.parent / "data").mkdir()
    (path.parent / "data" / "p.jsonl").write_text("")
    (path.parent / "weights").mkdir()
    recipe = load(path, registry, "workload={prompts: data/p.jsonl, max_new_tokens: 4}", "model.checkpoint=weights")
    assert recipe.workload.prompts == path.parent / "data" / "p.jsonl"
    assert recipe.model.checkpoint == str(path.parent / "weights")
    assert recipe.workload.task == Generate(max_new_tokens=4, ignore_eos=False)


def test_a_job_that_scores_needs_no_number_of_tokens(path: Path, registry: Registry) -> None:
    (path.parent / "p.jsonl").write_text("")
    recipe = load(path, registry, "workload={task: score, prompts: p.jsonl}")
    assert recipe.workload == Workload(prompts=path.parent / "p.jsonl", task=Score())


def test_a_hub_id_stays_what_it_is(path: Path, registry: Registry) -> None:
    assert load(path, registry, "model.checkpoint=facebook/opt-30b").model.checkpoint == "facebook/opt-30b"


def test_a_tiers_path_is_relative_to_the_working_directory(
    path: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load(path, registry).tiers[2].options.path == elsewhere / "scratch"


def test_a_tiers_path_may_begin_with_the_home_folder(
    path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert load(path, registry, "tiers.disk.path=~/tier").tiers[2].options.path == Path("/somewhere/tier")


def test_set_changes_values_and_makes_missing_maps(path: Path, registry: Registry) -> None:
    recipe = load(path, registry, "tiers.device.budget=1GiB", "codecs.weights=none", "scheduler.weights={disk: 100}")
    assert recipe.tiers[0].budget_bytes == 2**30
    assert recipe.scheduler.options.weights == {"disk": 100.0}


def test_set_changes_nothing_that_an_alias_shares_with_what_it_names(path: Path, registry: Registry) -> None:
    shared = RECIPE.replace("{device: 20, host: 80}", "&shares {device: 20, host: 80}")
    path.write_text(shared.replace("kv_cache: {host: 100}", "kv_cache: *shares"))
    options = load(path, registry, "scheduler.weights.device=0", "scheduler.weights.disk=20").scheduler.options
    assert options.weights == {"device": 0.0, "host": 80.0, "disk": 20.0}
    assert options.kv_cache == {"device": 20.0, "host": 80.0}


def test_a_codec_that_is_given_by_its_name_takes_keys(tmp_path: Path, registry: Registry) -> None:
    path = tmp_path / "named.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(RECIPE), "codecs": {"weights": "none"}}, sort_keys=False))
    weights = load(path, registry, "codecs.weights.plugin=group-int8", "codecs.weights.group_size=32").codecs.weights
    assert (weights.plugin, weights.options.group_size) == ("group-int8", 32)


def test_set_can_add_a_tier(path: Path, registry: Registry) -> None:
    recipe = load(path, registry, "tiers.spare.plugin=cpu", "tiers.spare.budget=1MiB")
    assert [tier.name for tier in recipe.tiers] == ["device", "host", "disk", "spare"]


def test_setting_another_scheduler_drops_the_keys_of_the_one_before(tmp_path: Path, registry: Registry) -> None:
    path = tmp_path / "lp.yaml"
    document = yaml.safe_load(RECIPE)
    fixed = document["scheduler"]
    document["scheduler"] = {"plugin": "lp", "patience_s": 60}
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    sets = [f"scheduler.{key}={value}" for key, value in fixed.items()]
    for overrides in (sets, sets[::-1]):
        assert load(path, registry, *overrides).scheduler.options.gpu_batch_size == 4


def test_setting_the_same_scheduler_keeps_its_keys(path: Path, registry: Registry) -> None:
    assert load(path, registry, "scheduler.plugin=fixed").scheduler == load(path, registry).scheduler


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("15GiB", 15 * 2**30),
        ("512 MiB", 2**29),
        ("1.5GB", 1_500_000_000),
        (4096, 4096),
        ("4096", 4096),
        ("0.1KiB", 102),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text: object, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("15G", "did you mean 15GiB"),
        ("15gib", "did you mean 15GiB"),
        ("lots", "write 15GiB"),
        ("-1", "write 15GiB"),
        (0, "more than 0"),
        (True, "not a size"),
        (1.5, "not a size"),
        (None, "not a size"),
    ],
)
def test_what_is_no_size_says_what_would_be_one(text: object, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        parse_size(text)


@given(nbytes=st.integers(1, 2**50))
def test_a_size_in_a_message_can_be_pasted_and_is_near_on_the_safe_side(nbytes: int) -> None:
    needed, there = parse_size(rounded_up(nbytes)), parse_size(rounded_down(nbytes))
    assert there <= nbytes <= needed
    assert needed - there <= nbytes / 16


def test_sizes_are_shown_in_binary_units() -> None:
    assert [format_size(n) for n in (0, 1023, 1024, 1.5 * 2**30)] == ["0 B", "1023 B", "1.0 KiB", "1.5 GiB"]


def test_the_schema_knows_every_key_of_a_recipe() -> None:
    schema = recipe_schema()
    assert set(schema["properties"]) == {"name", "model", "tiers", "codecs", "scheduler", "workload"}
    assert schema["additionalProperties"] is False
