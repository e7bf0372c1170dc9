"""Numbers that vector instructions have made, rounded as kernels round (flexflow_engine.cpu.numbers)."""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types

from flexflow_engine.cpu.numbers import MAX_HALF
from flexflow_engine.cpu.vectors import bfloat_bits, filled


def rounded(builder: Any, numbers: Any, number: Any) -> Any:
    """As numbers of a type; those of 16 bits as their bits. None may be so small that instructions take it for zero."""
    if number == numba.float32:
        return numbers
    return (bfloat_bits if number == numba.uint16 else _half_bits)(builder, numbers)


def codes_at(builder: Any, places: Any, most: Any) -> Any:
    """The whole numbers next to places, none below 0 or above `most`, as float32."""
    kind, none = places.type, filled(places.type, 0.0)
    inside = builder.select(builder.fcmp_ordered(">", places, none), places, none)
    inside = builder.select(builder.fcmp_ordered("<", inside, most), inside, most)
    floor = builder.module.declare_intrinsic(f"llvm.floor.v{kind.count}f32", [], ir.FunctionType(kind, [kind]))
    return builder.call(floor, [builder.fadd(inside, filled(kind, 0.5))])


def _half_bits(builder: Any, numbers: Any) -> Any:
    """Of the finite float16 next to each number; NaN stays NaN."""
    most, least = (filled(numbers.type, float(end)) for end in (MAX_HALF, -MAX_HALF))
    numbers = builder.select(builder.fcmp_ordered(">", numbers, most), most, numbers)
    numbers = builder.select(builder.fcmp_ordered("<", numbers, least), least, numbers)
    halves = builder.fptrunc(numbers, ir.VectorType(ir.HalfType(), numbers.type.count))
    return builder.bitcast(halves, ir.VectorType(ir.IntType(16), numbers.type.count))
