"""How fast a codec encodes and decodes, in units like those of a weight page."""

from __future__ import annotations

from itertools import cycle

import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.hardware import CodecRates
from flexflow_engine.abc.tier import HOST
from flexflow_engine.placement.layout import multiplies_as_encoded
from flexflow_engine.planning.profile.arithmetic import encoded_flops_per_s
from flexflow_engine.planning.profile.bench import Bench
from flexflow_engine.planning.profile.extent import Extent
from flexflow_engine.runtime.encoded_rows import EncodedRows


def codec_rates(bench: Bench, extent: Extent, codec: Codec, product_s: float) -> CodecRates:
    """Decoding reads bytes that no cache holds, encoding numbers that were just computed. product_s: what a product
    takes whatever its size.
    """
    units = extent.units if bench.memory == HOST else extent.device_units
    rows = max(1, extent.page_nbytes // (extent.features * bench.torch_dtype.itemsize))
    values = bench.numbers(units, rows, extent.features)
    nbytes = codec.encoded_nbytes((rows, extent.features), bench.dtype)
    encoded = torch.empty((units, nbytes), dtype=torch.uint8, device=bench.device)
    encoding = codec.for_cache()
    encode_s = bench.time(lambda: encoding.encode(values, encoded))
    copies = [encoded.clone() for _ in range(max(1, extent.cold_nbytes // encoded.nbytes))]
    turn = cycle(copies)
    decode_s = bench.time(lambda: codec.decode(next(turn), values))
    product_flops_per_s = None
    if multiplies_as_encoded(bench.memory, codec):
        matrices = [EncodedRows(codec, x, (rows, extent.features), rows=units * rows) for x in copies]
        product_flops_per_s = encoded_flops_per_s(bench, matrices, extent, product_s)
    return CodecRates(
        encode_values_per_s=values.numel() / encode_s,
        decode_values_per_s=values.numel() / decode_s,
        product_flops_per_s=product_flops_per_s,
    )
