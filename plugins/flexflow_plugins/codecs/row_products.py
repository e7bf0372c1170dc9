"""Products with a matrix whose rows are groups of 64 codes, by vector instructions, without writing decoded numbers.

What is multiplied are whole numbers, as codes say them; a group's scale is a factor of their sum, or of the weight of
their row. Four rows are taken at a time, and of each the same group: their scales are one vector, and so are their
sums. What a group's numbers are, `Rows` say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from math import prod
from typing import Any, ClassVar

from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types

from flexflow_engine.cpu.vectors import filled, multiplied_and_added, put_vector, repeated, shuffled, sums, vector_at
from flexflow_plugins.codecs.part_format import GROUP_SIZE

LANES, ROWS_AT_ONCE = 16, 4
"""Numbers of a vector, and rows that are taken at a time: a matrix has a multiple of these."""
VECTORS = GROUP_SIZE // LANES
_LONG = ir.IntType(64)
FLAGS = ir.IntType(ROWS_AT_ONCE)
FLOATS, FEW_FLOATS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.FloatType(), ROWS_AT_ONCE)
Generate = Callable[[Any, Any, Any, Sequence[Any]], Any]
"""What Numba calls for an intrinsic's instructions."""


def suits(shape: tuple[int, ...], group_size: int) -> bool:
    """Whether tensors of this shape are matrices of such rows."""
    dimensions = 3
    if len(shape) != dimensions or group_size != GROUP_SIZE or not prod(shape):
        return False
    return shape[1] % ROWS_AT_ONCE == shape[2] % GROUP_SIZE == 0


class Rows(ABC):
    """The same group of ROWS_AT_ONCE rows. A number of theirs is scale * whole number + low."""

    order: ClassVar[Sequence[int]] = range(LANES)
    """Which of 16 adjoining numbers is at each place of a vector."""
    has_lows: ClassVar[bool] = False
    scales: Any
    """FEW_FLOATS, as lows are."""
    lows: Any
    """Only where `has_lows`."""
    left_out: Any = FLAGS(0)
    """A bit for each row whose group is to be left out; its scale is 0."""

    @abstractmethod
    def __init__(self, builder: Any, codes: Any, grids: Any, places: Sequence[Any]) -> None:
        """codes, grids: pointers to the matrix's first; of grids one or several, as the codec's kernel hands them over.
        places: of the groups, counted from there.
        """

    @abstractmethod
    def numbers(self, row: int) -> Iterable[Any]:
        """VECTORS vectors of a row's whole numbers, FLOATS, in `order`."""


def multiplying(rows: type[Rows]) -> Generate:
    """Sets the weights of one matrix; whether any group was left out. Arguments: pointers to the first codes and grids,
    rows and groups of a row, pointers to the vector and to the weights.
    """

    def generate(_: Any, builder: Any, __: Any, arguments: Sequence[Any]) -> Any:
        codes, grids, shape, vector, weights = arguments
        num_rows, num_groups = (builder.extract_value(shape, i) for i in range(2))

        def multiply_rows(block: Any, found: Sequence[Any]) -> list[Any]:
            first = builder.mul(block, _LONG(ROWS_AT_ONCE))

            def multiply_group(group: Any, carried: Sequence[Any]) -> list[Any]:
                some = rows(builder, codes, grids, _places(builder, first, group, num_groups))
                numbers = _vectors(builder, vector, group, rows.order)
                products = [_product(builder, some.numbers(row), numbers) for row in range(ROWS_AT_ONCE)]
                total = multiplied_and_added(builder, sums(builder, products), some.scales, carried[1])
                if rows.has_lows:
                    each = sums(builder, [reduce(builder.fadd, numbers)])
                    total = multiplied_and_added(builder, _spread(builder, each, 0, ROWS_AT_ONCE), some.lows, total)
                return [builder.or_(carried[0], some.left_out), total]

            left_out, totals = repeated(builder, num_groups, [found[0], filled(FEW_FLOATS, 0.0)], multiply_group)
            put_vector(builder, totals, weights, first)
            return [left_out]

        return _any(builder, repeated(builder, _blocks(builder, num_rows), [FLAGS(0)], multiply_rows)[0])

    return generate


