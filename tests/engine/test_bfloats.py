"""Products of bfloat16 by the engine's own kernels are those of torch, whatever the shape."""

from __future__ import annotations

from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from drawn_products import (
    check_that_every_thread_multiplies,
    check_that_threads_change_no_bit,
    check_that_what_another_thread_does_not_end_is_made_once_more,
)
from flexflow_engine.cpu import instructions
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.products import bfloats, matmul
from flexflow_engine.products.matmul import HostProducts, PlainRows, Rows
from flexflow_engine.products.widening import WIDENED_TOKENS
from flexflow_engine.runtime.encoded_rows import EncodedRows
from flexflow_engine.testing.allocations import PeakAllocations
from flexflow_engine.testing.codec_suite import encoded, normal
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt8Codec, GroupQuantCodec
from processors import run_without

EPS = torch.finfo(torch.bfloat16).eps
SHAPES = [(32, 32), (33, 64), (61, 384), (300, 96), (1000, 2048), (300, 4160)]
"""Rows and columns: one tile, and more or less than whole ones, and than is multiplied at a time."""
ROWS, COLUMNS = 61, 384

pytestmark = pytest.mark.skipif(
    not instructions.has_bfloat_instructions(),
    reason="this processor has no instructions for bfloat16 (AMX, AVX512_BF16)",
)


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share products of any size, and kernels multiply plain numbers on any processor."""
    monkeypatch.setattr(matmul, "_SHARED_NUMBERS", 0)
    monkeypatch.setattr(bfloats, "has_amx", lambda: True)


@pytest.mark.parametrize("codec", [None, GroupInt4Codec(), GroupInt8Codec()], ids=["plain", "int4", "int8"])
@pytest.mark.parametrize("tokens", [1, 16, 33, 150, WIDENED_TOKENS + 3])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_products_are_those_of_the_numbers_rounded_once(
    workers: Workers, rows: int, columns: int, tokens: int, codec: GroupQuantCodec | None
) -> None:
    matrix, weight = matrix_of(codec, rows, columns)
    x, bias = random(tokens, columns), random(rows)
    exact = F.linear(x.double(), weight)
    bound = EPS * (exact.abs() + bias.abs()) + 1e-6 * F.linear(x.double().abs(), weight.abs())
    products = products_of(workers)
    with PeakAllocations() as peak:
        product = products.linear(x, matrix, bias)
    assert product.dtype == torch.bfloat16
    assert ((product.double() - exact - bias.double()).abs() <= bound).all()
    assert peak.peak_bytes <= product.nbytes + bfloats.bfloat_nbytes(tokens, [(rows, columns)])
    assert ((products.linear(x, matrix).double() - exact).abs() <= bound).all()


def test_whole_numbers_have_the_products_that_torch_makes(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums are exact in any order. Several matrices, one in parts, are multiplied at once."""
    x, weights = whole(70, COLUMNS), [whole(rows, COLUMNS) for rows in (300, 40, 61)]
    factors: list[matmul.Factor] = [
        ([PlainRows(weights[0])], whole(300)),
        ([PlainRows(weights[1]), PlainRows(weights[2])], None),
        ([PlainRows(weights[2])], whole(61).float()),
    ]
    found = products_of(workers).linear_each(x, factors)
    expected = [F.linear(x, weights[0], factors[0][1]), F.linear(x, torch.cat(weights[1:]))]
    bias = factors[2][1]
    assert bias is not None
    expected.append(F.linear(x, weights[2], bias.bfloat16()))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_matrices_of_several_pieces_are_multiplied_together_as_alone(workers: Workers, tokens: int) -> None:
    """Plain and encoded ones, of many columns and of rows that lie apart."""
    columns, x = SHAPES[-1][1], random(tokens, SHAPES[-1][1])
    apart = PlainRows(random(ROWS, columns + 64)[:, :columns])
    matrices = [matrix_of(codec, rows, columns)[0] for codec, rows in ((GroupInt4Codec(), 150), (None, 300))]
    matrices += [apart, matrix_of(GroupInt8Codec(), ROWS, columns)[0]]
    products = products_of(workers)
    found = products.linear_each(x, [([matrix], None) for matrix in matrices])
    assert all(torch.equal(product, products.linear(x, m)) for product, m in zip(found, matrices, strict=True))


