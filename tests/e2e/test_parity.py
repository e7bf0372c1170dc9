"""In float32 the tokens equal transformers' greedy tokens one for one; in 16 bits the logits are as good as theirs."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import OPTForCausalLM

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.model import LayerWeights
from flexflow_engine.abc.policy import Policy
from flexflow_engine.abc.tier import Tier
from flexflow_engine.graph.task import Compute
from flexflow_engine.placement import kv
from flexflow_engine.runtime.trace import Trace
from flexflow_plugins.models.opt import OPTModel
from harness import policy, random_prompts, reference_tokens, run_job, save_opt, three_tiers
from layouts import (
    DEVICE_FAR_DISK,
    DEVICE_HOST_DISK,
    ISLAND_HOST_DISK,
    TIERS,
    disk_setups,
    policies,
)

Expected = Mapping[int, tuple[int, ...]]

PROMPTS = [*random_prompts(10, seed=3), (7,)]
"""Eleven, from 1 to 40 tokens: one more than two batches of five, three more than two of four."""
MAX_NEW_TOKENS = 9
SPREAD = {"device": 30.0, "host": 30.0, "disk": 40.0}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "pre-norm": {},
    "post-norm, projected, as 350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "pre-norm, projected": {"word_embed_proj_dim": 32},
    "untied head": {"tie_word_embeddings": False},
    "untied head, projected": {"tie_word_embeddings": False, "word_embed_proj_dim": 32},
    "no biases": {"enable_bias": False},
    "norms without weights": {"layer_norm_elementwise_affine": False},
    "no final norm": {"_remove_final_layer_norm": True},
    "gelu": {"activation_function": "gelu"},
    "one layer, one head": {"num_hidden_layers": 1, "num_attention_heads": 1},
    "a vocabulary that no page divides": {"vocab_size": 307},
}


def as_saved(folder: Path) -> None:
    """One model.safetensors, as `save_pretrained` leaves it."""


def old_spelling(folder: Path) -> None:
    """The published checkpoints' names begin with `decoder.`."""
    save_file(_renamed(folder), folder / "model.safetensors")


