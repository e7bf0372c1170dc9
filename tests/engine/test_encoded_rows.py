"""Products with encoded rows are those with the rows as the codec decodes them, in any number of threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.cpu.workers import Workers
from flexflow_engine.products import bfloats
from flexflow_engine.products.matmul import HostProducts
from flexflow_engine.products.widening import cut_rows, product_nbytes
from flexflow_engine.runtime.encoded_rows import EncodedRows
from flexflow_engine.testing.allocations import PeakAllocations
from flexflow_engine.testing.codec_suite import encoded, normal
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt4Options, GroupInt8Codec, GroupQuantCodec

CODECS = [GroupInt4Codec(), GroupInt4Codec(GroupInt4Options(encoder="minmax")), GroupInt8Codec()]
SHAPES = ((1, (2, 48), 2), (7, (4, 33), 26), (3, (1, 130), 3), (5, (700, 64), 3001), (1, (40, 5000), 40))
"""Units, the shape of one, and the rows that exist; some make more than one part."""


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor as on one without kernels for bfloat16: see test_bfloats."""
    monkeypatch.setattr(bfloats, "has_bfloat_instructions", lambda: False)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.key)
@pytest.mark.parametrize(("units", "shape", "rows"), SHAPES)
def test_rows_are_decoded_as_by_the_codec_wherever_they_begin(
    codec: GroupQuantCodec, units: int, shape: tuple[int, int], rows: int
) -> None:
    data = encoded(codec, normal(units, shape, "bfloat16", seed=units), "bfloat16")
    matrix = EncodedRows(codec, data, shape, rows=rows)
    for dtype in (torch.float32, torch.bfloat16):
        expected = decoded(codec, data, shape, dtype)
        for first, stop in ((0, rows), (rows // 2, rows), (rows - 1, rows)):
            part = matrix.part(first, stop, torch.zeros((stop - first, shape[1]), dtype=dtype))
            assert torch.equal(part, expected[first:stop])


@pytest.mark.parametrize("float32_from", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 40, 1100])
@pytest.mark.parametrize("matrix_shape", SHAPES)
def test_products_are_those_with_the_decoded_matrix_rounded_once(
    workers: Workers,
    dtype: torch.dtype,
    float32_from: int | None,
    tokens: int,
    matrix_shape: tuple[int, tuple[int, int], int],
) -> None:
    codec, (units, shape, rows) = GroupInt4Codec(), matrix_shape
    data = encoded(codec, normal(units, shape, "float32", seed=units), "float32")
    matrix, products = (
        EncodedRows(codec, data, shape, rows=rows),
        HostProducts(workers, dtype, float32_from, kept_nbytes=0),
    )
    generator = torch.Generator().manual_seed(tokens)
    x, bias = (torch.randn(s, generator=generator).to(dtype) for s in [(tokens, shape[1]), (rows,)])
    weight = decoded(codec, data, shape, torch.float32)[:rows]
    exact = F.linear(x.double(), weight.double())
    eps = torch.finfo(dtype).eps
    bound = 2.0 * eps * (exact.abs() + bias.abs()) + 2e-5 * shape[1] ** 0.5
    bound += eps * F.linear(x.double().abs(), weight.double().abs())  # where 16-bit numbers are multiplied as they are
    with PeakAllocations() as peak:
        product = products.linear(x, matrix, bias)
    assert product.dtype == dtype
    assert ((product.double() - exact - bias.double()).abs() <= bound).all()
    assert ((products.linear(x, matrix).double() - exact).abs() <= bound).all()
    assert peak.peak_bytes <= product.nbytes + product_nbytes(tokens, [(rows, shape[1])], makes_rows=True)


def test_a_matrix_of_the_test_is_multiplied_in_several_parts() -> None:
    assert cut_rows(3001, 64, 3).rows < 3001


def decoded(codec: GroupQuantCodec, data: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros((len(data), *shape), dtype=dtype)
    codec.decode(data, out)
    return out.view(-1, shape[1])