def test_rows_that_come_next_are_asked_for_once() -> None:
    """Of the same piece, of another matrix, and none where they are decoded first or nothing follows."""
    kernels = import_module("flexflow_engine.products.bfloat_kernels")
    from flexflow_engine.products.product_table import Product  # noqa: PLC0415  # as above

    plain = Product(0, 0, encoded=10_000, stride=300, unit=100, rows=200, bias=0, out=0, out_stride=0)
    table = np.array([plain, plain._replace(encoded=90_000, stride=500), plain._replace(decoder=1)], np.int64)
    piece, end = (0, 64, 61, 96, 32), (3, 0, 0, 0, 0)
    of_next_piece = {(1, 32, 40, 0, 96): (90_000 + 32 * 500, 500), (2, 0, 40, 0, 96): (0, 0), end: (0, 0)}
    for following, expected in of_next_piece.items():
        assert kernels._wanted_after(table, piece, following, 0) == (10_000 + (64 + 29) * 300 + 96 * 2, 300)
        assert kernels._wanted_after(table, piece, following, 32) == expected
    for blocks in (*range(1, 12), 32):
        shares = [kernels._share_of((90_000, 500), block, blocks) for block in range(0, blocks, 2)]
        asked = [address + 500 * row for address, _, rows in shares for row in range(rows)]
        assert asked == [90_000 + 500 * row for row in range(32)]
    assert kernels._share_of((0, 0), 0, 8) == (0, 0, 0)


@pytest.mark.parametrize("shift", [0, 1])
def test_tokens_and_rows_may_lie_anywhere(workers: Workers, shift: int) -> None:
    """Apart from each other, and where only numbers of 16 bits are aligned."""
    tokens, weight = whole(40, 2 * COLUMNS + 7), whole(ROWS, 2 * COLUMNS + 5)
    x, rows = (matrix[:, shift : COLUMNS + shift] for matrix in (tokens, weight))
    bias = whole(ROWS + 1)[shift : ROWS + shift]
    product = products_of(workers).linear(x, PlainRows(rows), bias)
    assert torch.equal(product, F.linear(x.contiguous(), rows.contiguous(), bias))


@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_nothing_is_written_beside_the_products(workers: Workers, tokens: int) -> None:
    """A matrix's columns of a wider result, and no token behind the last."""
    from flexflow_engine.products.bfloat_products import BFloatProducts  # noqa: PLC0415  # it imports Numba
    from flexflow_engine.products.product_table import MatrixProduct  # noqa: PLC0415  # as above

    x, weight = whole(tokens, COLUMNS), whole(ROWS, COLUMNS)
    matrix = PlainRows(weight).bfloats
    assert matrix is not None
    result = torch.full((tokens + 20, ROWS + 9), 7.0, dtype=torch.bfloat16)
    product = MatrixProduct(matrix, None, result[:tokens, 5 : 5 + ROWS])
    BFloatProducts(workers).multiply(x, [product], threads=2)
    expected = torch.full_like(result, 7.0)
    expected[:tokens, 5 : 5 + ROWS] = F.linear(x, weight)
    assert torch.equal(result, expected)


def test_threads_change_no_bit() -> None:
    check_that_threads_change_no_bit(matrix_of(GroupInt4Codec(), 1000, 2048)[0], random(200, 2048))


def test_every_thread_multiplies_where_there_is_enough_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = import_module("flexflow_engine.products.bfloat_products")
    check_that_every_thread_multiplies(kernels, matrix_of(GroupInt4Codec(), 300)[0], random(200, COLUMNS), monkeypatch)


