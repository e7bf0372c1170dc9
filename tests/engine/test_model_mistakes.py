"""A model's mistakes: each is told in its name, when the model is opened or where the engine takes a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexflow_engine.declared.models import open_model
from flexflow_engine.errors import PluginError, TaskError
from flexflow_plugins.models.opt import OPTModel
from harness import policy, random_prompts, run_job, save_opt, three_tiers

CONFIG = OPTModel.published()["facebook/opt-125m"]
TABLE = "model.decoder.embed_tokens.weight"

Change = Callable[[Any], Any]


def erring(function: str, change: Change) -> type[OPTModel]:
    """A model, one function of which gives what `change` makes of the right thing."""
    right: Any = getattr(OPTModel, function)

    def wrong(self: OPTModel, *args: Any) -> Any:
        return change(right(self, *args))

    read = classmethod(lambda cls, config: change(right(config)))
    return type("Erring", (OPTModel,), {"name": "erring", function: read if function == "read_config" else wrong})


def first(**changes: object) -> Change:
    """The same with another first item."""
    return lambda items: (replace(items[0], **changes), *items[1:])


def last(**changes: object) -> Change:
    return lambda items: (*items[:-1], replace(items[-1], **changes))


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        ("read_config", lambda config: None, "`read_config` of the model erring gave None and no ModelConfig"),
        ("read_config", lambda config: replace(config, num_heads=4.0), "`num_heads` of its config must be a whole"),
        ("read_config", lambda config: replace(config, num_layers=0), "must be a whole number, at least 1, and is 0"),
        ("read_config", lambda config: replace(config, num_kv_heads=8), "must be a multiple of its 8 `num_kv_heads`"),
        ("tensors", lambda tensors: None, "`tensors` must give a tuple of TensorSpecs, and gave None"),
        ("tensors", lambda tensors: (*tensors, tensors[3]), "there are 2 tensors called model.decoder."),
        ("tensors", first(role="tabel"), f"the role of {TABLE} must be one of matrix, table, small, and is 'tabel'"),
        ("tensors", first(shape=(5,)), f"{TABLE} is a table and must have rows and columns, not (5,)"),
        ("tensors", first(shape=(5, 4.0)), "must have rows and columns, not (5, 4.0)"),
        ("tensors", last(shape=()), "is a small and must have a shape, not ()"),
        ("layers", lambda layers: [*layers, None], "`layers` must give a tuple of LayerSpecs"),
        ("layers", lambda layers: layers[:-1], "its layers must be an embed, 12 decoders, a final and a head"),
        ("layers", lambda layers: (*layers, replace(layers[-1], name="2")), "its layers must be an embed, 12 decoders"),
        ("layers", lambda layers: (*layers, layers[-1]), "there are 2 layers called "),
        ("layers", last(kind="haed"), "a final and a head, and are embed, decoder"),
        ("layers", last(matrices={"head": "mars"}), "has mars in `matrices`, which is none of its tensors"),
        ("layers", last(matrices={}), "the head must have one matrix, called `head`, and has none"),
        ("layers", last(matrices={"out": TABLE}), "the head must have one matrix, called `head`, and has out"),
        ("layers", first(small={"rows": TABLE}), f"has {TABLE} in `small`, whose role is table"),
        ("layers", first(table=None), "the embed layer and no other must have a table"),
        (
            "tensors",
            first(shape=(50271, 768)),
            f"the table {TABLE} must have a row for each of 50272 token ids, not 50271",
        ),
        (
            "tensors",
            first(shape=(50273, 768)),
            f"the head {TABLE} must have one row for each of 50272 token ids, not 5",
        ),
        ("workspace_nbytes", lambda nbytes: -1, "`workspace_nbytes` of embed for 1 tokens must be a whole number"),
        ("workspace_nbytes", lambda nbytes: nbytes * 1.0, "must be a whole number, at least 0, and is "),
        ("workspace_nbytes", lambda nbytes: None, "must be a whole number, at least 0, and is None"),
    ],
)
def test_what_a_model_declares_is_checked_when_it_is_opened(function: str, change: Change, message: str) -> None:
    with pytest.raises(PluginError) as raised:
        open_model(erring(function, change), CONFIG, "float32")
    assert message in str(raised.value)
    assert "erring" in str(raised.value)


@pytest.mark.parametrize("attention", ["device", "host"])
@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        ("embed", lambda hidden: hidden.double(), "embed of erring gave float64 ["),
        ("embed", lambda hidden: hidden[:, :-1], ", 63], and float32 ["),
        ("embed", lambda hidden: None, "embed of erring gave None, and float32 ["),
        ("attention_inputs", lambda inputs: inputs[:2], "gave 2 results, and 3 tensors are needed"),
        ("attention_inputs", lambda inputs: [x.flatten(1) for x in inputs], "attention_inputs of erring gave float32"),
        ("attention_inputs", lambda inputs: [x.double() for x in inputs], "attention_inputs of erring gave float64"),
        ("attention_inputs", lambda inputs: (inputs[0], inputs[1][:, :1], inputs[2]), ", 1, 16], and float32"),
        ("final", lambda features: features[:1], "final of erring gave float32 [1, 64], and float32 [2, 64]"),
        ("final", lambda features: features.double(), "final of erring gave float64 [2, 64]"),
        ("logits", lambda logits: logits[:, :-1], "logits of erring gave float32 [2, "),
        ("logits", lambda logits: logits.double(), "logits of erring gave float64 [2, "),
    ],
)
def test_results_of_another_shape_or_dtype_end_a_run(
    tmp_path: Path, *, function: str, change: Change, message: str, attention: Any
) -> None:
    tiers = three_tiers(tmp_path)
    chosen = policy(tiers, num_gpu_batches=1, kv_cache={"host": 100.0}, attention=attention)
    prompts = random_prompts(2, longest=5)
    model_class = erring(function, change)
    with pytest.raises(TaskError) as raised:
        run_job(save_opt(tmp_path / "opt"), tiers, chosen, prompts, store=tmp_path, model_class=model_class)
    assert isinstance(raised.value.__cause__, PluginError)
    assert message in str(raised.value.__cause__)
