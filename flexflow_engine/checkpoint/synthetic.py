"""A checkpoint that is made up: random weights in the shape of a published model, for trying out and measuring."""

from __future__ import annotations

import difflib
import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.model import Model, TensorSpec
from flexflow_engine.checkpoint.checkpoint import ByteProgress, Checkpoint, silent
from flexflow_engine.errors import CheckpointError
from flexflow_engine.jobs.references import SYNTHETIC

SEED = 0
GENERATOR_VERSION = 1
"""Goes into the content key: changes whenever the same seed gives other numbers."""
STANDARD_DEVIATION = 0.02
_BLOCK_NUMBERS = 2**20
"""About as many numbers come from one random stream, so that any rows can be made without those before them."""
_SCALE = STANDARD_DEVIATION * 3**0.5 / 2**15
"""From uniform int16 to the wanted deviation: a uniform number in [-a, a] has a / sqrt(3)."""


def open_synthetic(reference: str, model_class: type[Model], dtype: DType) -> Checkpoint:
    """The checkpoint behind `synthetic:<name>`. Raises CheckpointError, with the near miss, for an unknown name."""
    wanted = reference.removeprefix(SYNTHETIC)
    configs = {hub_id.rpartition("/")[2]: config for hub_id, config in model_class.published().items()}
    if wanted not in configs:
        near = difflib.get_close_matches(wanted, configs, n=1)
        raise CheckpointError(
            f"no published model is called {wanted!r}",
            where=reference,
            fix=f"did you mean {SYNTHETIC}{near[0]}?" if near else f"one of {', '.join(sorted(configs))} would do",
        )
    return SyntheticCheckpoint(reference, configs[wanted], model_class, dtype)


class SyntheticCheckpoint(Checkpoint):
    """Every number follows from tensor name and position, in whatever order it is asked for."""

    @property
    def tokenizer_folder(self) -> Path | None:
        return None

    def content_key(self, progress: ByteProgress = silent) -> str:
        content = {"config": dict(self.config), "seed": SEED, "synthetic": GENERATOR_VERSION}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name].shape

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), float32: ones for the weights of norms, else uniform around zero."""
        spec = self._specs[name]
        if _is_norm_weight(spec):
            return torch.ones(stop - start)
        block_rows = max(1, _BLOCK_NUMBERS // int(np.prod(spec.shape[1:])))
        rows = torch.empty(stop - start, *spec.shape[1:])
        for block in range(start // block_rows, -(-stop // block_rows)):
            first = max(start, block * block_rows)
            last = min(stop, (block + 1) * block_rows, spec.shape[0])
            made = self._block(spec, block, block_rows)
            part = made[first - block * block_rows : last - block * block_rows]
            torch.mul(part, _SCALE, out=rows[first - start : last - start])
        return rows

    def _block(self, spec: TensorSpec, block: int, block_rows: int) -> torch.Tensor:
        """Uniform int16 [block_rows, ...] of one random stream."""
        stream = hashlib.sha256(f"{SEED} {spec.name} {block}".encode()).digest()
        generator = np.random.Generator(np.random.SFC64(np.frombuffer(stream, "<u4").tolist()))
        shape = (block_rows, *spec.shape[1:])
        numbers = np.frombuffer(generator.bytes(2 * int(np.prod(shape))), "<i2").copy()
        return torch.from_numpy(numbers).view(shape)

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.model.tensors()}


def _is_norm_weight(spec: TensorSpec) -> bool:
    """Vectors are norms and biases, and only norms have a weight."""
    return len(spec.shape) == 1 and spec.name.endswith("weight")
