"""What `row_products` multiplies: groups of 64 numbers as each of the two formats has them.

In four parts, a number is a multiple of an eighth of its group's step (`part_vectors`), which AVX-512 looks up, so that
the eighth is all that scales it. With one grid, a number is a code of 8 bits, its scale, and its low.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types

from flexflow_engine.cpu.vectors import filled
from flexflow_plugins.codecs.part_format import GROUP_SIZE, MAX_EXPONENT
from flexflow_plugins.codecs.part_lookups import multiples_looked_up
from flexflow_plugins.codecs.part_vectors import FIRST_OF_EIGHTHS
from flexflow_plugins.codecs.row_products import FEW_FLOATS, FLAGS, FLOATS, LANES, ROWS_AT_ONCE, VECTORS, Rows

_BYTE, _SHORT, _WORD, _LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FEW_WORDS = ir.VectorType(_WORD, ROWS_AT_ONCE)
_BYTES, _WORDS = ir.VectorType(_BYTE, LANES), ir.VectorType(_WORD, LANES)
_BITS, _HALVES = ir.VectorType(_SHORT, ROWS_AT_ONCE), ir.VectorType(ir.HalfType(), ROWS_AT_ONCE)


class PartRows(Rows):
    """Groups that have no grids are left out."""

    order = tuple(place // 2 + LANES // 2 * (place % 2) for place in range(LANES))
    """Of both halves in turn: as codes lie where a part's eight bytes are repeated."""

    def __init__(self, builder: Any, codes: Any, grids: Any, places: Sequence[Any]) -> None:
        words = builder.bitcast(grids, _WORD.as_pointer())
        self._builder, self._codes, self._places = builder, codes, places
        self._words = [builder.load(builder.gep(words, [place]), align=1) for place in places]
        together = ir.Constant(_FEW_WORDS, ir.Undefined)
        for row, word in enumerate(self._words):
            together = builder.insert_element(together, word, _WORD(row))
        exponents = builder.and_(together, filled(_FEW_WORDS, 0xFF))
        eighths = builder.shl(builder.add(exponents, filled(_FEW_WORDS, FIRST_OF_EIGHTHS)), filled(_FEW_WORDS, 20))
        above = builder.sub(exponents, filled(_FEW_WORDS, 1))  # 0 becomes the largest
        without = builder.icmp_unsigned(">=", above, filled(_FEW_WORDS, MAX_EXPONENT))
        self.left_out = builder.bitcast(without, FLAGS)
        self.scales = builder.bitcast(builder.select(without, filled(_FEW_WORDS, 0), eighths), FEW_FLOATS)

    def numbers(self, row: int) -> Iterable[Any]:
        source = self._builder.gep(self._codes, [self._builder.mul(self._places[row], _LONG(GROUP_SIZE // 2))])
        grids = self._builder.lshr(self._words[row], _WORD(8))
        return multiples_looked_up(self._builder, source, grids, self.order)


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
