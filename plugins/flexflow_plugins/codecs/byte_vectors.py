"""Codes of 8 bits decoded by vector instructions. The compiler vectorises such a loop too, but begins it with checks
that take longer than a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import types

from flexflow_engine.cpu.jit import intrinsic
from flexflow_engine.cpu.vectors import ask_for, everywhere, repeated
from flexflow_plugins.codecs.rounding import rounded

LANES = 16
"""Codes that are decoded at once."""
AHEAD_NBYTES = 2048
"""How far ahead of codes those are that are asked for."""
_LONG = ir.IntType(64)
_BYTES, _WORDS = ir.VectorType(ir.IntType(8), LANES), ir.VectorType(ir.IntType(32), LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


@intrinsic
def decode_bytes(_: Any, codes: Any, count: Any, scale: Any, low: Any, numbers: Any) -> Any:
    """In a kernel: low + code * scale of so many codes, a multiple of LANES and not 0, to `numbers`, rounded as
    `narrow` rounds; NaN stays NaN. Pointers, codes at any address; scale, low: float32 that float16 has, so that no
    number is tiny.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, count, scale, low, target = arguments
        factor, summand = (everywhere(builder, number, LANES) for number in (scale, low))

        def decode(step: Any, _: Sequence[Any]) -> list[Any]:
            first = builder.mul(step, _LONG(LANES))
            source = builder.gep(codes, [first])
            some = builder.load(builder.bitcast(source, _BYTES.as_pointer()), align=1)
            floats = builder.sitofp(builder.zext(some, _WORDS), _FLOATS)
            result = rounded(builder, builder.fadd(builder.fmul(floats, factor), summand), signature.args[4].dtype)
            place = builder.bitcast(builder.gep(target, [first]), result.type.as_pointer())
            builder.store(result, place, align=2)
            ask_for(builder, builder.ptrtoint(builder.gep(source, [_LONG(AHEAD_NBYTES)]), _LONG), into=3)
            return []

        repeated(builder, builder.udiv(count, _LONG(LANES)), [], decode)
        return context.get_dummy_value()

    return types.void(codes, types.int64, types.float32, types.float32, numbers), generate
