"""Random weights of a published OPT shape, as a Hugging Face folder with bfloat16 safetensors shards.

    python -m throughput.checkpoint opt-1.3b FOLDER

The numbers are those of `synthetic:opt-…`, so the folder is the same whoever makes it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from flexflow_engine.abc.model import TensorSpec
from flexflow_engine.checkpoint.checkpoint import Checkpoint
from flexflow_engine.checkpoint.source import open_checkpoint
from flexflow_engine.plugins import Registry

SHARD_NBYTES = 2**30
CONFIG = "config.json"


def checkpoint_folder(work: Path, model: str) -> Path:
    """Where the checkpoint of a model lies in a folder of work."""
    return work / "checkpoints" / model


def make_checkpoint(model: str, folder: Path) -> None:
    """Write the folder; its config.json comes last, so that a folder that has one is whole."""
    checkpoint = open_checkpoint(f"synthetic:{model}", Registry.load().model("opt"), dtype="bfloat16")
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, str] = {}
    for number, tensors in enumerate(_shards(checkpoint), start=1):
        name = f"model-{number:05}.safetensors"
        save_file(dict(tensors), folder / name, metadata={"format": "pt"})
        shards |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = dict(checkpoint.config) | {"architectures": ["OPTForCausalLM"], "dtype": "bfloat16"}
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _shards(checkpoint: Checkpoint) -> Iterator[Mapping[str, torch.Tensor]]:
    """The tensors in groups of at least SHARD_NBYTES, but for the last; all cores make those of a group."""
    groups: list[list[TensorSpec]] = [[]]
    for spec in checkpoint.model.tensors():
        if sum(prod(one.shape) for one in groups[-1]) * torch.bfloat16.itemsize >= SHARD_NBYTES:
            groups.append([])
        groups[-1].append(spec)
    with ThreadPoolExecutor() as threads:
        for group in groups:
            made = threads.map(lambda spec: checkpoint.read_rows(spec.name, 0, spec.shape[0]).bfloat16(), group)
            yield {spec.name: tensor for spec, tensor in zip(group, made, strict=True)}


if __name__ == "__main__":
    make_checkpoint(sys.argv[1], Path(sys.argv[2]))
