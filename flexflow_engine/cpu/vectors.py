"""What kernels' LLVM instructions on vectors are written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from llvmlite.binding import llvm_version_info  # type: ignore[import-untyped]  # as above

from flexflow_engine.cpu.jit import has_feature

_BYTE, _WORD, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOAT_NBYTES = 4
_BFLOAT_SINCE = (20,)
"""The version of LLVM that makes instructions of operations on vectors of bfloat16. Older ones call functions that are
not there.
"""


class BFloat(ir.Type):  # type: ignore[misc]  # untyped, as all of llvmlite
    """LLVM's type of bfloat16, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"


def filled(kind: Any, value: Any) -> Any:
    """A constant vector of one value."""
    return ir.Constant(kind, [value] * kind.count)


def everywhere(builder: Any, number: Any, count: int) -> Any:
    """A vector of one number."""
    kind = ir.VectorType(number.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _WORD(0))
    return shuffled(builder, one, one, [0] * count)


def shuffled(builder: Any, a: Any, b: Any, places: Sequence[int]) -> Any:
    """The elements of both, one behind the other, that lie at `places`."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_WORD, len(places)), list(places)))


def transposed(builder: Any, vectors: Sequence[Any]) -> list[Any]:
    """The first elements of all n vectors, their second ones, and so on, in vectors as long as before; n is a power of
    two, and of a vector's length a divisor.
    """
    for _ in range(len(vectors).bit_length() - 1):
        vectors = _riffled(builder, vectors)
    return list(vectors)


def _riffled(builder: Any, vectors: Sequence[Any]) -> list[Any]:
    """The elements of vector i and of vector i + n / 2 in turn, of their first halves and of their second ones."""
    half, count = len(vectors) // 2, vectors[0].type.count
    turns = [[place for i in range(first, first + count // 2) for place in (i, count + i)] for first in (0, count // 2)]
    return [
        shuffled(builder, a, b, turn) for a, b in zip(vectors[:half], vectors[half:], strict=True) for turn in turns
    ]


def sums(builder: Any, vectors: Sequence[Any]) -> Any:
    """Of the elements of each of n vectors, a vector [n]; n is as of `transposed`."""
    count = len(vectors)
    while len(vectors) > 1:
        turns = _riffled(builder, vectors)
        vectors = [builder.fadd(first, second) for first, second in zip(turns[::2], turns[1::2], strict=True)]
    total = vectors[0]
    while total.type.count > count:
        half = total.type.count // 2
        first, second = (shuffled(builder, total, total, range(start, start + half)) for start in (0, half))
        total = builder.fadd(first, second)
    return total


def multiplied_and_added(builder: Any, a: Any, b: Any, summand: Any) -> Any:
    """a * b + summand of vectors of float32, rounded once."""
    kind = a.type
    function = ir.FunctionType(kind, [kind] * 3)
    return builder.call(builder.module.declare_intrinsic(f"llvm.fma.v{kind.count}f32", [], function), [a, b, summand])


def has_bfloat_vectors() -> bool:
    """Whether the processor has vectors of bfloat16, and LLVM knows what to do with them."""
    return bool(has_feature("avx512bf16") and llvm_version_info >= _BFLOAT_SINCE)


def bfloat_bits(builder: Any, numbers: Any) -> Any:
    """Of the bfloat16 next to each float32, ties to even. Subnormal numbers may be taken for zero; of NaN only those
    that a bfloat16 can be stay so.
    """
    count = numbers.type.count
    words, shorts = ir.VectorType(_WORD, count), ir.VectorType(ir.IntType(16), count)
    if has_bfloat_vectors():
        return builder.bitcast(builder.fptrunc(numbers, ir.VectorType(BFloat(), count)), shorts)
    bits = builder.bitcast(numbers, words)
    odd = builder.and_(builder.lshr(bits, filled(words, 16)), filled(words, 1))
    rounded = builder.add(builder.add(bits, filled(words, 0x7FFF)), odd)
    halves = builder.bitcast(rounded, ir.VectorType(ir.IntType(16), 2 * count))
    return shuffled(builder, halves, halves, range(1, 2 * count, 2))


def repeated(
    builder: Any, count: Any, begin: Sequence[Any], body: Callable[[Any, Sequence[Any]], Sequence[Any]]
) -> list[Any]:
    """A loop, at least one round: `body` takes a number from 0 on and what the round before returned, `begin` in the
    first one; what the last one returned.
    """
    before = builder.block
    loop, after = (builder.append_basic_block(name) for name in ("loop", "after"))
    builder.branch(loop)
    builder.position_at_end(loop)
    index = builder.phi(_LONG)
    carried = [builder.phi(value.type) for value in begin]
    results = list(body(index, carried))
    following = builder.add(index, _LONG(1))
    for phi, first, last in zip([index, *carried], [_LONG(0), *begin], [following, *results], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return results


def vector_at(builder: Any, kind: Any, numbers: Any, place: Any) -> Any:
    """So many of the numbers, float32 by pointer, that lie from a place on."""
    return builder.load(builder.bitcast(builder.gep(numbers, [place]), kind.as_pointer()), align=_FLOAT_NBYTES)


def put_vector(builder: Any, vector: Any, numbers: Any, place: Any) -> None:
    """A vector to these."""
    target = builder.bitcast(builder.gep(numbers, [place]), vector.type.as_pointer())
    builder.store(vector, target, align=_FLOAT_NBYTES)


def at(builder: Any, address: Any, nbytes: Any, kind: Any) -> Any:
    """A pointer to what lies so many bytes behind an address."""
    return builder.inttoptr(builder.add(address, nbytes), kind.as_pointer())


def ask_for(builder: Any, address: Any, *, into: int) -> None:
    """A line of memory that will be read: any number may be asked for. into: the nearest cache is 3, the second 2."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _WORD, _WORD, _WORD])
    function = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE.as_pointer()], kind)
    builder.call(function, [builder.inttoptr(address, _BYTE.as_pointer()), _WORD(0), _WORD(into), _WORD(1)])
