"""Products of 8-bit integers by vector instructions: some tokens times some rows of a matrix, whose integers have a
scale and a low for each group of columns.

    x w = sum over groups of  x_scale * (scale * sum of q u + low * sum of q)     x = x_scale * q, w = low + scale * u

An instruction multiplies unsigned bytes, of the matrix, by signed ones, of tokens, and adds up four neighbours.
A vector's lanes are tokens: 32 bits are four columns of one, and the same four columns of a row are every lane's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import types

from flexflow_engine.cpu.jit import has_feature, intrinsic
from flexflow_engine.cpu.vectors import at, everywhere, filled, repeated, shuffled, transposed

LANES = 16 if has_feature("avx512vnni") else 8
"""Tokens of a vector."""
VECTORS = 2
"""Of tokens in a tile."""
TILE_TOKENS = LANES * VECTORS
TILE_ROWS = LANES // 2
"""Of the matrix: as many sums as the processor has registers for, with what is multiplied."""
QUAD = 4
"""Columns that one lane of an instruction multiplies."""

_WORD, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_WORDS, _FLOATS = ir.VectorType(_WORD, LANES), ir.VectorType(_FLOAT, LANES)
_INSTRUCTION = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
_TILE = [(row, vector) for row in range(TILE_ROWS) for vector in range(VECTORS)]


class _Places(NamedTuple):
    """Of what a tile is made of, as addresses; integers of 64 bits, as all of it."""

    tokens: Any
    """int8 [VECTORS, columns / QUAD, LANES, QUAD]."""
    token_scales: Any
    """float32 [VECTORS, 2, groups, LANES]: x_scale, and x_scale * (sum of q)."""
    rows: Any
    """uint8 [TILE_ROWS, columns]."""
    row_scales: Any
    """float32 [TILE_ROWS, groups]; so are the lows."""
    row_lows: Any
    sums: Any
    """float32 [TILE_ROWS, VECTORS, LANES], to be used."""
    out: Any
    """float32 [TILE_TOKENS, TILE_ROWS]."""
    out_stride: Any
    """From token to token, in numbers."""


@intrinsic
def multiply_tile(_: Any, groups: Any, group_quads: Any, places: Any) -> Any:
    """In a kernel: TILE_TOKENS tokens times TILE_ROWS rows of a matrix. places: see `_Places`, a tuple of int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        groups, quads, packed = arguments
        places = _Places(*(builder.extract_value(packed, i) for i in range(len(_Places._fields))))
        _Tile(builder, groups, quads, places).multiply()
        return context.get_dummy_value()

    numbers = types.UniTuple(types.int64, len(_Places._fields))  # type: ignore[no-untyped-call]  # numba says no types
    return types.void(types.int64, types.int64, numbers), generate


class _Tile:
    """Writes the instructions of one."""

    def __init__(self, builder: Any, groups: Any, quads: Any, places: _Places) -> None:
        """groups: of a row; quads: of a group; both are values of 64 bits."""
        self._builder, self._groups, self._quads, self._places = builder, groups, quads, places

    def multiply(self) -> None:
        builder = self._builder
        for row, vector in _TILE:
            builder.store(filled(_FLOATS, 0.0), self._sum(row, vector))
        repeated(builder, self._groups, [], self._add_group)
        self._put()

    def _add_group(self, group: Any, _: Sequence[Any]) -> list[Any]:
        builder, places = self._builder, self._places
        zeros = filled(_WORDS, 0)
        first = builder.mul(group, self._quads)
        products = repeated(
            builder,
            self._quads,
            [zeros] * len(_TILE),
            lambda quad, sums: self._add_quad(builder.add(first, quad), sums),
        )
        scales, sums = (
            [self._of_vector(places.token_scales, vector, kind, group) for vector in range(VECTORS)] for kind in (0, 1)
        )
        for row in range(TILE_ROWS):
            scale = everywhere(builder, self._of_row(places.row_scales, row, group, _FLOAT), LANES)
            low = everywhere(builder, self._of_row(places.row_lows, row, group, _FLOAT), LANES)
            for vector in range(VECTORS):
                place = self._sum(row, vector)
                product = builder.fmul(builder.sitofp(products[row * VECTORS + vector], _FLOATS), scales[vector])
                total = self._fused(low, sums[vector], builder.load(place))
                builder.store(self._fused(scale, product, total), place)
        return []

    def _add_quad(self, quad: Any, sums: Sequence[Any]) -> list[Any]:
        """Four columns of all tokens times the same of all rows."""
        builder, places = self._builder, self._places
        columns = builder.mul(builder.mul(self._groups, self._quads), _LONG(QUAD))
        tokens, rows = [], []
        for vector in range(VECTORS):
            skipped = builder.mul(builder.mul(columns, _LONG(LANES)), _LONG(vector))
            place = builder.add(skipped, builder.mul(quad, _LONG(QUAD * LANES)))
            tokens.append(self._load(places.tokens, place, _WORDS))
        for row in range(TILE_ROWS):
            place = builder.add(builder.mul(columns, _LONG(row)), builder.mul(quad, _LONG(QUAD)))
            rows.append(everywhere(builder, self._load(places.rows, place, _WORD), LANES))
        function = _declared(builder, _INSTRUCTION, _WORDS)
        return [
            builder.call(function, [total, rows[row], tokens[vector]])
            for total, (row, vector) in zip(sums, _TILE, strict=True)
        ]

    def _put(self) -> None:
        """The sums token by token: transposed, all rows of a token adjoin."""
        builder = self._builder
        for vector in range(VECTORS):
            numbers = transposed(builder, [builder.load(self._sum(row, vector)) for row in range(TILE_ROWS)])
            for i, some in enumerate(numbers):
                for j in range(LANES // TILE_ROWS):
                    token = vector * LANES + i * (LANES // TILE_ROWS) + j
                    adjoining = shuffled(builder, some, some, range(j * TILE_ROWS, (j + 1) * TILE_ROWS))
                    place = builder.mul(self._places.out_stride, _LONG(4 * token))
                    builder.store(adjoining, self._at(self._places.out, place, adjoining.type), align=4)

    def _of_row(self, address: Any, row: int, group: Any, kind: Any) -> Any:
        """One of [TILE_ROWS, groups]."""
        place = self._builder.add(self._builder.mul(self._groups, _LONG(row)), group)
        return self._load(address, self._builder.mul(place, _LONG(4)), kind)

    def _of_vector(self, address: Any, vector: int, kind: int, group: Any) -> Any:
        """One of [VECTORS, 2, groups], all tokens'."""
        place = self._builder.add(self._builder.mul(self._groups, _LONG(2 * vector + kind)), group)
        return self._load(address, self._builder.mul(place, _LONG(4 * LANES)), _FLOATS)

    def _sum(self, row: int, vector: int) -> Any:
        return self._at(self._places.sums, _LONG((row * VECTORS + vector) * LANES * 4), _FLOATS)

    def _load(self, address: Any, nbytes: Any, kind: Any) -> Any:
        return self._builder.load(self._at(address, nbytes, kind), align=1)

    def _at(self, address: Any, nbytes: Any, kind: Any) -> Any:
        return at(self._builder, address, nbytes, kind)

    def _fused(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        return self._builder.call(_declared(self._builder, f"llvm.fma.v{LANES}f32", _FLOATS), [a, b, c])


def _declared(builder: Any, name: str, kind: Any) -> Any:
    """A function of three vectors to one."""
    return builder.module.declare_intrinsic(name, [], ir.FunctionType(kind, [kind] * 3))
