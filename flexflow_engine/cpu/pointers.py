"""Memory inside kernels, by address: pages of many tensors in one call, and no bounds or reference counts.

A pointer is Numba's CPointer: `pointer[i]` reads and writes, and i is not wrapped around, so that loops vectorise.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import types

from flexflow_engine.cpu.jit import intrinsic
from flexflow_engine.cpu.vectors import ask_for

LINE_NBYTES = 64
"""Of a cache line that is asked for. Where lines are longer, some are asked for twice."""
_WORD = ir.IntType(32)


@intrinsic
def pointer(_: Any, address: Any, like: Any) -> Any:
    """In a kernel: `address`, an integer, as a pointer to elements of the type of the array `like`.

    An array that a kernel made itself is freed after the last use of its name, whatever points to it: let it be the
    argument of another kernel, which takes its address.
    """
    result = types.CPointer(like.dtype)  # type: ignore[no-untyped-call]  # numba says no types

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(address, like), generate


@intrinsic
def offset(_: Any, start: Any, count: Any) -> Any:
    """In a kernel: a pointer `count` elements behind `start`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return start(start, types.int64), generate


@intrinsic
def prefetch(_: Any, address: Any) -> Any:
    """In a kernel: ask for the cache line at `address`, an integer; any number may be asked for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ask_for(builder, arguments[0], into=3)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def store_pair(_: Any, target: Any, index: Any, pair: Any) -> Any:
    """In a kernel: write uint32 `pair`, low half first, to elements 2 index and 2 index + 1 of 16 bits.

    One store of both vectorises; two would be interleaved.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.gep(arguments[0], [builder.shl(arguments[1], ir.Constant(ir.IntType(64), 1))])
        builder.store(arguments[2], builder.bitcast(place, _WORD.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(target, types.int64, types.uint32), generate


@intrinsic
def take_next(_: Any, counters: Any, index: Any) -> Any:
    """In a kernel: what an element of an array of int64 was before this added one; each of several threads gets another
    number.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _element(context, builder, signature, arguments), ir.IntType(64)(1), "seq_cst")

    return types.int64(counters, types.int64), generate


@intrinsic
def set_flag(_: Any, flags: Any, index: Any) -> Any:
    """In a kernel: set an element of an array of int64 to one, for threads to see with all that was written before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(ir.IntType(64)(1), _element(context, builder, signature, arguments), "release", 8)
        return context.get_dummy_value()

    return types.void(flags, types.int64), generate


@intrinsic
def has_flag(_: Any, flags: Any, index: Any) -> Any:
    """In a kernel: whether it is set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flag = builder.load_atomic(_element(context, builder, signature, arguments), "acquire", 8)
        return builder.icmp_unsigned("!=", flag, ir.IntType(64)(0))

    return types.boolean(flags, types.int64), generate


def _element(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Pointer to an element of an array."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


@intrinsic
def call_decoder(_: Any, function: Any, encoded: Any, settings: Any, first: Any, count: Any, out: Any) -> Any:
    """In a kernel: call the C function at address `function`, one of a `KernelDecoder`; all arguments are integers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, address = ir.IntType(64), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [address, address, word, word, address])
        target, data, numbers, start, size, place = arguments
        pointers = [builder.inttoptr(x, address) for x in (data, numbers, place)]
        builder.call(builder.inttoptr(target, kind.as_pointer()), [pointers[0], pointers[1], start, size, pointers[2]])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def call_product(_: Any, function: Any, encoded: Any, settings: Any, span: Any, out: Any) -> Any:
    """In a kernel: call the C function at address `function`, one of `PageProducts`. span: first and count, integers
    as are function, encoded and settings; out: pointers to vectors and weights, and the stride.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, address = ir.IntType(64), ir.IntType(8).as_pointer()
        floats = ir.FloatType().as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [address, address, word, word, floats, floats, word])
        target, data, numbers, span, out = arguments
        source, settings = (builder.inttoptr(x, address) for x in (data, numbers))
        places = [builder.extract_value(pair, i) for pair, count in ((span, 2), (out, 3)) for i in range(count)]
        builder.call(builder.inttoptr(target, kind.as_pointer()), [source, settings, *places])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, span, out), generate


@intrinsic
def call_integer_decoder(_: Any, function: Any, encoded: Any, settings: Any, span: Any, out: Any) -> Any:
    """In a kernel: call the C function at address `function`, of an `IntegerDecoder`. span: first and count; out: where
    integers, scales and lows go; all are integers.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, address = ir.IntType(64), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [address, address, word, word, address, address, address])
        target, data, numbers, span, places = arguments
        first, count = (builder.extract_value(span, i) for i in range(2))
        found = [data, numbers, *(builder.extract_value(places, i) for i in range(3))]
        source, settings, *outs = [builder.inttoptr(x, address) for x in found]
        builder.call(builder.inttoptr(target, kind.as_pointer()), [source, settings, first, count, *outs])
        return context.get_dummy_value()

    two, three = (types.UniTuple(types.int64, n) for n in (2, 3))  # type: ignore[no-untyped-call]  # numba says no types
    return types.void(*[types.int64] * 3, two, three), generate


@intrinsic
def call_checksum(_: Any, function: Any, checksum: Any, data: Any, nbytes: Any) -> Any:
    """In a kernel: uint32 f(uint32 checksum, const uint8 *data, size_t nbytes), the C function f being at address
    `function`; all arguments are integers.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(_WORD, [_WORD, address, ir.IntType(64)])
        target, before, place, count = arguments
        function = builder.inttoptr(target, kind.as_pointer())
        return builder.call(function, [before, builder.inttoptr(place, address), count])

    return types.uint32(types.int64, types.uint32, types.int64, types.int64), generate
