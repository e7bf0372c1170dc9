"""Products of 16-bit matrices on processors that have no instructions for them.

torch emulates those: with AVX2 alone a bfloat16 product of 256 tokens runs at a fifth of the float32 rate, and float16
at a quarter even with AVX-512. So numbers are widened to float32, some rows of the matrix at a time, while they are in
its cache; sums are float32, and the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.abc.tier import HOST
from flexflow_engine.cpu.widening import WIDENED_FROM, WIDENED_TOKENS, widened_rows

_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""As `torch.nn.functional.linear`."""


def multiplication(memory: str | None, dtype: torch.dtype) -> Multiply:
    """How numbers of this dtype are multiplied that lie in this kind of memory, here."""
    emulated = memory == HOST and is_emulated(dtype, torch.cpu.get_capabilities())
    return widened_linear if emulated else F.linear


def is_emulated(dtype: torch.dtype, capabilities: Mapping[str, Any]) -> bool:
    """Whether a processor of these `torch.cpu.get_capabilities` multiplies such numbers by other instructions."""
    return dtype in _INSTRUCTIONS and not any(capabilities.get(name, False) for name in _INSTRUCTIONS[dtype])


def widened_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, in_features] times the transpose of weight [out_features, in_features], plus bias [out_features];
    [N, out_features] in x's dtype.
    """
    if len(x) < WIDENED_FROM:
        return F.linear(x, weight, bias)
    output = x.new_empty((len(x), len(weight)))
    rows = widened_rows(x.shape[1])
    room = x.new_empty((rows, x.shape[1]), dtype=torch.float32)  # one for all parts: fresh memory is slow to touch
    for tokens, target in zip(x.split(WIDENED_TOKENS), output.split(WIDENED_TOKENS), strict=True):
        wide = tokens.float()
        products = wide.new_empty((len(tokens), rows))
        for first in range(0, len(weight), rows):
            part = weight[first : first + rows]
            product = torch.mm(wide, room[: len(part)].copy_(part).t(), out=products[:, : len(part)])
            if bias is not None:
                product += bias[first : first + rows]
            target[:, first : first + rows] = product
        del wide, products, product  # before the next ones are made
    return output