def sharded(folder: Path) -> None:
    OPTForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="150KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def torch_file(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def torch_file_with_old_spelling(folder: Path) -> None:
    torch.save(_renamed(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded_torch_files(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: f"pytorch_model-{index % 3 + 1:05}-of-00003.bin" for index, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name, where in weight_map.items() if where == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


FORMATS = (as_saved, old_spelling, sharded, torch_file, torch_file_with_old_spelling, sharded_torch_files)


class Checkpoints:
    """Small checkpoints and what transformers makes of PROMPTS with them; each made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, tuple[Path, Expected]] = {}

    def __getitem__(self, name: str) -> tuple[Path, Expected]:
        if name not in self._made:
            folder = save_opt(self._root / str(len(self._made)), **CONFIGS[name])
            self._made[name] = folder, reference_tokens(folder, PROMPTS, max_new_tokens=MAX_NEW_TOKENS)
        return self._made[name]

    @property
    def store(self) -> Path:
        return self._root / "store"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shape_of_network(checkpoints: Checkpoints, tmp_path: Path, name: str) -> None:
    folder, expected = checkpoints[name]
    assert len(set(expected.values())) == len(expected), "prompts that end alike would hide a mix-up"
    tiers = three_tiers(tmp_path)
    chosen = policy(tiers, weights=SPREAD, kv_cache=SPREAD, activations=SPREAD)
    result = run_job(folder, tiers, chosen, PROMPTS, store=checkpoints.store, max_new_tokens=MAX_NEW_TOKENS)
    assert result.tokens == expected
    assert {ended.finish_reason for ended in result.sequences.values()} == {"length"}


@pytest.mark.parametrize("rewrite", FORMATS, ids=lambda rewrite: rewrite.__name__)
def test_every_format_of_checkpoint(checkpoints: Checkpoints, tmp_path: Path, rewrite: Callable[[Path], None]) -> None:
    name = "post-norm, projected, as 350m"
    _, expected = checkpoints[name]
    folder = save_opt(tmp_path / "checkpoint", **CONFIGS[name])
    rewrite(folder)
    tiers = three_tiers(tmp_path)
    chosen = policy(tiers, weights=SPREAD, kv_cache=SPREAD, activations=SPREAD)
    result = run_job(folder, tiers, chosen, PROMPTS, store=tmp_path / "store", max_new_tokens=MAX_NEW_TOKENS)
    assert result.tokens == expected


@pytest.mark.parametrize("classes", [DEVICE_HOST_DISK, DEVICE_FAR_DISK, ISLAND_HOST_DISK], ids=list)
@pytest.mark.parametrize("percent", [0.0, 4.0, 20.0, 50.0, 96.0, 100.0])
def test_any_share_of_every_class_on_any_tier(
    checkpoints: Checkpoints, tmp_path: Path, classes: Mapping[str, type[Tier]], percent: float
) -> None:
    """The share of a class lies on each of the tiers in turn, and its rest on the next; no two classes lie alike."""
    folder, expected = checkpoints["pre-norm"]
    names = deque(classes)
    for _ in classes:
        tiers = disk_setups(classes, tmp_path / "disk")
        shares = [{names[n]: percent, names[n - 1]: 100.0 - percent} for n in range(3)]
        chosen = policy(tiers, gpu_batch_size=3, weights=shares[0], kv_cache=shares[1], activations=shares[2])
        result = run_job(folder, tiers, chosen, PROMPTS, store=checkpoints.store, max_new_tokens=MAX_NEW_TOKENS)
        assert result.tokens == expected, shares
        names.rotate()


@pytest.mark.parametrize(
    ("gpu_batch_size", "num_gpu_batches"), [(1, 1), (1, 4), (4, 1), (5, 2), (3, 5), (11, 1), (20, 3)]
)
@pytest.mark.parametrize("kv_page_tokens", [1, 16])
def test_any_block_of_gpu_batches(
    checkpoints: Checkpoints, tmp_path: Path, gpu_batch_size: int, num_gpu_batches: int, kv_page_tokens: int
) -> None:
    """More prompts than a block holds, last batches that are not full, and batches that nobody is in."""
    folder, expected = checkpoints["post-norm, projected, as 350m"]
    tiers = three_tiers(tmp_path)
    chosen = policy(
        tiers,
        gpu_batch_size=gpu_batch_size,
        num_gpu_batches=num_gpu_batches,
        weights=SPREAD,
        kv_cache=SPREAD,
        activations=SPREAD,
        kv_page_tokens=kv_page_tokens,
    )
    result = run_job(folder, tiers, chosen, PROMPTS, store=checkpoints.store, max_new_tokens=MAX_NEW_TOKENS)
    assert result.tokens == expected


@pytest.mark.parametrize("classes", [DEVICE_HOST_DISK, ISLAND_HOST_DISK], ids=list)
def test_a_cache_that_is_cut_between_rows_only(
    checkpoints: Checkpoints, tmp_path: Path, classes: Mapping[str, type[Tier]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in large GPU batches."""
    monkeypatch.setattr(kv, "WHOLE_ROWS", 1)
    folder, expected = checkpoints["pre-norm"]
    tiers = disk_setups(classes, tmp_path / "disk")
    shares = dict(zip(classes, (30.0, 30.0, 40.0), strict=True))
    chosen = policy(tiers, gpu_batch_size=4, num_gpu_batches=3, weights=shares, kv_cache=shares, kv_page_tokens=1)
    result = run_job(folder, tiers, chosen, PROMPTS, store=checkpoints.store, max_new_tokens=MAX_NEW_TOKENS)
    assert result.tokens == expected


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_policy_on_any_tiers(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    classes = data.draw(st.sampled_from(TIERS), label="tiers")
    chosen: Policy = data.draw(policies(classes), label="policy")
    name = data.draw(st.sampled_from(["pre-norm", "post-norm, projected, as 350m", "untied head"]), label="checkpoint")
    max_new_tokens = data.draw(st.integers(1, MAX_NEW_TOKENS), label="max_new_tokens")
    folder, tokens = checkpoints[name]
    tiers = disk_setups(classes, tmp_path_factory.getbasetemp() / "disk")
    result = run_job(folder, tiers, chosen, PROMPTS, store=checkpoints.store, max_new_tokens=max_new_tokens)
    assert result.tokens == {index: ids[:max_new_tokens] for index, ids in tokens.items()}


@pytest.mark.parametrize("classes", [DEVICE_HOST_DISK, ISLAND_HOST_DISK], ids=list)
def test_one_new_token_each(checkpoints: Checkpoints, tmp_path: Path, classes: Mapping[str, type[Tier]]) -> None:
    """No step decodes: every GPU batch prefills, and takes new prompts in the next step."""
    folder, tokens = checkpoints["pre-norm"]
    tiers = disk_setups(classes, tmp_path / "disk")
    shares = dict(zip(tiers, SPREAD.values(), strict=True))
    chosen = policy(tiers, gpu_batch_size=2, weights=shares, kv_cache=shares, activations=shares)
    result = run_job(folder, tiers, chosen, PROMPTS, store=checkpoints.store, max_new_tokens=1)
    assert result.tokens == {index: ids[:1] for index, ids in tokens.items()}
    assert _phases(result.trace) == [{"prefill"}] * 3


def test_prompts_of_one_token_only(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder, _ = checkpoints["pre-norm"]
    prompts = [(token,) for token in (7, 150, 299)]
    tiers = three_tiers(tmp_path)
    chosen = policy(tiers, gpu_batch_size=2, num_gpu_batches=1, weights=SPREAD, kv_cache=SPREAD, activations=SPREAD)
    result = run_job(folder, tiers, chosen, prompts, store=checkpoints.store, max_new_tokens=MAX_NEW_TOKENS)
    assert result.tokens == reference_tokens(folder, prompts, max_new_tokens=MAX_NEW_TOKENS)


@pytest.mark.parametrize("classes", [DEVICE_HOST_DISK, DEVICE_FAR_DISK, ISLAND_HOST_DISK], ids=list)
@pytest.mark.parametrize("gpu_batch_size", [1, 2])
def test_sequences_that_end_at_eos_give_their_rows_to_others(
    checkpoints: Checkpoints, tmp_path: Path, classes: Mapping[str, type[Tier]], gpu_batch_size: int
) -> None:
    """EOS is a token that greedy decoding meets at several places, so that some batches prefill while others decode."""
    folder, tokens = checkpoints["pre-norm"]
    eos = _token_that_ends_most(tokens)
    expected = reference_tokens(folder, PROMPTS, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos)
    assert len({len(ids) for ids in expected.values()}) >= 3
    tiers = disk_setups(classes, tmp_path / "disk")
    shares = dict(zip(tiers, SPREAD.values(), strict=True))
    chosen = policy(tiers, gpu_batch_size=gpu_batch_size, weights=shares, kv_cache=shares, activations=shares)
    result = run_job(
        folder,
        tiers,
        chosen,
        PROMPTS,
        store=checkpoints.store,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_ids=(eos,),
    )
    assert result.tokens == expected
    reasons = {index: ended.finish_reason for index, ended in result.sequences.items()}
    assert reasons == {index: "stop" if eos in ids else "length" for index, ids in tokens.items()}
    assert {"prefill", "decode"} in _phases(result.trace)


class RecordingOPT(OPTModel):
    """OPT that keeps the logits of every step; the head may come in parts of the vocabulary."""

    steps: ClassVar[list[list[torch.Tensor]]] = []

    def final(self, weights: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        self.steps.append([])
        return super().final(weights, hidden)

    def logits(self, weights: LayerWeights, features: torch.Tensor) -> torch.Tensor:
        part = super().logits(weights, features)
        self.steps[-1].append(part.float().clone())
        return part


LARGEST_ERROR_RATIO = 1.5
"""The engine's largest error in multiples of transformers', which rounds as often, in another order: on processors that
multiply in different ways the largest differs by half, and one logit that is wrong is some ten times further off.
"""
ERROR_RATIO = 1.25
"""The engine's root-mean-square error in multiples of transformers'. Both round every operation, in another order."""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm, projected, as 350m"])
def test_16_bit_logits_are_as_good_as_those_of_transformers(
    checkpoints: Checkpoints, tmp_path: Path, name: str, dtype: DType
) -> None:
    """Tokens would be no sound measure: rounding decides between close logits. So every step's logits are compared
    with a forward pass of transformers, in the same format, over the tokens that the engine chose; and both with the
    same 16-bit weights computed in float32.
    """
    folder, _ = checkpoints[name]
    prompts = sorted(set(PROMPTS), key=len, reverse=True)  # the order of admission is that of the rows
    tiers = three_tiers(tmp_path)
    chosen = policy(
        tiers, gpu_batch_size=len(prompts), num_gpu_batches=1, weights=SPREAD, kv_cache=SPREAD, activations=SPREAD
    )
    RecordingOPT.steps.clear()
    result = run_job(
        folder,
        tiers,
        chosen,
        prompts,
        store=checkpoints.store,
        max_new_tokens=MAX_NEW_TOKENS,
        dtype=dtype,
        model_class=RecordingOPT,
    )
    assert len(RecordingOPT.steps) == MAX_NEW_TOKENS
    ours = torch.stack([torch.cat(parts, dim=-1) for parts in RecordingOPT.steps], dim=1)  # [prompts, steps, vocab]
    sequences = [(*prompt, *result.tokens[index]) for index, prompt in enumerate(prompts)]
    theirs, exact = (_reference_logits(folder, dtype, sequences, computed_in) for computed_in in (dtype, "float32"))
    assert (ours - exact).abs().max() <= LARGEST_ERROR_RATIO * (theirs - exact).abs().max()
    assert 0 < (ours - exact).square().mean().sqrt() <= ERROR_RATIO * (theirs - exact).square().mean().sqrt()


def _reference_logits(
    folder: Path, stored_in: DType, sequences: Sequence[Sequence[int]], computed_in: str
) -> torch.Tensor:
    """Logits float32 [sequences, MAX_NEW_TOKENS, vocabulary] that transformers has for each sequence's last tokens."""
    model = OPTForCausalLM.from_pretrained(folder, dtype=getattr(torch, stored_in)).eval()
    model = model.to(getattr(torch, computed_in))
    with torch.inference_mode():
        logits = [model(torch.tensor([sequence])).logits[0, -1 - MAX_NEW_TOKENS : -1] for sequence in sequences]
    return torch.stack(logits).float()


def _token_that_ends_most(tokens: Expected) -> int:
    """The token whose first places in the sequences differ most, without ending all of them."""

    def places(token: int) -> set[int]:
        return {ids.index(token) for ids in tokens.values() if token in ids}

    candidates = {token for ids in tokens.values() for token in ids}
    return max(sorted(candidates), key=lambda token: len(places(token)))


def _phases(trace: Trace) -> list[set[str]]:
    """What each step does: prefill, decode or both."""
    computed = sorted(
        (event.task.tile.step, event.task.operation.batch.phase)
        for event in trace.events
        if isinstance(event.task.operation, Compute)
    )
    return [{phase for _, phase in steps} for _, steps in groupby(computed, key=lambda item: item[0])]


def _renamed(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