def accumulating(rows: type[Rows]) -> Generate:
    """Adds to the vector of one matrix; result and arguments as of `multiplying`."""

    def generate(_: Any, builder: Any, __: Any, arguments: Sequence[Any]) -> Any:
        codes, grids, shape, vector, weights = arguments
        num_rows, num_groups = (builder.extract_value(shape, i) for i in range(2))

        def add_group(group: Any, found: Sequence[Any]) -> list[Any]:
            def add_rows(block: Any, carried: Sequence[Any]) -> list[Any]:
                first = builder.mul(block, _LONG(ROWS_AT_ONCE))
                some = rows(builder, codes, grids, _places(builder, first, group, num_groups))
                chosen = vector_at(builder, FEW_FLOATS, weights, first)
                factors, (left_out, each, *totals) = builder.fmul(chosen, some.scales), carried
                for row in range(ROWS_AT_ONCE):
                    factor = _spread(builder, factors, row, LANES)
                    totals = [
                        multiplied_and_added(builder, numbers, factor, total)
                        for numbers, total in zip(some.numbers(row), totals, strict=True)
                    ]
                if rows.has_lows:
                    each = multiplied_and_added(builder, chosen, some.lows, each)
                return [builder.or_(left_out, some.left_out), each, *totals]

            begin = [found[0], filled(FEW_FLOATS, 0.0), *_vectors(builder, vector, group, rows.order)]
            left_out, each, *totals = repeated(builder, _blocks(builder, num_rows), begin, add_rows)
            if rows.has_lows:
                lows = _spread(builder, sums(builder, [each]), 0, LANES)
                totals = [builder.fadd(total, lows) for total in totals]
            for number, total in enumerate(totals):
                straight = shuffled(builder, total, total, [rows.order.index(place) for place in range(LANES)])
                put_vector(builder, straight, vector, _place(builder, group, number))
            return [left_out]

        return _any(builder, repeated(builder, num_groups, [FLAGS(0)], add_group)[0])

    return generate


def _blocks(builder: Any, num_rows: Any) -> Any:
    return builder.udiv(num_rows, _LONG(ROWS_AT_ONCE))


def _any(builder: Any, flags: Any) -> Any:
    return builder.icmp_unsigned("!=", flags, FLAGS(0))


def _places(builder: Any, first: Any, group: Any, num_groups: Any) -> list[Any]:
    """Of a group of each row from `first` on."""
    rows = (builder.add(first, _LONG(row)) for row in range(ROWS_AT_ONCE))
    return [builder.add(builder.mul(row, num_groups), group) for row in rows]


def _product(builder: Any, numbers: Iterable[Any], others: Sequence[Any]) -> Any:
    """Sixteen sums of products."""
    total = filled(FLOATS, 0.0)
    for some, other in zip(numbers, others, strict=True):
        total = multiplied_and_added(builder, some, other, total)
    return total


def _vectors(builder: Any, vector: Any, group: Any, order: Sequence[int]) -> list[Any]:
    """A group's numbers of the vector, in `order`."""
    straight = [vector_at(builder, FLOATS, vector, _place(builder, group, number)) for number in range(VECTORS)]
    return [shuffled(builder, numbers, numbers, order) for numbers in straight]


def _place(builder: Any, group: Any, number: int) -> Any:
    """Of a group's vector with this number."""
    return builder.add(builder.mul(group, _LONG(GROUP_SIZE)), _LONG(number * LANES))


def _spread(builder: Any, vector: Any, place: int, count: int) -> Any:
    """A vector of what is at a place of another."""
    return shuffled(builder, vector, vector, [place] * count)
