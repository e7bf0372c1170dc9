"""Models: that their tensors and layers are such as the engine can load and run, and what their functions give back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.model import LayerKind, LayerSpec, Model, ModelConfig, Role, TensorSpec
from flexflow_engine.errors import PluginError

SIZES = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "max_positions",
)
TOKENS = (1, 100)
"""For which workspaces are asked."""


def open_model(model_class: type[Model], config: Mapping[str, Any], dtype: DType) -> Model:
    """The model of a config.json. Raises PluginError, with the first mistake in what the plugin declares, and what
    `read_config` raises.
    """
    shape: object = model_class.read_config(config)
    if not isinstance(shape, ModelConfig):
        raise PluginError(f"`read_config` of the model {model_class.name} gave {shape!r:.80} and no ModelConfig")
    model = model_class(shape, dtype)
    for problem in _problems(model):
        raise PluginError(f"the model {model.name} can't be used: {problem}")
    return model


def _problems(model: Model) -> Iterator[str]:
    """Each is looked for on the assumption that there was none before."""
    for size in SIZES:
        yield from _wrong_size(f"`{size}` of its config", getattr(model.config, size), least=1)
    yield from _wrong_heads(model.config)
    tensors, layers = model.tensors(), model.layers()
    yield from _others_than(TensorSpec, tensors, "tensors")
    yield from _others_than(LayerSpec, layers, "layers")
    yield from _wrong_tensors(tensors)
    yield from _wrong_layers(layers, model.config.num_layers)
    roles = {tensor.name: tensor.role for tensor in tensors}
    for layer in layers:
        yield from _wrong_uses(layer, roles)
    yield from _wrong_rows(layers, tensors, model.config.vocab_size)
    for kind in get_args(LayerKind):
        for tokens in TOKENS:
            nbytes = model.workspace_nbytes(kind, tokens)
            yield from _wrong_size(f"`workspace_nbytes` of {kind} for {tokens} tokens", nbytes, least=0)


def _wrong_size(what: str, size: object, *, least: int) -> Iterator[str]:
    if type(size) is not int or size < least:
        yield f"{what} must be a whole number, at least {least}, and is {size!r}"


def _wrong_heads(config: ModelConfig) -> Iterator[str]:
    if config.num_heads % config.num_kv_heads:
        yield f"`num_heads` must be a multiple of its {config.num_kv_heads} `num_kv_heads`, and is {config.num_heads}"


def _others_than(kind: type[Any], listed: object, function: str) -> Iterator[str]:
    if not isinstance(listed, list | tuple) or not all(isinstance(item, kind) for item in listed):
        yield f"`{function}` must give a tuple of {kind.__name__}s, and gave {listed!r:.80}"


def _wrong_tensors(tensors: Sequence[TensorSpec]) -> Iterator[str]:
    yield from _repeated("tensor", (tensor.name for tensor in tensors))
    for tensor in tensors:
        if tensor.role not in get_args(Role):
            yield f"the role of {tensor.name} must be one of {', '.join(get_args(Role))}, and is {tensor.role!r}"
        sizes = tensor.shape if isinstance(tensor.shape, tuple) else ()
        rows_and_columns = tensor.role == "small" or len(sizes) == 2
        if not sizes or not rows_and_columns or not all(type(size) is int and size > 0 for size in sizes):
            wanted = "a shape" if tensor.role == "small" else "rows and columns"
            yield f"{tensor.name} is a {tensor.role} and must have {wanted}, not {tensor.shape!r}"


def _wrong_layers(layers: Sequence[LayerSpec], num_layers: int) -> Iterator[str]:
    yield from _repeated("layer", (layer.name for layer in layers))
    kinds = [layer.kind for layer in layers]
    if kinds != ["embed", *["decoder"] * num_layers, "final", "head"]:
        yield f"its layers must be an embed, {num_layers} decoders, a final and a head, and are {', '.join(kinds)}"


def _wrong_uses(layer: LayerSpec, roles: Mapping[str, Role]) -> Iterator[str]:
    table = {} if layer.table is None else {"table": layer.table}
    used = (("matrices", layer.matrices, "matrix table"), ("small", layer.small, "small"), ("table", table, "table"))
    for key, names, fitting in used:
        for name in names.values():
            if name not in roles:
                yield f"layer {layer.name} has {name} in `{key}`, which is none of its tensors"
            elif roles[name] not in fitting.split():
                yield f"layer {layer.name} has {name} in `{key}`, whose role is {roles[name]}"
    if bool(table) != (layer.kind == "embed"):
        yield f"the embed layer and no other must have a table, and {layer.name} has {layer.table}"
    if layer.kind == "decoder" and not layer.matrices:
        yield f"layer {layer.name} has no matrices"
    if layer.kind == "head" and set(layer.matrices) != {"head"}:
        yield f"the head must have one matrix, called `head`, and has {', '.join(layer.matrices) or 'none'}"


def _wrong_rows(layers: Sequence[LayerSpec], tensors: Sequence[TensorSpec], vocab_size: int) -> Iterator[str]:
    """Of the table and the head: whatever the head can choose is looked up."""
    rows = {tensor.name: tensor.shape[0] for tensor in tensors}
    for layer in layers:
        if layer.table is not None and rows[layer.table] < vocab_size:
            yield f"the table {layer.table} must have a row for each of {vocab_size} token ids, not {rows[layer.table]}"
        if layer.kind == "head" and rows[layer.matrices["head"]] != vocab_size:
            head = layer.matrices["head"]
            yield f"the head {head} must have one row for each of {vocab_size} token ids, not {rows[head]}"


def _repeated(what: str, names: Iterable[str]) -> Iterator[str]:
    for name, times in Counter(names).items():
        if times > 1:
            yield f"there are {times} {what}s called {name}"
