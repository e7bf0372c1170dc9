"""How fast a codec encodes and decodes, in units like those of a weight page."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.hardware import CodecRates
from flexflow_engine.cpu.matmul import PlainRows, Rows
from flexflow_engine.cpu.widening import shared_rows
from flexflow_engine.placement.layout import multiplies_as_encoded
from flexflow_engine.planning.profile.bench import Bench
from flexflow_engine.planning.profile.sizes import Sizes
from flexflow_engine.runtime.encoded_rows import EncodedRows

UNITS = 4
"""Encoded and decoded in one call."""


def codec_rates(bench: Bench, sizes: Sizes, codec: Codec) -> CodecRates:
    """Decoding reads bytes that no cache holds, encoding numbers that were just computed.

    Where numbers are decoded while they are multiplied, what counts is by how much that takes longer than making rows
    of plain numbers, which matmul rates include.
    """
    rows = max(1, sizes.page_nbytes // (sizes.features * bench.torch_dtype.itemsize))
    values = bench.numbers(UNITS, rows, sizes.features)
    nbytes = codec.encoded_nbytes((rows, sizes.features), bench.dtype)
    encoded = torch.empty((UNITS, nbytes), dtype=torch.uint8, device=bench.device)
    encoding = codec.for_cache()
    encode_s = bench.time(lambda: encoding.encode(values, encoded))
    copies = [encoded.clone() for _ in range(_copies(sizes, encoded))]
    turn = cycle([_decoding(bench, codec, x, values) for x in copies])

    def decode() -> None:
        next(turn)()

    decode_s = bench.time(decode)
    if multiplies_as_encoded(bench.memory, codec) and bench.made_dtype != values.dtype:
        plain_s = bench.time(_making_rows(bench, PlainRows(values.flatten(0, 1)), values))
        decode_s = max(decode_s - plain_s, decode_s / 10)
    return CodecRates(encode_values_per_s=values.numel() / encode_s, decode_values_per_s=values.numel() / decode_s)


def _decoding(bench: Bench, codec: Codec, encoded: torch.Tensor, values: torch.Tensor) -> Callable[[], None]:
    """All of `values`, to where products take them from: some rows at a time to one place, or all to their own."""
    if not multiplies_as_encoded(bench.memory, codec):
        return lambda: codec.decode(encoded, values)
    units, unit_rows, columns = values.shape
    return _making_rows(bench, EncodedRows(codec, encoded, (unit_rows, columns), rows=units * unit_rows), values)


def _making_rows(bench: Bench, matrix: Rows, values: torch.Tensor) -> Callable[[], None]:
    """All rows of a matrix like `values`, some at a time to one place, as products make them."""
    columns = values.shape[-1]
    shares = shared_rows(matrix.out_features, columns, bench.workers.threads)
    rooms = torch.empty((*shares, columns), dtype=bench.made_dtype)

    def work(thread: int, first: int, stop: int) -> None:
        matrix.part(first, stop, rooms[thread, : stop - first])

    return lambda: bench.workers.draw(work, matrix.out_features, step=shares.rows, threads=shares.threads)


def _copies(sizes: Sizes, encoded: torch.Tensor) -> int:
    return max(1, sizes.cold_nbytes // encoded.nbytes)
