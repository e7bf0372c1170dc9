"""Tiny OPT checkpoints in every format, and what is imported of them, for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
import zarr
from safetensors.torch import save_file

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import DType
from flexflow_engine.checkpoint.checkpoint import ByteProgress, Checkpoint, silent
from flexflow_engine.checkpoint.importing import import_checkpoint
from flexflow_engine.checkpoint.source import open_checkpoint
from flexflow_engine.store.weights import WeightStore
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_plugins.models.opt import OPTModel

CONFIG = {
    "model_type": "opt",
    "vocab_size": 201,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 30,
}
TABLE = "model.decoder.embed_tokens.weight"
FC1 = "model.decoder.layers.1.fc1.weight"

Tensors = Mapping[str, torch.Tensor]


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every tensor of the tiny model, random and reproducible."""
    model = OPTModel(OPTModel.read_config(CONFIG), "float32")
    generator = torch.Generator().manual_seed(1)
    return {spec.name: torch.randn(spec.shape, generator=generator).to(dtype) for spec in model.tensors()}


def halves(names: Iterable[str]) -> tuple[list[str], list[str]]:
    ordered = sorted(names)
    return ordered[::2], ordered[1::2]


def write_config(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write_safetensors(folder: Path, content: Tensors) -> Path:
    save_file(dict(content), write_config(folder) / "model.safetensors")
    return folder


def write_bin(folder: Path, content: Tensors) -> Path:
    torch.save(dict(content), write_config(folder) / "pytorch_model.bin")
    return folder


def write_sharded_safetensors(folder: Path, content: Tensors) -> Path:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    write_config(folder)
    for name, part in zip(names, halves(content), strict=True):
        save_file({tensor: content[tensor] for tensor in part}, folder / name)
    return write_index(folder, "model.safetensors.index.json", names, content)


def write_sharded_bin(folder: Path, content: Tensors) -> Path:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    write_config(folder)
    for name, part in zip(names, halves(content), strict=True):
        torch.save({tensor: content[tensor] for tensor in part}, folder / name)
    return write_index(folder, "pytorch_model.bin.index.json", names, content)


def write_index(folder: Path, index: str, names: list[str], content: Tensors) -> Path:
    weight_map = {t: name for name, part in zip(names, halves(content), strict=True) for t in part}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


FORMATS = {
    "safetensors": write_safetensors,
    "sharded safetensors": write_sharded_safetensors,
    "bin": write_bin,
    "sharded bin": write_sharded_bin,
}


def opened(reference: Path | str, dtype: DType = "float32") -> Checkpoint:
    return open_checkpoint(str(reference), OPTModel, dtype=dtype)


def imported(checkpoint: Checkpoint, root: Path, progress: ByteProgress = silent) -> WeightStore:
    return import_checkpoint(checkpoint, checkpoint.model, NoneCodec(), NoneCodec(), root, progress)


def imported_with(codec: Codec, checkpoint: Checkpoint, root: Path) -> WeightStore:
    return import_checkpoint(checkpoint, checkpoint.model, codec, NoneCodec(), root, silent)


def pages(root: Path) -> dict[Path, int]:
    """Every page file under `root` and when it was written."""
    files = (path for path in root.rglob("*") if path.is_file() and "c" in path.parts)
    return {path: path.stat().st_mtime_ns for path in files}


def stock(store: WeightStore, array: str) -> torch.Tensor:
    """An array as stock Zarr reads it; bfloat16 as its bits, int16."""
    node = zarr.open_group(store.path, mode="r")[array]
    assert isinstance(node, zarr.Array)
    values = np.asarray(node[:])
    return torch.from_numpy(values.view(np.int16) if values.dtype == np.uint16 else values)