def test_blocks_that_another_thread_does_not_end_are_laid_out_once_more(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = import_module("flexflow_engine.products.bfloat_products")
    check_that_what_another_thread_does_not_end_is_made_once_more(
        kernels, matrix_of(GroupInt4Codec())[0], random(200, COLUMNS), workers, monkeypatch
    )


@pytest.mark.skipif(not instructions.has_amx(), reason="this processor has no AMX")
def test_amx_is_configured_as_before_when_a_kernel_has_ended() -> None:
    """Libraries configure it once for many products."""
    from flexflow_engine.cpu.jit import kernel  # noqa: PLC0415  # it imports Numba

    amx, tiles = (import_module(f"flexflow_engine.products.bfloat_{name}") for name in ("amx", "tiles"))

    @kernel
    def exchange(before: Any, wanted: Any) -> None:
        tiles.begin(before.ctypes.data, wanted.ctypes.data)

    found, mine = np.full(64, 255, np.uint8), np.frombuffer(amx.configuration(), np.uint8).copy()
    mine[48] = 3  # lines of the first tile
    nothing = np.zeros(64, np.uint8)
    with closing(Workers(1)) as workers:
        products, weight = products_of(workers), PlainRows(whole(ROWS, COLUMNS))
        for configured in (mine, nothing):
            exchange(found, configured)
            products.linear(whole(3, COLUMNS), weight)
            exchange(found, nothing)
            assert found.tolist() == configured.tolist()


@pytest.mark.parametrize(
    ("lacking", "tests"),
    [("amx", "rounded_once and int8 and 33 or anywhere or beside or finite"), ("avx512bf16", "anywhere or finite")],
    ids=["AMX", "vectors"],
)
def test_processors_with_fewer_instructions_make_the_same_products(tmp_path: Path, lacking: str, tests: str) -> None:
    """Kernels are compiled anew, for this processor's vectors, or to round as LLVM without bfloat16 does."""
    if lacking == "avx512bf16" and not instructions.has_amx():
        pytest.skip("this processor has no AMX")
    run_without([lacking], __file__, "-k", tests, cache=tmp_path)


def test_where_the_system_grants_no_amx_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    if not instructions.has_amx():
        pytest.skip("this processor has no AMX")
    monkeypatch.setattr(instructions, "_asks_for_amx", lambda: False)
    assert not instructions.has_bfloat_instructions.__wrapped__()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_its_token_and_its_row(workers: Workers, number: float) -> None:
    x, weight, products = random(35, COLUMNS), random(ROWS, COLUMNS), products_of(workers)
    expected = products.linear(x, PlainRows(weight))
    x[34, 200], weight[7, 5] = number, number
    product = products.linear(x, PlainRows(weight))
    assert not product[34].isfinite().any()
    assert not product[:, 7].isfinite().any()
    others = [row for row in range(ROWS) if row != 7]
    assert torch.equal(product[:34, others], expected[:34, others])


@pytest.mark.parametrize(("columns", "biases"), [(COLUMNS + 32, ROWS), (COLUMNS - 32, ROWS), (COLUMNS, ROWS - 1)])
def test_shapes_that_do_not_fit_are_refused(workers: Workers, columns: int, biases: int) -> None:
    with pytest.raises(ValueError, match="don't fit"):
        products_of(workers).linear(whole(3, columns), PlainRows(whole(ROWS, COLUMNS)), whole(biases))


def test_columns_of_tokens_may_lie_apart(workers: Workers) -> None:
    x, weight = whole(COLUMNS, 40).T, whole(ROWS, COLUMNS)
    assert torch.equal(products_of(workers).linear(x, PlainRows(weight)), F.linear(x, weight))


@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (40, 2**20), (12288, 49152), (50272, 12288)])
def test_the_bound_holds_for_any_number_of_threads(threads: int, rows: int, columns: int) -> None:
    kernels = import_module("flexflow_engine.products.bfloat_products")
    cut = bfloats.cut_bfloats(rows, columns, threads)
    assert 1 <= cut.threads <= threads
    assert cut.rows >= bfloats.TILE_ROWS
    for tokens in (1, 65, WIDENED_TOKENS):
        room = kernels._Room(cut, tokens=tokens, columns=columns, decodes=True)
        assert room.nbytes <= bfloats.bfloat_nbytes(tokens, [(rows, columns)])


@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "multiplied"),
    [
        (torch.bfloat16, 32, 64, True),
        (torch.bfloat16, 31, 64, False),
        (torch.bfloat16, 32, 48, False),
        (torch.float32, 32, 64, False),
    ],
)
def test_which_matrices_the_kernels_multiply(dtype: torch.dtype, rows: int, columns: int, multiplied: bool) -> None:
    assert (PlainRows(torch.zeros((rows, columns), dtype=dtype)).bfloats is not None) == multiplied


def test_numbers_that_are_to_be_widened_are(workers: Workers) -> None:
    """A profile has measured float32 to be faster: products are not rounded twice then."""
    matrix = PlainRows(random(ROWS, COLUMNS))
    x = random(8, COLUMNS)
    products = HostProducts(workers, torch.bfloat16, 1, kept_nbytes=0)
    assert torch.equal(products.linear(x, matrix), F.linear(x.float(), matrix.part(0, ROWS, None).float()).bfloat16())
    assert products._kernels is None


def products_of(workers: Workers) -> HostProducts:
    return HostProducts(workers, torch.bfloat16, None, kept_nbytes=0)


def matrix_of(codec: GroupQuantCodec | None, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Rows, torch.Tensor]:
    """A matrix [rows, columns], and its numbers, float64; encoded in units of which the last is padded."""
    if codec is None:
        weight = random(rows, columns)
        plain = PlainRows(weight)
        assert plain.bfloats is not None
        return plain, weight.double()
    shape = 23, columns
    units = -(-rows // shape[0])
    data = encoded(codec, normal(units, shape, "bfloat16", seed=1), "bfloat16")
    numbers = torch.zeros((units, *shape), dtype=torch.bfloat16)
    codec.decode(data, numbers)
    matrix = EncodedRows(codec, data, shape, rows=rows)
    assert matrix.bfloats is not None
    return matrix, numbers.view(-1, columns)[:rows].double()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def whole(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()
