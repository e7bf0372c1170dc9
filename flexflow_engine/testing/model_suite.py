"""What every model promises, as tests to inherit.

    class TestMyModel(ModelTests):
        model_class = MyModel

        def make_checkpoint(self, tmp_path):
            save_tiny_model(tmp_path)  # config.json and *.safetensors, as `save_pretrained` writes them
            return tmp_path

pytest collects the inherited tests under the subclass's name. The checkpoint gives the shape and is compared with the
manifest; weights are drawn at random and computed with in float32, so that a few layers of a small width will do.
That tokens equal those of a reference is not tested here: it is a question to the whole engine. For assertions that
show their values, put `pytest.register_assert_rewrite("flexflow_engine.testing")` at the top of your conftest.py.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import ClassVar, cast

import pytest
import torch
from safetensors import safe_open

from flexflow_engine.abc.dtypes import DTYPES, DType
from flexflow_engine.abc.model import LayerKind, LayerSpec, Model, TensorSpec
from flexflow_engine.errors import CheckpointError
from flexflow_engine.testing.layer_run import LayerRun

NUM_TOKENS = (1, 2, 7, 64)
"""Tokens that one call computes; a prompt's many and a step's few go through the same functions."""
WORKSPACE_TOKENS = (1, 64, 1500)
SIZE_IN_NAME = re.compile(r"(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", re.IGNORECASE)
"""`125m`, `1.3b`: how the published checkpoints say how many parameters they have."""
UNITS = {"m": 1e6, "b": 1e9}


class ModelTests:
    """Inherit it and define `model_class` and `make_checkpoint`."""

    model_class: ClassVar[type[Model]]

    def make_checkpoint(self, tmp_path: Path) -> Path:
        """A folder with config.json and *.safetensors of a small model; written under `tmp_path`."""
        raise NotImplementedError

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        return self.make_checkpoint(tmp_path)

    @pytest.fixture
    def model(self, checkpoint: Path) -> Model:
        return self._model(checkpoint, "float32")

    def test_tensor_and_layer_names_are_unique(self, model: Model) -> None:
        assert _repeated([spec.name for spec in model.tensors()]) == []
        assert _repeated([layer.name for layer in model.layers()]) == []

    def test_layers_run_from_embed_through_the_decoders_to_the_head(self, model: Model) -> None:
        kinds = [layer.kind for layer in model.layers()]
        assert kinds == ["embed", *["decoder"] * model.config.num_layers, "final", "head"]

    def test_layers_use_every_declared_tensor_and_no_other(self, model: Model) -> None:
        used = {name for layer in model.layers() for name in _tensor_names(layer)}
        assert used == {spec.name for spec in model.tensors()}

    def test_roles_fit_their_use(self, model: Model) -> None:
        specs = _by_name(model)
        for layer in model.layers():
            assert {specs[name].role for name in layer.matrices.values()} <= {"matrix", "table"}, layer.name
            assert {specs[name].role for name in layer.small.values()} <= {"small"}, layer.name
            assert layer.table is None or specs[layer.table].role == "table"
            assert (layer.table is not None) == (layer.kind == "embed")

    def test_matrices_and_tables_have_rows_and_columns(self, model: Model) -> None:
        flat = [spec.name for spec in model.tensors() if spec.role != "small" and len(spec.shape) != 2]
        assert flat == []
        assert all(size > 0 for spec in model.tensors() for size in spec.shape)

    def test_the_checkpoint_holds_every_tensor_in_its_shape(self, model: Model, checkpoint: Path) -> None:
        stored = _stored_shapes(checkpoint)
        for spec in model.tensors():
            names = model.spellings(spec.name)
            found = next((name for name in names if name in stored), None)
            assert found is not None, f"{spec.name} is in the checkpoint under none of {names}"
            assert stored[found] == spec.shape, found

    def test_published_checkpoints_have_about_the_parameters_that_their_names_say(self) -> None:
        for hub_id, config in self.model_class.published().items():
            model = self.model_class(self.model_class.read_config(config), "float16")
            assert model.config.model_type in self.model_class.model_types, hub_id
            counted = sum(prod(spec.shape) for spec in model.tensors())
            small = sum(prod(spec.shape) for spec in model.tensors() if spec.role == "small")
            assert small < counted / 10, f"{hub_id}: small parameters always lie on the compute tier"
            if size := SIZE_IN_NAME.search(hub_id):
                named = float(size[1]) * UNITS[size[2].lower()]
                assert counted == pytest.approx(named, rel=0.25), hub_id

    def test_a_config_without_its_keys_is_refused(self) -> None:
        with pytest.raises(CheckpointError):
            self.model_class.read_config({"model_type": self.model_class.model_types[0]})

    @pytest.mark.parametrize("num_tokens", NUM_TOKENS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_results_have_the_promised_shapes_and_dtypes(self, checkpoint: Path, dtype: DType, num_tokens: int) -> None:
        run = LayerRun(self._model(checkpoint, dtype))
        config, parameters = run.model.config, run.parameters
        with torch.inference_mode():
            hidden = run.embed(num_tokens)
            q, k, v = run.model.attention_inputs(run.weights("decoder"), hidden)
            run.model.attention_output(run.weights("decoder"), hidden, run.attended(num_tokens))
            features = run.model.final(run.weights("final"), hidden)
            logits = run.model.logits(run.weights("head"), features)
        assert hidden.shape == (num_tokens, config.hidden_size)
        assert q.shape == (num_tokens, config.num_heads, config.head_dim)
        assert k.shape == v.shape == (num_tokens, config.num_kv_heads, config.head_dim)
        assert logits.shape == (num_tokens, config.vocab_size)
        assert {x.dtype for x in (hidden, q, k, v, features, logits)} == {x.dtype for x in parameters.values()}

    def test_attention_inputs_leaves_hidden_as_it_was(self, model: Model) -> None:
        run = LayerRun(model)
        with torch.inference_mode():
            hidden = run.embed(7)
            before = hidden.clone()
            model.attention_inputs(run.weights("decoder"), hidden)
        assert torch.equal(hidden, before)

    def test_attention_output_changes_hidden_in_place(self, model: Model) -> None:
        run = LayerRun(model)
        with torch.inference_mode():
            hidden = run.embed(7)
            before = hidden.clone()
            model.attention_output(run.weights("decoder"), hidden, run.attended(7))
        assert not torch.equal(hidden, before)
        assert torch.isfinite(hidden).all()

    def test_a_row_of_a_batch_equals_the_row_alone(self, model: Model) -> None:
        run = LayerRun(model)
        with torch.inference_mode():
            together = run.through(slice(0, 7))
            for row in range(7):
                alone = run.through(slice(row, row + 1))
                for whole, part in zip(together, alone, strict=True):
                    torch.testing.assert_close(whole[row : row + 1], part, rtol=1e-4, atol=1e-5)

    def test_a_page_of_the_vocabulary_gives_its_part_of_the_logits(self, model: Model) -> None:
        run, half = LayerRun(model), model.config.vocab_size // 2
        with torch.inference_mode():
            features = model.final(run.weights("final"), run.embed(3))
            whole = model.logits(run.weights("head"), features)
            part = model.logits(run.weights("head", rows=half), features)
        assert part.shape == (3, half)
        torch.testing.assert_close(part, whole[:, :half], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("num_tokens", WORKSPACE_TOKENS)
    def test_workspace_bounds_what_the_functions_allocate(self, model: Model, num_tokens: int) -> None:
        taken = LayerRun(model).peak_nbytes(num_tokens)
        bounds = {kind: model.workspace_nbytes(cast(LayerKind, kind), num_tokens) for kind in taken}
        exceeded = {kind: (nbytes, bounds[kind]) for kind, nbytes in taken.items() if nbytes > bounds[kind]}
        assert exceeded == {}, "kind: (bytes allocated, bytes declared)"

    def _model(self, checkpoint: Path, dtype: DType) -> Model:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        return self.model_class(self.model_class.read_config(config), dtype)


def _by_name(model: Model) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in model.tensors()}


def _tensor_names(layer: LayerSpec) -> tuple[str, ...]:
    return (*layer.matrices.values(), *layer.small.values(), *((layer.table,) if layer.table else ()))


def _repeated(names: list[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def _stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    return shapes
