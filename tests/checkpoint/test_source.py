"""What a reference may name: hub ids and made-up checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch

from checkpoint.checkpoints import CONFIG, FC1, TABLE, opened, tensors, write_safetensors
from flexflow_engine.abc.model import ModelConfig
from flexflow_engine.checkpoint.prompts import open_prompts
from flexflow_engine.checkpoint.source import open_checkpoint
from flexflow_engine.errors import CheckpointError, ProblemsError
from flexflow_engine.jobs.recipe import Generate, Workload
from flexflow_plugins.models.opt import OPTModel


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cache_model(hub_cache: Path, hub_id: str) -> Path:
    """Put the tiny checkpoint into the cache, laid out as the hub's client does."""
    repository = hub_cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = write_safetensors(repository / "snapshots" / ("0" * 40), tensors())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_a_cached_hub_checkpoint_is_used_offline(hub_cache: Path) -> None:
    snapshot = cache_model(hub_cache, "some/model")
    (snapshot / "tokenizer.json").write_text("{}")
    checkpoint = opened("some/model")
    assert checkpoint.config == CONFIG
    assert checkpoint.tensor_names() == set(tensors())
    assert checkpoint.tokenizer_folder == snapshot


def test_the_ends_of_a_generation_config_count_before_those_of_the_config(hub_cache: Path, tmp_path: Path) -> None:
    folders = {"some/model": cache_model(hub_cache, "some/model"), str(tmp_path / "a"): tmp_path / "a"}
    write_safetensors(tmp_path / "a", tensors())
    for reference, folder in folders.items():
        assert opened(reference).model.config.eos_token_ids == (2,)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
        assert opened(reference).model.config.eos_token_ids == (5, 7)
        (folder / "generation_config.json").write_text(json.dumps({"max_length": 20}))
        assert opened(reference).model.config.eos_token_ids == (2,)
        (folder / "generation_config.json").write_text("[")
        with pytest.raises(CheckpointError, match=r"generation_config\.json: can't be read as JSON"):
            opened(reference)


