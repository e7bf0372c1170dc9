"""Products with groups of 64 numbers in four parts, which AVX-512 looks up; see `row_products`.

A number is a multiple of an eighth of its group's step (`part_vectors`), so that the eighth is all that scales it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import types

from flexflow_engine.cpu.jit import c_function, has_feature, intrinsic, kernel
from flexflow_engine.cpu.pointers import offset
from flexflow_engine.cpu.vectors import filled
from flexflow_plugins.codecs.kernels import PRODUCT
from flexflow_plugins.codecs.part_format import GROUP_SIZE, MAX_EXPONENT
from flexflow_plugins.codecs.part_grids import constant_of, has_grids, step_of
from flexflow_plugins.codecs.part_lookups import multiples_looked_up
from flexflow_plugins.codecs.part_vectors import FIRST_OF_EIGHTHS
from flexflow_plugins.codecs.parts import word_at
from flexflow_plugins.codecs.row_products import FEW_FLOATS, FLAGS, LANES, ROWS_AT_ONCE, Rows, accumulating, multiplying

_WORD, _LONG = ir.IntType(32), ir.IntType(64)
_WORDS = ir.VectorType(_WORD, ROWS_AT_ONCE)
_GROUP_NBYTES = GROUP_SIZE // 2


class PartRows(Rows):
    """Groups that have no grids are left out."""

    order = tuple(place // 2 + LANES // 2 * (place % 2) for place in range(LANES))
    """Of both halves in turn: as codes lie where a part's eight bytes are repeated."""

    def __init__(self, builder: Any, codes: Any, grids: Any, places: Sequence[Any]) -> None:
        words = builder.bitcast(grids, _WORD.as_pointer())
        self._builder, self._codes, self._places = builder, codes, places
        self._words = [builder.load(builder.gep(words, [place]), align=1) for place in places]
        together = ir.Constant(_WORDS, ir.Undefined)
        for row, word in enumerate(self._words):
            together = builder.insert_element(together, word, _WORD(row))
        exponents = builder.and_(together, filled(_WORDS, 0xFF))
        eighths = builder.shl(builder.add(exponents, filled(_WORDS, FIRST_OF_EIGHTHS)), filled(_WORDS, 20))
        above = builder.sub(exponents, filled(_WORDS, 1))  # 0 becomes the largest
        without = builder.icmp_unsigned(">=", above, filled(_WORDS, MAX_EXPONENT))
        self.left_out = builder.bitcast(without, FLAGS)
        self.scales = builder.bitcast(builder.select(without, filled(_WORDS, 0), eighths), FEW_FLOATS)

    def numbers(self, row: int) -> Iterable[Any]:
        source = self._builder.gep(self._codes, [self._builder.mul(self._places[row], _LONG(_GROUP_NBYTES))])
        grids = self._builder.lshr(self._words[row], _WORD(8))
        return multiples_looked_up(self._builder, source, grids, self.order)


@intrinsic
def _multiply_rows(_: Any, codes: Any, words: Any, shape: Any, vector: Any, weights: Any) -> Any:
    """In a kernel: see `multiplying`."""
    return types.boolean(codes, words, shape, vector, weights), multiplying(PartRows)


@intrinsic
def _accumulate_rows(_: Any, codes: Any, words: Any, shape: Any, vector: Any, weights: Any) -> Any:
    """In a kernel: see `accumulating`."""
    return types.boolean(codes, words, shape, vector, weights), accumulating(PartRows)


def multiply(  # noqa: PLR0917  # a C function's
    encoded: Any, settings: Any, first: Any, count: Any, vectors: Any, weights: Any, stride: Any
) -> None:
    """See `PageProducts`. settings: numbers of a tensor, of a group, bits of a code, rows and columns of a matrix."""
    rows, columns = settings[3], settings[4]
    shape = rows, columns // GROUP_SIZE
    for matrix in range(count):
        codes, words = _matrix(encoded, settings, first + matrix)
        vector, chosen = offset(vectors, matrix * columns), offset(weights, matrix * stride)
        if _multiply_rows(codes, words, shape, vector, chosen):
            for place in range(shape[0] * shape[1]):
                word = word_at(words, 4 * place)
                if not has_grids(word):
                    total = _sum(offset(vector, place % shape[1] * GROUP_SIZE))
                    chosen[place // shape[1]] += _only_number(word) * total


def accumulate(  # noqa: PLR0917  # a C function's
    encoded: Any, settings: Any, first: Any, count: Any, vectors: Any, weights: Any, stride: Any
) -> None:
    """See `PageProducts`. settings: as of `multiply`."""
    rows, columns = settings[3], settings[4]
    shape = rows, columns // GROUP_SIZE
    for matrix in range(count):
        codes, words = _matrix(encoded, settings, first + matrix)
        vector, chosen = offset(vectors, matrix * columns), offset(weights, matrix * stride)
        if _accumulate_rows(codes, words, shape, vector, chosen):
            for place in range(shape[0] * shape[1]):
                word = word_at(words, 4 * place)
                if not has_grids(word):
                    summand = chosen[place // shape[1]] * _only_number(word)
                    _add(offset(vector, place % shape[1] * GROUP_SIZE), summand)


@kernel
def _matrix(encoded: Any, settings: Any, number: Any) -> Any:
    """Pointers to a matrix's first codes and words."""
    begin = number * settings[3] * settings[4] // GROUP_SIZE
    return offset(encoded, begin * _GROUP_NBYTES), offset(encoded, settings[0] // 2 + 4 * begin)


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
    """`multiply` and `accumulate` as C functions; None where the processor does not look up."""
    return (c_function(PRODUCT)(multiply), c_function(PRODUCT)(accumulate)) if has_feature("avx512f") else None
