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

_BYTE_BITS = 8
_PRODUCT = "void(CPointer(uint8), CPointer(int64), int64, int64, CPointer(float32), CPointer(float32), int64)"


def multiply(  # noqa: PLR0917  # a C function's
    encoded: Any, settings: Any, first: Any, count: Any, vectors: Any, weights: Any, stride: Any
) -> None:
    """Of matrices [first, first + count)."""
    shape = settings[3], settings[4] // GROUP_SIZE
    for matrix in range(count):
        codes, grids, lows = _matrix(encoded, settings, first + matrix)
        vector, chosen = offset(vectors, matrix * settings[4]), offset(weights, matrix * stride)
        if settings[2] == _BYTE_BITS:
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
    shape = settings[3], settings[4] // GROUP_SIZE
    for matrix in range(count):
        codes, grids, lows = _matrix(encoded, settings, first + matrix)
        vector, chosen = offset(vectors, matrix * settings[4]), offset(weights, matrix * stride)
        if settings[2] == _BYTE_BITS:
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
def _matrix(encoded: Any, settings: Any, number: Any) -> Any:
    """Pointers to a matrix's first codes, to its first word or scale, and to its first low if it has some."""
    size, bits = settings[0], settings[2]
    begin, codes_nbytes = number * settings[3] * settings[4] // GROUP_SIZE, size * bits // 8
    codes = offset(encoded, begin * GROUP_SIZE * bits // 8)
    if bits == _BYTE_BITS:
        scales = offset(encoded, codes_nbytes + 2 * begin)
        return codes, scales, offset(scales, 2 * (size // GROUP_SIZE))
    words = offset(encoded, codes_nbytes + 4 * begin)
    return codes, words, words


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
