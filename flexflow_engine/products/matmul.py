"""Products on the host: some rows of a matrix at a time, which threads take one part after another; or one call of
torch for its own threads, where nothing else wants a core and that is faster.

Where the matrix isn't there in the numbers that the processor multiplies fastest, a thread makes those rows of what is
there, and multiplies them while they are in the processor's cache. torch emulates 16-bit products that the processor
has no instructions for: with AVX2 alone those of bfloat16 run at a fifth of the float32 rate for 256 tokens, and those
of float16 at a quarter even with AVX-512. So 16-bit numbers are widened to float32, and encoded ones decoded to it;
sums are float32, and the result is rounded once. From how many tokens on that is faster, a hardware profile has
measured. Where a codec says so, encoded rows are multiplied as 8-bit integers (`integer_products`), and bfloat16 is
multiplied by kernels of the engine's own where these are faster than torch's (`bfloat_products`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.tier import HOST
from flexflow_engine.cpu.arena import Arena
from flexflow_engine.cpu.settings import torch_team
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.products.bfloats import multiplies_plain, plain_matrix
from flexflow_engine.products.kernel_products import KernelProducts
from flexflow_engine.products.product_table import Matrix, MatrixProduct
from flexflow_engine.products.widening import WIDENED_FROM, WIDENED_TOKENS, Cut, cut_rows

_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}

_SHARED_FROM = {1: 2**24, 2: 2**24, 4: 2**22}
"""Multiplications from which on threads share products of numbers of so many bytes: the caller alone needs a tenth of a
millisecond for fewer, and half of that passes until another thread is awake.
"""
_SHARED_NUMBERS = 2**20
"""Of matrices, that threads share for any number of tokens: as long takes it to read them, or to make them."""

Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""As `torch.nn.functional.linear`."""


