"""Products with matrices of encoded numbers, compiled: see `PageProducts`. Of both formats, which settings tell apart.

settings: numbers of a tensor, of a group, bits of a code, rows and columns of a matrix. With 4 bits groups have four
parts (`parts`), with 8 bits one grid (`kernels`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from flexflow_engine.cpu.jit import c_function, has_feature, intrinsic, kernel
from flexflow_engine.cpu.pointers import offset
from flexflow_plugins.codecs.part_format import GROUP_SIZE
from flexflow_plugins.codecs.part_grids import constant_of, has_grids, step_of
from flexflow_plugins.codecs.parts import word_at
from flexflow_plugins.codecs.row_products import accumulating, multiplying
from flexflow_plugins.codecs.rows import ByteRows, PartRows

_PRODUCT = "void(CPointer(uint8), CPointer(int64), int64, int64, CPointer(float32), CPointer(float32), int64)"


def multiply(  # noqa: PLR0917  # a C function's
    encoded: Any, settings: Any, first: Any, count: Any, vectors: Any, weights: Any, stride: Any
) -> None:
    """Of matrices [first, first + count)."""
    shape, places, has_bytes = (settings[3], settings[4] // GROUP_SIZE), _places(settings), settings[2] == 8
    for matrix in range(count):
        codes, grids, lows = _matrix(encoded, places, first + matrix)
        vector, chosen = offset(vectors, matrix * settings[4]), offset(weights, matrix * stride)
        if has_bytes:
            _multiply_bytes(codes, (grids, lows), shape, vector, chosen)
        elif _multiply_parts(codes, grids, shape, vector, chosen):
            for place in range(shape[0] * shape[1]):
                word = word_at(grids, 4 * place)
                if not has_grids(word):
                    total = _sum(offset(vector, place % shape[1] * GROUP_SIZE))
                    chosen[place // shape[1]] += _only_number(word) * total


def accumulate(  # noqa: PLR0917  # a C function's
    encoded: Any, settings: Any, first: Any, count: Any, vectors: Any, weights: Any, stride: Any
) -> None:
    """The same."""
    shape, places, has_bytes = (settings[3], settings[4] // GROUP_SIZE), _places(settings), settings[2] == 8
    for matrix in range(count):
        codes, grids, lows = _matrix(encoded, places, first + matrix)
        vector, chosen = offset(vectors, matrix * settings[4]), offset(weights, matrix * stride)
        if has_bytes:
            _accumulate_bytes(codes, (grids, lows), shape, vector, chosen)
        elif _accumulate_parts(codes, grids, shape, vector, chosen):
            for place in range(shape[0] * shape[1]):
                word = word_at(grids, 4 * place)
                if not has_grids(word):
                    summand = chosen[place // shape[1]] * _only_number(word)
                    _add(offset(vector, place % shape[1] * GROUP_SIZE), summand)


@intrinsic
def _multiply_parts(_: Any, codes: Any, words: Any, shape: Any, vector: Any, weights: Any) -> Any:
    """In a kernel: see `multiplying`."""
    return types.boolean(codes, words, shape, vector, weights), multiplying(PartRows)


@intrinsic
def _accumulate_parts(_: Any, codes: Any, words: Any, shape: Any, vector: Any, weights: Any) -> Any:
    """In a kernel: see `accumulating`."""
    return types.boolean(codes, words, shape, vector, weights), accumulating(PartRows)


@intrinsic
def _multiply_bytes(_: Any, codes: Any, grids: Any, shape: Any, vector: Any, weights: Any) -> Any:
    """In a kernel: see `multiplying`."""
    return types.boolean(codes, grids, shape, vector, weights), multiplying(ByteRows)


@intrinsic
def _accumulate_bytes(_: Any, codes: Any, grids: Any, shape: Any, vector: Any, weights: Any) -> Any:
    """In a kernel: see `accumulating`."""
    return types.boolean(codes, grids, shape, vector, weights), accumulating(ByteRows)


@kernel
def _matrix(encoded: Any, places: Any, number: Any) -> Any:
    """Pointers to a matrix's first codes, to its first word or scale, and to its first low if it has some."""
    begins, (codes_step, grids_step) = places
    codes = offset(encoded, begins[0] + number * codes_step)
    grids, lows = (offset(encoded, begins[1] + number * grids_step), offset(encoded, begins[2] + number * grids_step))
    return codes, grids, lows


@kernel
def _places(settings: Any) -> Any:
    """Where the first one's codes begin, its words or scales, and its lows if it has some; and bytes of a matrix's
    codes, and of its words or scales.
    """
    size, bits, groups = settings[0], settings[2], settings[3] * settings[4] // GROUP_SIZE
    codes_nbytes, grid_nbytes = size * bits // 8, 2 if bits == 8 else 4
    begins = 0, codes_nbytes, codes_nbytes + grid_nbytes * (size // GROUP_SIZE)
    return begins, (groups * GROUP_SIZE * bits // 8, groups * grid_nbytes)


@kernel
def _only_number(word: Any) -> Any:
    """That a group without grids consists of."""
    step = step_of(word)
    return constant_of(word) if step == 0 else step


@kernel
def _sum(numbers: Any) -> Any:
    total = np.float32(0)
    for i in range(GROUP_SIZE):
        total += numbers[i]
    return total


@kernel
def _add(numbers: Any, number: Any) -> None:
    for i in range(GROUP_SIZE):
        numbers[i] += number


@cache
def products() -> tuple[Any, Any] | None:
    """`multiply` and `accumulate` as C functions; None where the processor has no AVX-512: it looks numbers up."""
    return (c_function(_PRODUCT)(multiply), c_function(_PRODUCT)(accumulate)) if has_feature("avx512f") else None
