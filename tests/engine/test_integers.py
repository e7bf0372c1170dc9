"""Products of integers are those of the decoded matrix and of tokens that are rounded group by group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from drawn_products import (
    check_that_every_thread_multiplies,
    check_that_threads_change_no_bit,
    check_that_what_another_thread_does_not_end_is_made_once_more,
)
from flexflow_engine.cpu.instructions import has_integer_instructions
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.products import integers, matmul
from flexflow_engine.products.matmul import HostProducts
from flexflow_engine.products.widening import WIDENED_TOKENS, product_nbytes
from flexflow_engine.runtime.encoded_rows import EncodedRows
from flexflow_engine.testing.allocations import PeakAllocations
from flexflow_engine.testing.codec_suite import encoded, normal
from flexflow_plugins.codecs.group_quant import (
    GroupInt4Codec,
    GroupInt4Options,
    GroupInt8Codec,
    GroupInt8Options,
    GroupQuantCodec,
)
from processors import run_without

CODECS: list[GroupQuantCodec] = [
    GroupInt4Codec(GroupInt4Options(int8_activations=True)),
    GroupInt4Codec(GroupInt4Options(int8_activations=True, group_size=128)),
    GroupInt4Codec(GroupInt4Options(int8_activations=True, group_size=12)),
    GroupInt4Codec(GroupInt4Options(int8_activations=True, encoder="minmax")),
    GroupInt8Codec(GroupInt8Options(int8_activations=True, group_size=128)),
]
COLUMNS = 384
"""Whole groups of every codec."""
UNITS, UNIT_ROWS, ROWS = 3, 23, 61
"""The last unit is padded, and neither unit nor matrix are whole tiles."""

pytestmark = pytest.mark.skipif(
    not has_integer_instructions(), reason="this processor has no instructions for 8-bit integers (VNNI)"
)


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share products of any size."""
    monkeypatch.setattr(matmul, "_SHARED_NUMBERS", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 33, 600])
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.key)
def test_products_are_those_of_rounded_tokens(
    workers: Workers, codec: GroupQuantCodec, tokens: int, dtype: torch.dtype
) -> None:
    matrix, weight = matrix_of(codec)
    x, bias = random((tokens, COLUMNS), dtype), random((ROWS,), dtype)
    rounded = rounded_by_group(x, codec.group_size)
    exact = F.linear(rounded, weight)
    bound = torch.finfo(dtype).eps * (exact.abs() + bias.abs()) + 1e-5 * F.linear(rounded.abs(), weight.abs())
    products = HostProducts(workers, dtype, None, kept_nbytes=0)
    with PeakAllocations() as peak:
        product = products.linear(x, matrix, bias)
    assert product.dtype == dtype
    assert ((product.double() - exact - bias.double()).abs() <= bound).all()
    assert peak.peak_bytes <= product.nbytes + integers.integer_nbytes(tokens, [(ROWS, COLUMNS)])
    assert ((products.linear(x, matrix).double() - exact).abs() <= bound).all()


def test_several_matrices_are_multiplied_at_once_and_tokens_may_lie_apart(workers: Workers) -> None:
    (first, _), (second, _) = matrix_of(CODECS[0]), matrix_of(CODECS[4], seed=9)
    x = random((40, 2 * COLUMNS), torch.bfloat16)[:, COLUMNS:]
    products = HostProducts(workers, torch.bfloat16, None, kept_nbytes=0)
    together = products.linear_each(x, [([first, second], None), ([first], random((ROWS,), torch.bfloat16))])
    assert torch.equal(together[0], torch.cat([products.linear(x, m) for m in (first, second)], dim=1))
    assert torch.equal(together[1], products.linear(x, first, random((ROWS,), torch.bfloat16)))


def test_threads_change_no_bit() -> None:
    check_that_threads_change_no_bit(matrix_of(CODECS[0])[0], random((200, COLUMNS), torch.bfloat16))


def test_every_thread_multiplies_where_there_is_enough_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("flexflow_engine.products.integer_products")
    check_that_every_thread_multiplies(
        kernels, matrix_of(CODECS[0])[0], random((200, COLUMNS), torch.bfloat16), monkeypatch
    )


def test_tiles_that_another_thread_does_not_end_are_rounded_once_more(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("flexflow_engine.products.integer_products")
    check_that_what_another_thread_does_not_end_is_made_once_more(
        kernels, matrix_of(CODECS[0])[0], random((200, COLUMNS), torch.bfloat16), workers, monkeypatch
    )


@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (64, 64), (4000, 64), (3000, 768), (300, 4096)])
@pytest.mark.parametrize("group_size", [4, 64])
@pytest.mark.parametrize("tokens", [1, 65, 600])
def test_the_bound_holds_for_any_number_of_threads(
    threads: int, rows: int, columns: int, group_size: int, tokens: int
) -> None:
    kernels = pytest.importorskip("flexflow_engine.products.integer_products")
    cut = integers.cut_integers(rows, columns, threads)
    assert cut.rows * max(cut.threads, 1) >= min(rows, cut.rows)
    room = kernels._Room(cut, tokens=min(tokens, WIDENED_TOKENS), columns=columns, group_size=group_size)
    assert room.nbytes <= integers.integer_nbytes(tokens, [(rows, columns)])