class Rows(Protocol):
    """A matrix [out_features, in_features] where it can be multiplied."""

    @property
    def out_features(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype | None:
        """Of its numbers as they lie there; None where they are encoded."""

    @property
    def integers(self) -> Matrix | None:
        """The same matrix where it is to be multiplied as 8-bit integers."""

    @property
    def bfloats(self) -> Matrix | None:
        """The same matrix where the engine's own kernels multiply it by tokens in bfloat16."""

    def part(self, first: int, stop: int, room: torch.Tensor | None) -> torch.Tensor:
        """Rows [first, stop), made in a room [rows, in_features], in its dtype; without one, where and as they are.

        Called from several threads at once.
        """


Factor = tuple[Sequence[Rows], torch.Tensor | None]
"""A matrix, in parts of adjoining rows, and its bias."""


class PlainRows:
    """A matrix as torch has it."""

    integers = None

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self.out_features, self.dtype = len(weight), weight.dtype

    @cached_property
    def bfloats(self) -> Matrix | None:
        return plain_matrix(self._weight)

    def part(self, first: int, stop: int, room: torch.Tensor | None) -> torch.Tensor:
        rows = self._weight if stop - first == self.out_features else self._weight[first:stop]
        return rows if room is None else room.copy_(rows)


def _integer_kernels() -> type[KernelProducts]:
    from flexflow_engine.products.integer_products import IntegerProducts  # noqa: PLC0415  # it imports Numba

    return IntegerProducts


def _bfloat_kernels() -> type[KernelProducts]:
    from flexflow_engine.products.bfloat_products import BFloatProducts  # noqa: PLC0415  # as above

    return BFloatProducts


class _Product(NamedTuple):
    """Of a part of a matrix, plus what it has of the bias; and where it goes."""

    matrix: Rows
    bias: torch.Tensor | None
    output: torch.Tensor


class HostProducts:
    """Products by some threads of the engine's, one at a time.

    Changing state: `_room`, memory for the parts of all threads, and `_results`, memory for results; both are kept from
    product to product: fresh memory is slow to touch. `_kernels`, while the last products were by kernels of the
    engine's own; they have memory of their own, and then `_room` has none.
    """

    def __init__(
        self,
        workers: Workers,
        dtype: torch.dtype,
        float32_from: int | None,
        *,
        kept_nbytes: int,
    ) -> None:
        """dtype: of what is multiplied with. float32_from: tokens from which on float32 is faster; None: never.
        kept_nbytes: at most so many are kept for the next results.
        """
        self._workers = workers
        self._results = Arena(kept_nbytes)
        self._float32_from = float32_from
        self.made_dtype = dtype if float32_from is None else torch.float32
        """In which encoded rows are made."""
        self._room = torch.empty(0, dtype=torch.uint8)
        self._kernels: KernelProducts | None = None

    def linear(self, x: torch.Tensor, matrix: Rows, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, in_features] times the transpose, plus bias [out_features]; [N, out_features] in x's dtype."""
        return self.linear_each(x, [([matrix], bias)])[0]

    def linear_each(self, x: torch.Tensor, factors: Sequence[Factor]) -> list[torch.Tensor]:
        """The same with several matrices and their biases: threads that have done one go on with the next, and wait
        for each other once.
        """
        tokens = len(x)
        outputs = [self._results.empty((tokens, sum(rows.out_features for rows in f[0])), x.dtype) for f in factors]
        products = [p for factor, output in zip(factors, outputs, strict=True) for p in _products(factor, output)]
        alike: dict[tuple[torch.dtype, bool], list[_Product]] = {}
        by_kernels: dict[tuple[Callable[[], type[KernelProducts]], int], list[MatrixProduct]] = {}
        for product in products:
            dtype = self._dtype_of(x.dtype, tokens, product.matrix)
            kernels, matrix = _integer_kernels, product.matrix.integers
            if matrix is None and x.dtype == dtype == torch.bfloat16:
                kernels, matrix = _bfloat_kernels, product.matrix.bfloats
            if matrix is None:
                alike.setdefault((dtype, product.matrix.dtype != dtype), []).append(product)
            else:
                several = by_kernels.setdefault((kernels, matrix.group_size), [])
                several.append(MatrixProduct(matrix, product.bias, product.output))
        if alike:
            self._kernels = None  # memory is counted for one of them
        for (dtype, makes_rows), numbers in alike.items():
            self._multiply(x, dtype, numbers, makes_rows=makes_rows)
        for (kernels, _), some in by_kernels.items():
            self._multiply_by(kernels(), x, some)
        return outputs

    def forget_results(self) -> None:
        """Give back what is kept for the next ones: other memory is needed now."""
        self._results.clear()

    def _dtype_of(self, dtype: torch.dtype, tokens: int, matrix: Rows) -> torch.dtype:
        """In which a product is computed; what must be decoded is as soon made in one as in another."""
        if matrix.dtype is None:
            return self.made_dtype
        return torch.float32 if self._float32_from is not None and tokens >= self._float32_from else dtype

    def _multiply(self, x: torch.Tensor, dtype: torch.dtype, products: Sequence[_Product], *, makes_rows: bool) -> None:
        """In `dtype`, some rows of a matrix at a time. makes_rows: in rooms, of what there is."""
        rows, (tokens, columns) = [product.matrix.out_features for product in products], x.shape
        most_threads = self._threads(columns * sum(rows), tokens, itemsize=dtype.itemsize)
        cuts = [cut_rows(count, columns, most_threads) for count in rows]
        most = max(cut.rows for cut in cuts)
        threads = max(cut.threads * cut.rows for cut in cuts) // most  # no more memory than one of them takes
        rooms = self._rooms(Cut(threads, most), columns, dtype) if makes_rows else None
        parts = [
            (product, first, min(first + cut.rows, count))
            for product, cut, count in zip(products, cuts, rows, strict=True)
            for first in range(0, count, cut.rows)
        ]
        for start in range(0, tokens, WIDENED_TOKENS):
            place = slice(start, start + WIDENED_TOKENS)
            self._workers.draw(
                partial(_multiply_part, parts, x[place].to(dtype), place, rooms), len(parts), threads=threads
            )

    def _threads(self, numbers: int, tokens: int, *, itemsize: int) -> int:
        """That share products with so many numbers, of so many bytes each."""
        shared = numbers >= _SHARED_NUMBERS or tokens * numbers >= _SHARED_FROM[itemsize]
        return self._workers.threads if shared else 1

    def _multiply_by(self, kind: type[KernelProducts], x: torch.Tensor, products: Sequence[MatrixProduct]) -> None:
        """With matrices of one group size."""
        if not isinstance(self._kernels, kind):
            self._room = torch.empty(0, dtype=torch.uint8)  # as above
            self._kernels = kind(self._workers)
        numbers = x.shape[1] * sum(product.matrix.rows for product in products)
        if not any(product.matrix.is_encoded for product in products):
            numbers //= kind.plain_speed
        self._kernels.multiply(x, products, threads=self._threads(numbers, len(x), itemsize=kind.item_nbytes))

    def _rooms(self, cut: Cut, columns: int, dtype: torch.dtype) -> torch.Tensor:
        numbers = cut.threads * cut.rows * columns
        if len(self._room) < numbers * dtype.itemsize:
            self._room = torch.empty(0, dtype=torch.uint8)  # the old one ends before the larger one begins
            self._room = torch.empty(numbers * dtype.itemsize, dtype=torch.uint8)
        return self._room.view(dtype)[:numbers].view(cut.threads, cut.rows, columns)


class TeamProducts(HostProducts):
    """The same, for jobs that do nothing but compute: numbers that torch multiplies as they are go to its own threads,
    which stay awake for the next product a little while, but wait for each other.
    """

    def _multiply(self, x: torch.Tensor, dtype: torch.dtype, products: Sequence[_Product], *, makes_rows: bool) -> None:
        if makes_rows or x.dtype != dtype:
            super()._multiply(x, dtype, products, makes_rows=makes_rows)
            return
        with torch_team(self._workers.threads):
            for product in products:
                _multiply_whole(product, x)


def _products(factor: Factor, output: torch.Tensor) -> Iterator[_Product]:
    """One for each part of the matrix; output [N, out_features]."""
    parts, bias = factor
    if len(parts) == 1:
        return iter((_Product(parts[0], bias, output),))
    sizes = [rows.out_features for rows in parts]
    return map(_Product, parts, biases_of(sizes, bias), torch.split(output, sizes, dim=1))


def biases_of(sizes: list[int], bias: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """What parts of so many rows each have of a matrix's bias."""
    return [None] * len(sizes) if bias is None else torch.split(bias, sizes)


def _multiply_whole(product: _Product, x: torch.Tensor) -> None:
    matrix, bias, output = product
    weight = matrix.part(0, matrix.out_features, None).T
    if bias is None:
        torch.mm(x, weight, out=output)
    else:
        torch.addmm(bias.to(x.dtype), x, weight, out=output)


def _multiply_part(
    parts: Sequence[tuple[_Product, int, int]],
    x: torch.Tensor,
    place: slice,
    rooms: torch.Tensor | None,
    thread: int,
    chosen: int,
) -> None:
    """One of the parts (a product, and which rows of its matrix) with the tokens that lie at `place`.

    rooms: [threads, rows, in_features] where rows are made.
    """
    (matrix, bias, output), first, stop = parts[chosen]
    rows = matrix.part(first, stop, None if rooms is None else rooms[thread, : stop - first])
    some = None if bias is None else bias[first:stop].to(x.dtype)
    output[place, first:stop] = F.linear(x, rows, some)


def multiplication(memory: str | None, products: HostProducts) -> Multiply:
    """How runs multiply plain numbers that lie in this kind of memory, to be measured; products: those of the host."""
    if memory != HOST:
        return F.linear
    return lambda x, weight, bias: products.linear(x, PlainRows(weight), bias)


def usual_float32_from(dtype: DType) -> int | None:
    """Tokens from which on float32 should be faster than `dtype` on this processor; None: never."""
    return WIDENED_FROM if is_emulated(getattr(torch, dtype), torch.cpu.get_capabilities()) else None


def usual_products(dtype: DType) -> type[HostProducts]:
    """Which should be faster with such numbers in jobs that do nothing but compute: torch brings its own kernels for
    16-bit ones, and leaves others to a BLAS.
    """
    if multiplies_plain(getattr(torch, dtype)):
        return HostProducts
    return TeamProducts if dtype != "float32" and usual_float32_from(dtype) is None else HostProducts


def is_emulated(dtype: torch.dtype, capabilities: Mapping[str, Any]) -> bool:
    """Whether a processor of these `torch.cpu.get_capabilities` multiplies such numbers by other instructions."""
    return dtype in _INSTRUCTIONS and not any(capabilities.get(name, False) for name in _INSTRUCTIONS[dtype])
