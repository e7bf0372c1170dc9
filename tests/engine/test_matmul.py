"""Products on the host: right, chosen by the processor, and within what the layout counts."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name
from hypothesis import given
from hypothesis import strategies as st

from flexflow_engine.cpu import arena
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.products import bfloats
from flexflow_engine.products.matmul import Factor, HostProducts, PlainRows, TeamProducts, is_emulated
from flexflow_engine.products.widening import WIDENED_FROM, WIDENED_TOKENS, cut_rows, product_nbytes
from flexflow_engine.runtime.encoded_rows import EncodedRows
from flexflow_engine.testing.allocations import PeakAllocations
from flexflow_plugins.codecs.group_quant import GroupInt8Codec


@pytest.fixture(params=[HostProducts, TeamProducts], ids=["by the engine's threads", "by torch's"])
def made_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[HostProducts]:
    """On any processor as on one without kernels for bfloat16: see test_bfloats."""
    monkeypatch.setattr(bfloats, "has_bfloat_instructions", lambda: False)
    products: type[HostProducts] = request.param
    return products


SHAPES = [(1, 7, 5), (WIDENED_FROM - 1, 64, 64), (WIDENED_FROM, 64, 3000), (1100, 96, 1500), (40, 5000, 300)]


@pytest.mark.parametrize("float32_from", [None, 1, WIDENED_FROM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "columns", "rows"), SHAPES)
def test_products_are_those_of_float32_rounded_once(  # noqa: PLR0917  # a shape is three of them
    workers: Workers,
    tokens: int,
    columns: int,
    rows: int,
    dtype: torch.dtype,
    float32_from: int | None,
    made_by: type[HostProducts],
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in [(tokens, columns), (rows, columns), (rows,)]
    )
    exact = F.linear(x.double(), weight.double(), bias.double())
    rounding = 2.0 * torch.finfo(dtype).eps * exact.abs() + 1e-5 * columns**0.5
    products = made_by(workers, dtype, float32_from, kept_nbytes=0)
    for with_bias, expected in ((bias, exact), (None, exact - bias.double())):
        product = products.linear(x, PlainRows(weight), with_bias)
        assert product.dtype == dtype
        assert ((product.double() - expected).abs() <= rounding + torch.finfo(dtype).eps * bias.abs()).all()


@pytest.mark.parametrize("float32_from", [None, 1])
def test_several_products_are_those_of_each(
    workers: Workers, float32_from: int | None, made_by: type[HostProducts]
) -> None:
    """Of plain and encoded matrices, with a bias or without, and more tokens than are multiplied at a time. A matrix
    in parts has their products side by side. Threads share all of them, and may not share one alone, so that a BLAS
    may add up in another order: all numbers are whole, and their sums exact, encoded ones too.
    """
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int, most: int) -> torch.Tensor:
        return torch.randint(-most, most, shape, generator=generator).bfloat16()

    x, weights = whole(WIDENED_TOKENS + 5, 64, most=8), whole(4, 300, 64, most=128)
    weights[3, :, :2] = torch.tensor([-128.0, 127.0])  # a group's scale is 1
    codec = GroupInt8Codec()
    encoded = torch.empty(3, codec.encoded_nbytes((100, 64), "bfloat16"), dtype=torch.uint8)
    codec.encode(weights[3].view(3, 100, 64), encoded)
    encoded_rows = EncodedRows(codec, encoded, (100, 64), rows=290)
    factors: list[Factor] = [
        ([PlainRows(weights[0])], None),
        ([encoded_rows], None),
        ([PlainRows(weights[1, :7]), PlainRows(weights[1, 7:])], whole(300, most=128)),
        ([PlainRows(weights[2].float())], whole(300, most=128).float()),
        ([encoded_rows, encoded_rows], None),
    ]
    products = made_by(workers, torch.bfloat16, float32_from, kept_nbytes=0)
    found = products.linear_each(x, factors)
    for product, (parts, bias) in zip(found, factors, strict=True):
        sizes = [part.out_features for part in parts]
        biases = [None] * len(parts) if bias is None else torch.split(bias, sizes)
        alone = [products.linear(x, part, some) for part, some in zip(parts, biases, strict=True)]
        assert torch.equal(product, torch.cat(alone, dim=1))


@pytest.mark.parametrize("kept_nbytes", [0, 1000, 2**30])
def test_results_stay_as_they_are_while_anybody_holds_them(
    workers: Workers, kept_nbytes: int, made_by: type[HostProducts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of products whose memory is kept for the next ones, as far as it goes."""
    monkeypatch.setattr(arena, "SMALLEST_NBYTES", 1)
    products = made_by(workers, torch.float32, None, kept_nbytes=kept_nbytes)
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for rows in (40, 300, 7, 300, 5):
        x, weight = torch.randn(20, 64), torch.randn(rows, 64)
        held.append((products.linear(x, PlainRows(weight))[3:, 1:], F.linear(x, weight)[3:, 1:]))
        products.linear(x, PlainRows(torch.zeros(rows, 64)))  # dropped at once
    products.forget_results()
    held.append((products.linear(torch.ones(20, 64), PlainRows(torch.ones(300, 64))), torch.full((20, 300), 64.0)))
    for product, expected in held:
        torch.testing.assert_close(product, expected)


def test_a_product_in_a_team_takes_a_bias_of_another_format(workers: Workers) -> None:
    x, weight, bias = torch.ones(3, 8), torch.ones(4, 8), torch.ones(4, dtype=torch.bfloat16)
    products = TeamProducts(workers, torch.float32, None, kept_nbytes=0)
    product = products.linear(x, PlainRows(weight), bias)
    assert torch.equal(product, torch.full((3, 4), 9.0))