def test_a_matrix_of_numbers_and_one_of_integers_take_the_memory_of_one(workers: Workers) -> None:
    (numbers, _), (of_integers, _) = matrix_of(GroupInt4Codec()), matrix_of(CODECS[0])
    x, products = random((40, COLUMNS), torch.bfloat16), HostProducts(workers, torch.bfloat16, None, kept_nbytes=0)
    shapes = [(ROWS, COLUMNS)]
    with PeakAllocations() as peak:
        for matrix in (numbers, of_integers, numbers, of_integers):
            nbytes = products.linear(x, matrix).nbytes
    bound = max(product_nbytes(len(x), shapes, makes_rows=True), integers.integer_nbytes(len(x), shapes))
    assert peak.peak_bytes <= nbytes + bound


def test_numbers_beyond_float16_are_infinite(workers: Workers) -> None:
    matrix, weight = matrix_of(CODECS[0])
    x = random((5, COLUMNS), torch.float16) * 5000
    product = HostProducts(workers, torch.float16, None, kept_nbytes=0).linear(x, matrix)
    exact = F.linear(x.double(), weight).abs()
    assert exact.max() > 70000
    assert product[exact > 70000].isinf().all()
    assert product[exact < 60000].isfinite().all()


def test_one_large_number_costs_only_its_group_its_precision(workers: Workers) -> None:
    matrix, weight = matrix_of(CODECS[0])
    x = random((1, COLUMNS), torch.float32)
    x[0, 3] = 1000.0
    product = HostProducts(workers, torch.float32, None, kept_nbytes=0).linear(x, matrix)
    without, group = x.clone(), CODECS[0].group_size
    without[0, :group] = 0
    alone = torch.zeros_like(x)
    alone[0, :group] = x[0, :group]
    rest = product.double() - F.linear(rounded_by_group(alone, group), weight)
    assert (rest - F.linear(without.double(), weight)).abs().max() < 0.02 * F.linear(without.double(), weight).std()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_has_no_numbers_and_hurts_no_other(workers: Workers, number: float) -> None:
    matrix, _ = matrix_of(CODECS[0])
    x = random((35, COLUMNS), torch.bfloat16)
    products = HostProducts(workers, torch.bfloat16, None, kept_nbytes=0)
    expected = products.linear(x, matrix)
    x[34, 200] = number
    product = products.linear(x, matrix)
    assert product[34].isnan().all()
    assert torch.equal(product[:34], expected[:34])


@pytest.mark.parametrize("smallness", [0.0, 1e-40, 1e-30])
def test_tokens_of_zeros_and_of_tiny_numbers_are_fine(workers: Workers, smallness: float) -> None:
    matrix, weight = matrix_of(CODECS[0])
    x = random((3, COLUMNS), torch.float32) * smallness
    product = HostProducts(workers, torch.float32, None, kept_nbytes=0).linear(x, matrix)
    exact = F.linear(x.double(), weight)
    assert (product.double() - exact).abs().max() <= 0.02 * exact.abs().max() + 1e-34


def test_damaged_groups_have_no_numbers(workers: Workers) -> None:
    values = normal(1, (ROWS, COLUMNS), "float32")
    values[0, 7, 5] = torch.nan
    for codec in CODECS:
        matrix = EncodedRows(codec, encoded(codec, values, "float32"), (ROWS, COLUMNS), rows=ROWS)
        x = random((2, COLUMNS), torch.float32)
        product = HostProducts(workers, torch.float32, None, kept_nbytes=0).linear(x, matrix)
        assert product[:, 7].isnan().all()
        assert product.isfinite().sum() == 2 * (ROWS - 1)


def test_numbers_are_multiplied_where_the_codec_the_processor_or_the_shape_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = normal(1, (4, 100), "float32")
    assert matrix_of(GroupInt4Codec())[0].integers is None
    assert matrix_of(CODECS[0])[0].integers is not None
    split = EncodedRows(CODECS[0], encoded(CODECS[0], values, "float32"), (4, 100), rows=4)
    assert split.integers is None, "a group would be of two rows"
    odd = GroupInt4Codec(GroupInt4Options(int8_activations=True, group_size=50))
    assert EncodedRows(odd, encoded(odd, values, "float32"), (4, 100), rows=4).integers is None
    monkeypatch.setattr(integers, "has_integer_instructions", lambda: False)
    assert matrix_of(CODECS[0])[0].integers is None


def test_processors_with_half_as_long_vectors_make_the_same_numbers(tmp_path: Path) -> None:
    """Kernels are compiled anew, for this processor without AVX-512."""
    if not has_short_vectors():
        pytest.skip("this processor has no AVX-VNNI")
    test = f"{__file__}::test_products_are_those_of_rounded_tokens"
    run_without(["avx512", "evex"], test, "-k", "33 and not float16", cache=tmp_path)


def matrix_of(codec: GroupQuantCodec, seed: int = 1) -> tuple[EncodedRows, torch.Tensor]:
    """A matrix [ROWS, COLUMNS], and its numbers, float64."""
    shape = UNIT_ROWS, COLUMNS
    data = encoded(codec, normal(UNITS, shape, "float32", seed=seed), "float32")
    numbers = torch.zeros((UNITS, *shape))
    codec.decode(data, numbers)
    return EncodedRows(codec, data, shape, rows=ROWS), numbers.view(-1, COLUMNS)[:ROWS].double()


def rounded_by_group(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Each group of a token as whole multiples of a 127th of its largest number; float64."""
    groups = x.float().view(len(x), -1, group_size)
    scales = groups.abs().amax(2, keepdim=True) / 127
    return (torch.round(groups * (1 / scales)).double() * scales.double()).nan_to_num().view(x.shape)


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def has_short_vectors() -> bool:
    from flexflow_engine.cpu.jit import has_feature  # noqa: PLC0415  # compiled code is of no use elsewhere

    return has_feature("avxvnni")
