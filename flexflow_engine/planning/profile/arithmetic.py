"""Matmuls, and what runs between them."""

from __future__ import annotations

from itertools import cycle

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.abc.hardware import Curve
from flexflow_engine.planning.profile.bench import Bench
from flexflow_engine.planning.profile.load import Load
from flexflow_engine.planning.profile.sizes import Sizes

LOAD_TOKENS = 16
"""Rows of the matmuls that run beside links: enough to keep a processor and its memory busy."""

WIDE_TOKENS = 32


def matmul_flops_per_s(bench: Bench, sizes: Sizes) -> Curve:
    """By rows of one call; the matrices come from memory, as a layer's do, not from a cache."""
    matrices = _matrices(bench, sizes)
    return Curve(tuple((float(tokens), _matmul_rate(bench, sizes, matrices, tokens)) for tokens in sizes.tokens))


def matmul_left_by_out_features(bench: Bench, sizes: Sizes) -> Curve:
    """What wide matrices leave of the rate of square ones; they come from memory as well."""
    square = _wide_rate(bench, sizes, sizes.features)
    wide = [(float(rows), min(1.0, _wide_rate(bench, sizes, rows) / square)) for rows in sizes.out_features]
    return Curve(((float(sizes.features), 1.0), *wide))


def memory_bytes_per_s(bench: Bench, sizes: Sizes) -> float:
    """Reads and writes of norms, additions and activation functions, over hidden states of a prompt's size."""
    x, y = (bench.numbers(sizes.tokens[-1], sizes.features) for _ in range(2))

    def work() -> None:
        x.add_(y)
        torch.relu_(x)
        F.layer_norm(x, (sizes.features,))

    return 7 * x.nbytes / bench.time(work)


def matmul_load(bench: Bench, sizes: Sizes) -> Load:
    """Matmuls without end, in operations, to see what they and the links leave each other."""
    turn, x = cycle(_matrices(bench, sizes)), bench.numbers(LOAD_TOKENS, sizes.features)

    def work(worker: int) -> None:
        bench.finish(lambda: bench.multiply(x, next(turn), None))

    return Load(work, 2.0 * LOAD_TOKENS * sizes.features**2)


def _matrices(bench: Bench, sizes: Sizes, rows: int | None = None) -> list[torch.Tensor]:
    """[rows, features] each, square ones where no rows are given."""
    shape = rows or sizes.features, sizes.features
    nbytes = shape[0] * shape[1] * bench.torch_dtype.itemsize
    return [bench.numbers(*shape) for _ in range(max(1, sizes.cold_nbytes // nbytes))]


def _wide_rate(bench: Bench, sizes: Sizes, rows: int) -> float:
    """Operations a second over matrices of so many rows, by as many tokens as a GPU batch may have."""
    matrices = _matrices(bench, sizes, rows)
    return _matmul_rate(bench, sizes, matrices, min(WIDE_TOKENS, sizes.tokens[-1]))


def _matmul_rate(bench: Bench, sizes: Sizes, matrices: list[torch.Tensor], tokens: int) -> float:
    turn, x = cycle(matrices), bench.numbers(tokens, sizes.features)
    return 2.0 * tokens * matrices[0].numel() / bench.time(lambda: bench.multiply(x, next(turn), None))
