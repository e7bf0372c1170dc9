"""How fast a codec encodes and decodes, in units like those of a weight page."""

from __future__ import annotations

from itertools import cycle

import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.hardware import CodecRates
from flexflow_engine.planning.profile.bench import Bench
from flexflow_engine.planning.profile.sizes import Sizes
from flexflow_engine.runtime.shared_decoding import decoding

UNITS = 4
"""Encoded and decoded in one call."""


def codec_rates(bench: Bench, sizes: Sizes, codec: Codec) -> CodecRates:
    """Decoding reads bytes that no cache holds, encoding numbers that were just computed."""
    rows = max(1, sizes.page_nbytes // (sizes.features * bench.torch_dtype.itemsize))
    values = bench.numbers(UNITS, rows, sizes.features)
    nbytes = codec.encoded_nbytes((rows, sizes.features), bench.dtype)
    encoded = torch.empty((UNITS, nbytes), dtype=torch.uint8, device=bench.device)
    encoding = codec.for_cache()
    encode_s = bench.time(lambda: encoding.encode(values, encoded))
    copies = [encoded.clone() for _ in range(_copies(sizes, encoded))]
    turn = cycle([decoding(codec, [(x, values)], memory=bench.memory, workers=bench.workers) for x in copies])

    def decode() -> None:
        next(turn)()

    decode_s = bench.time(decode)
    return CodecRates(encode_values_per_s=values.numel() / encode_s, decode_values_per_s=values.numel() / decode_s)


def _copies(sizes: Sizes, encoded: torch.Tensor) -> int:
    return max(1, sizes.cold_nbytes // encoded.nbytes)
