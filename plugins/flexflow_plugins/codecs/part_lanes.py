"""What encoding does to each number of many groups, by vector instructions: see `part_search`, which says what `lanes`
and a room are. A loop that the compiler vectorises reads and writes its sums anew for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import types

from flexflow_engine.cpu.jit import intrinsic, kernel
from flexflow_engine.cpu.vectors import filled, multiplied_and_added, put_vector, repeated, transposed, vector_at
from flexflow_plugins.codecs.part_format import LEVELS, NUM_PARTS
from flexflow_plugins.codecs.rounding import codes_at

GROUPS_AT_ONCE = 32
LANES = NUM_PARTS * GROUPS_AT_ONCE
CODES_A_WORD, WORD_NBYTES = 8, 4
_WIDTH = 16
"""Of vectors; numbers a part are stored as so many, or a multiple of it."""
_LONG = ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), _WIDTH), ir.VectorType(ir.IntType(32), _WIDTH)


@kernel
def padded(part: Any) -> Any:
    """Numbers a part, and what fills them up."""
    return (part + _WIDTH - 1) // _WIDTH * _WIDTH


@intrinsic
def spread(_: Any, numbers: Any, lanes: Any) -> Any:
    """In a kernel: float32 [GROUPS_AT_ONCE, NUM_PARTS * padded] into the columns of `lanes` [padded, LANES]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (source, _), (target, rows) = (_array(context, builder, signature, arguments, i) for i in range(2))

        def turn(tile: Any, _: Sequence[Any]) -> list[Any]:
            """Sixteen groups' numbers of one part."""
            part, half = builder.udiv(tile, _LONG(2)), builder.urem(tile, _LONG(2))
            groups, begin = builder.mul(half, _LONG(_WIDTH)), builder.mul(tile, _LONG(_WIDTH))

            def turn_rows(block: Any, _: Sequence[Any]) -> list[Any]:
                row = builder.mul(block, _LONG(_WIDTH))
                vectors = []
                for group in range(_WIDTH):
                    number = builder.add(builder.mul(builder.add(groups, _LONG(group)), _LONG(NUM_PARTS)), part)
                    place = builder.add(builder.mul(number, rows), row)
                    vectors.append(vector_at(builder, _FLOATS, source, place))
                for number, column in enumerate(transposed(builder, vectors)):
                    place = builder.mul(builder.add(row, _LONG(number)), _LONG(LANES))
                    put_vector(builder, column, target, builder.add(place, begin))
                return []

            repeated(builder, builder.udiv(rows, _LONG(_WIDTH)), [], turn_rows)
            return []

        repeated(builder, _LONG(LANES // _WIDTH), [], turn)
        return context.get_dummy_value()

    return types.void(numbers, lanes), generate


@intrinsic
def sum_errors(_: Any, lanes: Any, count: Any, room: Any, places: Any) -> Any:
    """In a kernel: the squared errors of each column's first `count` numbers on its grid. places: in the room, of the
    columns' lows, inverse scales and scales, and where the sums go.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (numbers, _), (values, _) = (_array(context, builder, signature, arguments, i) for i in (0, 2))
        *given, result = (builder.extract_value(arguments[3], i) for i in range(4))

        def sum_column(block: Any, _: Sequence[Any]) -> list[Any]:
            lane = builder.mul(block, _LONG(_WIDTH))
            low, inverse, scale = (vector_at(builder, _FLOATS, values, builder.add(place, lane)) for place in given)

            def add(row: Any, sums: Sequence[Any]) -> list[Any]:
                number = vector_at(builder, _FLOATS, numbers, builder.add(builder.mul(row, _LONG(LANES)), lane))
                above = builder.fsub(number, low)
                code = codes_at(builder, builder.fmul(above, inverse), filled(_FLOATS, LEVELS))
                error = multiplied_and_added(builder, code, scale, builder.fneg(above))
                return [multiplied_and_added(builder, error, error, sums[0])]

            (total,) = repeated(builder, arguments[1], [filled(_FLOATS, 0.0)], add)
            put_vector(builder, total, values, builder.add(result, lane))
            return []

        repeated(builder, _LONG(LANES // _WIDTH), [], sum_column)
        return context.get_dummy_value()

    return types.void(lanes, types.int64, room, types.UniTuple(types.int64, 4)), generate  # type: ignore[no-untyped-call]  # numba says no types


@intrinsic
def find_codes(_: Any, lanes: Any, count: Any, room: Any, places: Any, codes: Any) -> Any:
    """In a kernel: the codes of each column's first `count` numbers, CODES_A_WORD in a word, the first one's bits the
    lowest. places: in the room, of the columns' lows and inverse scales. codes: uint32 [words, LANES].
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (numbers, _), (values, _) = (_array(context, builder, signature, arguments, i) for i in (0, 2))
        target, words = _array(context, builder, signature, arguments, 4)
        given = [builder.extract_value(arguments[3], i) for i in range(2)]

        def find_columns(block: Any, _: Sequence[Any]) -> list[Any]:
            lane = builder.mul(block, _LONG(_WIDTH))
            low, inverse = (vector_at(builder, _FLOATS, values, builder.add(place, lane)) for place in given)

            def find_word(word: Any, _: Sequence[Any]) -> list[Any]:
                first = builder.mul(word, _LONG(CODES_A_WORD))
                left = builder.sub(arguments[1], first)
                few = builder.icmp_signed("<", left, _LONG(CODES_A_WORD))
                several = builder.select(few, left, _LONG(CODES_A_WORD))
                last = builder.sub(builder.add(first, several), _LONG(1))

                def add(step: Any, found: Sequence[Any]) -> list[Any]:
                    """The last number first."""
                    place = builder.add(builder.mul(builder.sub(last, step), _LONG(LANES)), lane)
                    above = builder.fsub(vector_at(builder, _FLOATS, numbers, place), low)
                    code = codes_at(builder, builder.fmul(above, inverse), filled(_FLOATS, LEVELS))
                    before = builder.shl(found[0], filled(_WORDS, 4))
                    return [builder.or_(before, builder.fptosi(code, _WORDS))]

                (found,) = repeated(builder, several, [filled(_WORDS, 0)], add)
                put_vector(builder, found, target, builder.add(builder.mul(word, _LONG(LANES)), lane))
                return []

            repeated(builder, words, [], find_word)
            return []

        repeated(builder, _LONG(LANES // _WIDTH), [], find_columns)
        return context.get_dummy_value()

    two = types.UniTuple(types.int64, 2)  # type: ignore[no-untyped-call]  # numba says no types
    return types.void(lanes, types.int64, room, two, codes), generate


def _array(context: Any, builder: Any, signature: Any, arguments: Any, index: int) -> tuple[Any, Any]:
    """Pointer to the first number of an argument, and its length."""
    array = context.make_array(signature.args[index])(context, builder, arguments[index])
    return array.data, builder.extract_value(array.shape, 0)
