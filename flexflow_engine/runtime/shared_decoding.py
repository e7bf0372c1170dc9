"""A layer's matrices decoded by several threads of the host, which wake once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import numpy as np
import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.tier import HOST
from flexflow_engine.cpu.workers import Workers

_NUMBERS_A_THREAD = 2**20
"""Below that, waking a thread takes longer than it saves."""


def decoding(
    codec: Codec, tensors: Sequence[tuple[torch.Tensor, torch.Tensor]], *, memory: str | None, workers: Workers
) -> Callable[[], None]:
    """What decodes all of them, where they lie: on the host's threads at once if the codec offers it, else one after
    another. tensors: uint8 [units, unit_nbytes] and [units, rows, columns].
    """
    if codec.decodes_in_kernels and memory == HOST:
        return partial(SharedDecoding(codec, tensors).run, workers)

    def decode() -> None:
        for encoded, out in tensors:
            codec.decode(encoded, out)

    return decode


class SharedDecoding:
    """Encoded tensors and their targets, in blocks: a block is one unit. For codecs that decode in kernels."""

    def __init__(self, codec: Codec, tensors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """tensors: uint8 [units, unit_nbytes] and [units, rows, columns], in host memory."""
        from flexflow_engine.cpu.decoding import Decoding  # noqa: PLC0415  # Numba takes half a second to import

        self._parts = [
            Decoding(codec.kernel_decoder(tuple(out.shape[1:])), encoded, out, block=prod(out.shape[1:]))
            for encoded, out in tensors
        ]
        self._ends = np.cumsum([part.num_numbers for part in self._parts])

    def run(self, workers: Workers) -> None:
        threads = int(max(1, min(torch.get_num_threads(), self._ends[-1] // _NUMBERS_A_THREAD)))
        bounds = [int(self._ends[-1]) * part // threads for part in range(threads + 1)]
        workers.share(lambda part: self._decode(bounds[part], bounds[part + 1]), threads)

    def _decode(self, first: int, stop: int) -> None:
        """Every block that starts among the numbers [first, stop), counted through all tensors."""
        for part, end in zip(self._parts, self._ends, strict=True):
            size, start = part.num_numbers // part.num_blocks, int(end) - part.num_numbers
            blocks = [min(max(-((start - bound) // size), 0), part.num_blocks) for bound in (first, stop)]
            part.run(*blocks)