@pytest.mark.parametrize(
    ("dtype", "capabilities", "emulated"),
    [
        (torch.bfloat16, {"avx2": True, "avx512_bf16": False}, True),
        (torch.bfloat16, {"avx512_bf16": True}, False),
        (torch.float16, {"avx512_bf16": True}, True),
        (torch.float16, {"amx_fp16": True}, False),
        (torch.float32, {}, False),
    ],
)
def test_what_a_processor_multiplies_itself(dtype: torch.dtype, capabilities: dict[str, bool], emulated: bool) -> None:
    assert is_emulated(dtype, capabilities) == emulated


@pytest.mark.parametrize(("float32_from", "widened"), [(None, False), (8, False), (7, True), (1, True)])
def test_numbers_are_widened_from_as_many_tokens_as_was_measured(
    workers: Workers, float32_from: int | None, widened: bool
) -> None:
    x, weight = torch.zeros((7, 64), dtype=torch.bfloat16), WatchedRows(torch.zeros((16, 64), dtype=torch.bfloat16))
    assert HostProducts(workers, torch.bfloat16, float32_from, kept_nbytes=0).linear(x, weight).dtype == torch.bfloat16
    assert weight.was_widened == widened


class WatchedRows(PlainRows):
    """Remembers whether a part was made in a room."""

    was_widened = False

    def part(self, first: int, stop: int, room: torch.Tensor | None) -> torch.Tensor:
        self.was_widened = self.was_widened or room is not None
        return super().part(first, stop, room)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "columns", "rows"), SHAPES)
def test_nothing_is_allocated_beyond_what_is_counted(  # noqa: PLR0917  # as above
    workers: Workers, tokens: int, columns: int, rows: int, dtype: torch.dtype, made_by: type[HostProducts]
) -> None:
    x, weight, bias = (torch.zeros(s, dtype=dtype) for s in [(tokens, columns), (rows, columns), (rows,)])
    products = made_by(workers, dtype, WIDENED_FROM, kept_nbytes=0)
    with PeakAllocations() as peak:
        product = products.linear(x, PlainRows(weight), bias)
    bound = product_nbytes(tokens, [(rows, columns)], makes_rows=dtype != torch.float32)
    assert peak.peak_bytes <= product.nbytes + bound


def test_products_drawn_together_take_no_more_than_the_largest() -> None:
    """41 rows have two at a time for each of 21 threads, and 40 one for each of 40."""
    x, weights = torch.zeros((1, 64)), [torch.zeros((rows, 64), dtype=torch.bfloat16) for rows in (41, 40)]
    with closing(Workers(40)) as workers, PeakAllocations() as peak:
        products = HostProducts(workers, torch.float32, None, kept_nbytes=0)
        found = products.linear_each(x, [([PlainRows(weight)], None) for weight in weights])
    bound = product_nbytes(1, [(41, 64)], makes_rows=True)
    assert peak.peak_bytes <= sum(product.nbytes for product in found) + bound


@given(st.integers(1, 3000), st.sampled_from([1, 64, 2048, 49_152, 2**22]), st.integers(1, 300))
def test_parts_cover_the_matrix_within_what_is_counted(rows: int, columns: int, threads: int) -> None:
    cut = cut_rows(rows, columns, threads)
    assert 1 <= cut.threads <= threads
    assert 1 <= cut.rows <= rows
    assert 4 * cut.threads * cut.rows * columns <= product_nbytes(0, [(rows, columns)], makes_rows=True)


def test_more_threads_than_rows_fit_take_no_more_memory() -> None:
    tokens, rows, columns = 4, 64, 2**17
    x, weight = (torch.zeros((n, columns), dtype=torch.bfloat16) for n in (tokens, rows))
    with closing(Workers(40)) as workers, PeakAllocations() as peak:
        product = HostProducts(workers, torch.bfloat16, WIDENED_FROM, kept_nbytes=0).linear(x, PlainRows(weight))
    assert peak.peak_bytes <= product.nbytes + product_nbytes(tokens, [(rows, columns)], makes_rows=True)


def test_what_is_kept_of_one_matrix_is_counted_beside_the_next_one(workers: Workers) -> None:
    shapes = [(1024, 1024), (3000, 64), (40, 5000)]  # the second needs less room, the third more
    products = HostProducts(workers, torch.bfloat16, WIDENED_FROM, kept_nbytes=0)
    inputs = [
        (torch.zeros((100, c), dtype=torch.bfloat16), torch.zeros((r, c), dtype=torch.bfloat16)) for r, c in shapes
    ]
    with PeakAllocations() as peak:
        for x, weight in inputs:
            products.linear(x, PlainRows(weight))
    assert peak.peak_bytes <= 100 * 3000 * 2 + product_nbytes(100, shapes, makes_rows=True)


def test_rooms_are_kept_from_product_to_product(workers: Workers) -> None:
    x, weight = torch.zeros((WIDENED_FROM, 64), dtype=torch.bfloat16), torch.zeros((3000, 64), dtype=torch.bfloat16)
    products, cut = (
        HostProducts(workers, torch.bfloat16, WIDENED_FROM, kept_nbytes=0),
        cut_rows(3000, 64, workers.threads),
    )
    products.linear(x, PlainRows(weight))
    with PeakAllocations() as peak:
        products.linear(x, PlainRows(weight))
    assert peak.peak_bytes < 3000 * WIDENED_FROM * 2 + cut.threads * cut.rows * 64 * 4
