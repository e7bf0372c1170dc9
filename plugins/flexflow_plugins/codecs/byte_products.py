"""Products with groups of 64 codes of 8 bits and one grid each; see `row_products`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import types

from flexflow_engine.cpu.jit import c_function, has_feature, intrinsic, kernel
from flexflow_engine.cpu.pointers import offset
from flexflow_plugins.codecs.kernels import PRODUCT
from flexflow_plugins.codecs.part_format import GROUP_SIZE
from flexflow_plugins.codecs.row_products import (
    FEW_FLOATS,
    FLOATS,
    LANES,
    ROWS_AT_ONCE,
    VECTORS,
    Rows,
    accumulating,
    multiplying,
)

_BYTE, _SHORT, _WORD, _LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTES, _WORDS = ir.VectorType(_BYTE, LANES), ir.VectorType(_WORD, LANES)
_BITS, _HALVES = ir.VectorType(_SHORT, ROWS_AT_ONCE), ir.VectorType(ir.HalfType(), ROWS_AT_ONCE)


class ByteRows(Rows):
    """Numbers that are not finite have grids that are not."""

    has_lows = True

    def __init__(self, builder: Any, codes: Any, grids: Any, places: Sequence[Any]) -> None:
        """grids: of scales and of lows."""
        self._builder, self._codes, self._places = builder, codes, places
        self.scales, self.lows = (self._halves(builder.extract_value(grids, i)) for i in range(2))

    def _halves(self, numbers: Any) -> Any:
        """Of the rows' groups, as float32."""
        start, together = self._builder.bitcast(numbers, _SHORT.as_pointer()), ir.Constant(_BITS, ir.Undefined)
        for row, place in enumerate(self._places):
            bits = self._builder.load(self._builder.gep(start, [place]), align=1)
            together = self._builder.insert_element(together, bits, _WORD(row))
        return self._builder.fpext(self._builder.bitcast(together, _HALVES), FEW_FLOATS)

    def numbers(self, row: int) -> Iterator[Any]:
        start = self._builder.mul(self._places[row], _LONG(GROUP_SIZE))
        for number in range(VECTORS):
            place = self._builder.gep(self._codes, [self._builder.add(start, _LONG(number * LANES))])
            some = self._builder.load(self._builder.bitcast(place, _BYTES.as_pointer()), align=1)
            yield self._builder.sitofp(self._builder.zext(some, _WORDS), FLOATS)


@intrinsic
def _multiply_rows(_: Any, codes: Any, grids: Any, shape: Any, vector: Any, weights: Any) -> Any:
    """In a kernel: see `multiplying`."""
    return types.boolean(codes, grids, shape, vector, weights), multiplying(ByteRows)


@intrinsic
def _accumulate_rows(_: Any, codes: Any, grids: Any, shape: Any, vector: Any, weights: Any) -> Any:
    """In a kernel: see `accumulating`."""
    return types.boolean(codes, grids, shape, vector, weights), accumulating(ByteRows)


def multiply(  # noqa: PLR0917  # a C function's
    encoded: Any, settings: Any, first: Any, count: Any, vectors: Any, weights: Any, stride: Any
) -> None:
    """See `PageProducts`. settings: numbers of a tensor, of a group, bits of a code, rows and columns of a matrix."""
    shape = settings[3], settings[4] // GROUP_SIZE
    for matrix in range(count):
        codes, grids = _matrix(encoded, settings, first + matrix)
        vector, chosen = offset(vectors, matrix * settings[4]), offset(weights, matrix * stride)
        _multiply_rows(codes, grids, shape, vector, chosen)


def accumulate(  # noqa: PLR0917  # a C function's
    encoded: Any, settings: Any, first: Any, count: Any, vectors: Any, weights: Any, stride: Any
) -> None:
    """See `PageProducts`. settings: as of `multiply`."""
    shape = settings[3], settings[4] // GROUP_SIZE
    for matrix in range(count):
        codes, grids = _matrix(encoded, settings, first + matrix)
        vector, chosen = offset(vectors, matrix * settings[4]), offset(weights, matrix * stride)
        _accumulate_rows(codes, grids, shape, vector, chosen)


@kernel
def _matrix(encoded: Any, settings: Any, number: Any) -> Any:
    """Pointers to a matrix's first codes, and to its first scale and low."""
    size, begin = settings[0], number * settings[3] * settings[4] // GROUP_SIZE
    scales = offset(encoded, size + 2 * begin)
    return offset(encoded, begin * GROUP_SIZE), (scales, offset(scales, 2 * (size // GROUP_SIZE)))


@cache
def products() -> tuple[Any, Any] | None:
    """`multiply` and `accumulate` as C functions; None where vectors are too short to hold what they work on."""
    return (c_function(PRODUCT)(multiply), c_function(PRODUCT)(accumulate)) if has_feature("avx512f") else None
