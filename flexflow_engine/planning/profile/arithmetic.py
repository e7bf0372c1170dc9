"""Matmuls, and what runs between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, takewhile
from statistics import median

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.abc.hardware import Curve, ProductRates
from flexflow_engine.abc.tier import HOST
from flexflow_engine.planning.profile.bench import Bench
from flexflow_engine.planning.profile.extent import Extent
from flexflow_engine.planning.profile.load import Load
from flexflow_engine.products.bfloats import multiplies_plain
from flexflow_engine.products.matmul import Multiply, Rows

LOAD_TOKENS = 16
"""Rows of the matmuls that run beside links: enough to keep the host's processor and its memory busy."""
DEVICE_PRODUCTS = 32
"""Of many rows each, that a device is given at a time: it is to be busy, not the host that launches them."""
COMPARED_TOKENS = 64
"""The most with which two ways to multiply are compared: with more of them nothing changes, but what it takes."""


def product_rates(bench: Bench, extent: Extent, multiply: Multiply) -> ProductRates:
    """Of one way to multiply, by rows of one call. What a product takes whatever its size is told for the host: a
    device queues one behind the other. At least half of a product's time is left to operations. The matrices come from
    memory, as a layer's do, not from a cache.
    """
    one_product_s = _one_product_s(bench, extent, multiply) if bench.memory == HOST else 0.0
    matrices = _matrices(bench, extent.features, extent)
    seconds = [_product_s(bench, matrices, tokens, multiply) for tokens in extent.tokens]
    curve = _rates(extent, seconds, extent.features**2, one_product_s)
    return ProductRates(matmul_flops_per_s=curve, product_s=one_product_s)


def team_rates(bench: Bench, extent: Extent) -> ProductRates | None:
    """Of products that torch's own threads share; None where the engine's are as fast with most numbers of tokens."""
    return product_rates(bench, extent, bench.multiply_in_a_team) if _team_is_faster(bench, extent) else None


def _team_is_faster(bench: Bench, extent: Extent) -> bool:
    if multiplies_plain(bench.torch_dtype):
        return False  # neither way asks torch
    matrices = _matrices(bench, extent.features, extent)
    compared = [tokens for tokens in extent.tokens if tokens <= COMPARED_TOKENS]
    drawn_s, shared_s = (
        [_product_s(bench, matrices, tokens, way) for tokens in compared]
        for way in (bench.multiply, bench.multiply_in_a_team)
    )
    faster = sum(shared < drawn for drawn, shared in zip(drawn_s, shared_s, strict=True))
    return 2 * faster > len(compared)


def encoded_flops_per_s(bench: Bench, matrices: Sequence[Rows], extent: Extent, one_product_s: float) -> Curve:
    """The same of matrices [rows, features] whose rows the host decodes while it multiplies."""
    turn = cycle(matrices)

    def seconds_of(tokens: int) -> float:
        x = bench.numbers(tokens, extent.features)
        return bench.time(lambda: bench.products.linear(x, next(turn)))

    seconds = [seconds_of(tokens) for tokens in extent.tokens]
    return _rates(extent, seconds, matrices[0].out_features * extent.features, one_product_s)


def float32_from(bench: Bench, extent: Extent) -> int | None:
    """Tokens from which on the host multiplies 16-bit numbers faster if it widens them; None where it never does."""
    matrices = _matrices(bench, extent.features, extent)

    def widening_is_faster(tokens: int) -> bool:
        own_s, widened_s = (_product_s(bench, matrices, tokens, bench.multiplying(n)) for n in (None, 1))
        return widened_s < own_s

    return first_of_the_last([n for n in extent.tokens if n <= COMPARED_TOKENS], widening_is_faster)


def first_of_the_last(sizes: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """The least of ascending sizes from which on it holds for all of them; None where it does not for the largest."""
    held = list(takewhile(holds, reversed(sizes)))
    return held[-1] if held else None


def _one_product_s(bench: Bench, extent: Extent, multiply: Multiply) -> float:
    """What a product takes whatever its size: where the line through a small and a large matrix begins. The median of
    three: it is a small difference of large numbers.
    """
    small, large = extent.small_features**2, extent.features**2
    matrices = [_matrices(bench, features, extent) for features in (extent.small_features, extent.features)]
    begins = []
    for _ in range(3):
        small_s, large_s = (_product_s(bench, some, LOAD_TOKENS, multiply) for some in matrices)
        begins.append(small_s - small * (large_s - small_s) / (large - small))
    return max(0.0, median(begins))


def memory_bytes_per_s(bench: Bench, extent: Extent) -> float:
    """Reads and writes of norms, additions and activation functions, over hidden states of a prompt's size."""
    x, y = (bench.numbers(extent.tokens[-1], extent.features) for _ in range(2))

    def work() -> None:
        x.add_(y)
        torch.relu_(x)
        F.layer_norm(x, (extent.features,))

    return 7 * x.nbytes / bench.time(work)


def matmul_load(bench: Bench, extent: Extent) -> Load:
    """Matmuls without end, in operations, to see what they and the links leave each other. The host's are small ones:
    between two of them its threads wait for each other, and whoever moves bytes comes first.
    """
    on_host = bench.memory == HOST
    tokens, count, features = (
        (LOAD_TOKENS, 1, extent.small_features) if on_host else (extent.tokens[-1], DEVICE_PRODUCTS, extent.features)
    )
    turn, x = cycle(_matrices(bench, features, extent)), bench.numbers(tokens, features)

    def products() -> None:
        for _ in range(count):
            bench.multiply(x, next(turn), None)

    return Load(lambda worker: bench.finish(products), 2.0 * count * tokens * features**2)


def _rates(extent: Extent, seconds: Sequence[float], numbers: int, one_product_s: float) -> Curve:
    """By tokens, of products with so many numbers."""
    points = zip(extent.tokens, seconds, strict=True)
    return Curve(tuple((float(n), 2.0 * numbers * n / max(s - one_product_s, s / 2)) for n, s in points))


def _matrices(bench: Bench, features: int, extent: Extent) -> list[torch.Tensor]:
    """Square ones, more than the processor's caches hold."""
    nbytes = features**2 * bench.torch_dtype.itemsize
    return [bench.numbers(features, features) for _ in range(max(1, extent.cold_nbytes // nbytes))]


def _product_s(bench: Bench, matrices: list[torch.Tensor], tokens: int, multiply: Multiply) -> float:
    turn, x = cycle(matrices), bench.numbers(tokens, matrices[0].shape[1])
    return bench.time(lambda: multiply(x, next(turn), None))