def test_a_cache_that_may_lack_the_generation_config_is_completed_first(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, asked = cache_model(hub_cache, "some/model"), list[str]()

    def refuse(hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.append(hub_id)
        raise ConnectionError("no route to the hub")

    def give(hub_id: str, *, allow_patterns: list[str]) -> str:
        (snapshot / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert opened("some/model").model.config.eos_token_ids == (2,)
    assert asked == ["some/model"]
    known_to_lack = snapshot.parents[1] / ".no_exist" / snapshot.name / "generation_config.json"
    known_to_lack.parent.mkdir(parents=True)
    known_to_lack.touch()
    assert opened("some/model").model.config.eos_token_ids == (2,)
    known_to_lack.unlink()
    assert asked == ["some/model"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert opened("some/model").model.config.eos_token_ids == (5, 7)


def test_a_hub_checkpoint_is_fetched_when_the_cache_has_its_weights(hub_cache: Path) -> None:
    assert not opened("facebook/opt-30b").is_fetched
    snapshot = cache_model(hub_cache, "facebook/opt-30b")
    assert opened("facebook/opt-30b").is_fetched
    (snapshot / "model.safetensors").unlink()
    index = {"weight_map": {FC1: "model-00001-of-00001.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not opened("facebook/opt-30b").is_fetched


def test_a_published_models_config_is_known_without_the_hub(hub_cache: Path) -> None:
    checkpoint = opened("facebook/OPT-30b")
    assert checkpoint.config["num_hidden_layers"] == 48


def test_why_the_hub_gave_no_tokenizer_is_told_to_who_needs_one(hub_cache: Path, tmp_path: Path) -> None:
    checkpoint, path = opened("facebook/OPT-30b"), tmp_path / "prompts.jsonl"
    path.write_text('{"prompt_token_ids": [5]}\n')
    folder, tokenizer, prompts = open_prompts(checkpoint, workload(path))
    assert (folder, tokenizer, [prompt.token_ids for prompt in prompts]) == (None, None, [(5,)])
    path.write_text('{"prompt": "town"}\n')
    with pytest.raises(ProblemsError) as caught:
        open_prompts(checkpoint, workload(path))
    line, hub = map(str, caught.value.problems)
    assert "line 1: the checkpoint has no tokenizer for a text prompt" in line
    assert hub.startswith("facebook/OPT-30b: not in the Hugging Face cache, and the hub could not be reached")


def workload(prompts: Path) -> Workload:
    return Workload(prompts=prompts, task=Generate(max_new_tokens=4, ignore_eos=False))


def test_a_cached_config_goes_before_the_published_one(hub_cache: Path) -> None:
    cache_model(hub_cache, "facebook/opt-30b")
    assert opened("facebook/opt-30b").config == CONFIG


@pytest.mark.usefixtures("hub_cache")
def test_weights_that_are_neither_cached_nor_reachable_are_told_quickly() -> None:
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"facebook/opt-30b: not in the Hugging Face cache.*folder"):
        opened("facebook/opt-30b").tensor_names()
    assert time.monotonic() - started < 15


@pytest.mark.usefixtures("hub_cache")
def test_a_folder_in_the_working_directory_does_not_stand_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "facebook" / "opt-125m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert opened("facebook/opt-125m").model.config.hidden_size == 768


@pytest.mark.usefixtures("hub_cache")
def test_an_unknown_hub_checkpoint_is_told_when_it_is_opened() -> None:
    with pytest.raises(CheckpointError, match="some/model"):
        opened("some/model")


@pytest.mark.parametrize(("where", "place"), [("", ""), ("config.json", "config.json: ")])
def test_what_a_model_has_against_a_config_is_told_with_the_checkpoint(tmp_path: Path, where: str, place: str) -> None:
    class Refusing(OPTModel):
        @classmethod
        def read_config(cls, config: Mapping[str, Any]) -> ModelConfig:
            raise CheckpointError("no layers", where=where)

    folder = write_safetensors(tmp_path / "a", tensors())
    with pytest.raises(CheckpointError) as caught:
        _ = open_checkpoint(str(folder), Refusing, dtype="float32").model
    assert str(caught.value) == f"{folder}: {place}no layers"


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("reference", ["nowhere", "./a/b", "/no/such/folder", "a/b/c", "a b/c", ""])
def test_what_names_nothing_says_what_can_be_named(reference: str) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint.*existing folder, a hub id"):
        opened(reference or "''")


def test_a_made_up_checkpoint_has_the_published_shapes() -> None:
    checkpoint = opened("synthetic:opt-125m")
    assert checkpoint.shape(TABLE) == (50272, 768)
    assert checkpoint.tensor_names() == {spec.name for spec in checkpoint.model.tensors()}
    assert checkpoint.tokenizer_folder is None


def test_a_near_miss_of_a_made_up_checkpoint_is_suggested() -> None:
    with pytest.raises(CheckpointError, match="did you mean synthetic:opt-125m"):
        opened("synthetic:opt-125")


def test_made_up_rows_do_not_depend_on_how_they_are_asked_for() -> None:
    checkpoint, again = opened("synthetic:opt-125m"), opened("synthetic:opt-125m")
    whole = checkpoint.read_rows(TABLE, 0, 5000)
    assert torch.equal(again.read_rows(TABLE, 4000, 5000), whole[4000:])
    assert torch.equal(again.read_rows(TABLE, 1364, 1367), whole[1364:1367])
    assert not torch.equal(whole[:100], whole[100:200])
    assert again.read_rows(TABLE, 50270, 50272).shape == (2, 768)


def test_made_up_weights_keep_activations_in_range() -> None:
    checkpoint = opened("synthetic:opt-125m")
    fc1 = checkpoint.read_rows(FC1, 0, 3072)
    assert abs(float(fc1.mean())) < 1e-3
    assert float(fc1.std()) == pytest.approx(0.02, rel=0.01)
    norm = checkpoint.read_rows("model.decoder.layers.3.final_layer_norm.weight", 0, 768)
    assert torch.equal(norm, torch.ones(768))
    bias = checkpoint.read_rows("model.decoder.layers.3.fc1.bias", 0, 3072)
    assert 0 < float(bias.std()) < 0.03


def test_the_key_follows_content_and_not_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = write_safetensors(tmp_path / "a", tensors())
    second = write_safetensors(tmp_path / "b", tensors())
    (second / "README.md").write_text("not part of the model")
    assert opened(first).content_key() == opened(second).content_key()
    write_safetensors(second, {name: tensor + 1 for name, tensor in tensors().items()})
    assert opened(first).content_key() != opened(second).content_key()
    (first / "config.json").write_text(json.dumps(CONFIG | {"bos_token_id": 5}))
    assert opened(first).content_key() != opened(write_safetensors(tmp_path / "c", tensors())).content_key()


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_safetensors(tmp_path / "a", tensors())

    def bytes_read() -> list[int]:
        seen: list[int] = []
        opened(folder).content_key(lambda done, total: seen.append(done))
        return seen

    first_key = opened(folder).content_key()
    assert bytes_read() == []
    digests = tmp_path / "cache" / "flexflow_engine" / "digests.json"
    for broken in (b"{", b"[]", b'{"x": 3}', b"\xff"):
        digests.write_bytes(broken)
        assert bytes_read()
        assert opened(folder).content_key() == first_key
    (folder / "model.safetensors").touch()
    assert bytes_read()
