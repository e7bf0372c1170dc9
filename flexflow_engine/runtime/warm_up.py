"""Compiled kernels, called once before a run's clock begins: the first call loads or compiles them, which takes half a
second and more, and is no part of any step.
"""

from __future__ import annotations

import numpy as np
import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.model import Model
from flexflow_engine.abc.step import RowStep
from flexflow_engine.abc.tier import HOST
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.placement.kv import Rectangle
from flexflow_engine.placement.layout import Layout
from flexflow_engine.products.bfloats import TILE_ROWS
from flexflow_engine.products.matmul import HostProducts, PlainRows
from flexflow_engine.runtime.device_attention import device_kernels
from flexflow_engine.runtime.encoded_rows import EncodedRows
from flexflow_engine.runtime.host_attention import HostPages, HostTile
from flexflow_engine.runtime.rows import RowMoves
from flexflow_engine.runtime.token_places import TileCut, TokenPlaces
from flexflow_engine.store.units import load_kernels as load_reading

_PAGE_TOKENS, _UNIT = 16, (16, 64)


def load_kernels(
    layout: Layout, model: Model, kv_codec: Codec, *, workers: Workers, products: HostProducts, device: str
) -> None:
    """Those that the layout's tasks call. Their results are dropped. device: torch's, of the compute tier."""
    dtype: torch.dtype = getattr(torch, model.dtype)
    row = torch.zeros(_UNIT, dtype=dtype)
    RowMoves(np.zeros(1, np.int64), np.zeros(1, np.int64), row.device).put(row, row.clone())
    load_reading()
    for codec in layout.weights.codecs if layout.decodes_weights else ():
        _decode_once(codec, torch.zeros((1, *_UNIT), dtype=dtype, device=device), model)
    if layout.decodes_kv:
        page = model.config.num_kv_heads, layout.kv.page_tokens, model.config.head_dim
        pages = torch.zeros((1, *page), dtype=dtype, device=device)
        kv_codec.encode(pages, _decode_once(kv_codec, pages, model))
    if layout.attends_in_kernel:
        _attend_once(model, kv_codec, dtype, workers)
    else:
        page = model.config.num_kv_heads, layout.kv.page_tokens, model.config.head_dim
        device_kernels(torch.device(device), dtype, model.config.num_heads, page, kv_codec)
    if layout.device.memory == HOST:
        from flexflow_engine.cpu.largest import largest_in_rows  # noqa: PLC0415  # Numba takes half a second to import

        largest_in_rows(torch.zeros((1, 1), dtype=dtype))
        _multiply_once(layout, model, products)


def _multiply_once(layout: Layout, model: Model, products: HostProducts) -> None:
    """One token by matrices as wide as the layout's, of which enough rows for any kernel."""
    dtype: torch.dtype = getattr(torch, model.dtype)
    for columns in sorted({columns for layer in layout.weights.layers for _, columns in layer.matrices}):
        token = torch.zeros((1, columns), dtype=dtype)
        products.linear(token, PlainRows(torch.zeros((TILE_ROWS, columns), dtype=dtype)))
        for codec in layout.weights.codecs if layout.multiplies_encoded else ():
            unit = TILE_ROWS, columns
            encoded = torch.zeros((1, codec.encoded_nbytes(unit, model.dtype)), dtype=torch.uint8)
            products.linear(token, EncodedRows(codec, encoded, unit, rows=TILE_ROWS))


def _decode_once(codec: Codec, numbers: torch.Tensor, model: Model) -> torch.Tensor:
    """Zeros into `numbers` [1, *shape]; the encoded bytes, uint8 [1, nbytes]."""
    nbytes = codec.encoded_nbytes(tuple(numbers.shape[1:]), model.dtype)
    encoded = torch.zeros((1, nbytes), dtype=torch.uint8, device=numbers.device)
    codec.decode(encoded, numbers)
    codec.decoding([(encoded, numbers)])()
    return encoded


def _attend_once(model: Model, codec: Codec, dtype: torch.dtype, workers: Workers) -> None:
    """One row with one cached token, in a page of zeros."""
    page = model.config.num_kv_heads, _PAGE_TOKENS, model.config.head_dim
    decoder = None if codec.keeps_bytes else codec.kernel_decoder(page)
    stored = torch.zeros((1, 1, codec.encoded_nbytes(page, model.dtype)), dtype=torch.uint8)
    rectangle, tail_rows = Rectangle("", "", 0, 1, 0, 1), range(0)
    pages = HostPages(rectangle, stored, stored, takes_tokens=True, decoder=decoder)
    tile = HostTile([pages], tail_rows=tail_rows, tails=None, page=page, dtype=dtype, workers=workers)
    query = torch.zeros((1, model.config.num_heads, model.config.head_dim), dtype=dtype)
    cut = TileCut.of(num_kv_heads=page[0], page_tokens=page[1], parts=[(rectangle, True)], tail_rows=tail_rows)
    rows = [RowStep(row=0, sequence=0, new_tokens=1, context=0)]
    tile.attend(TokenPlaces(rows, cut, query.device), query, 1.0)
