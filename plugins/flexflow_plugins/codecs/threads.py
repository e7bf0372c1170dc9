"""The kernels on tensors: memory as Numba sees it, and the work cut among threads.

Numba's own threads are not used: its default layer may not be entered from two threads at once, and lanes do. Threads
live for one call and share it by ranges of groups; a call of little work has none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from math import ceil, prod
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from flexflow_engine.abc.codec import IntegerDecoder, KernelDecoder, PageProducts
from flexflow_engine.cpu.arrays import ARRAY_TYPES
from flexflow_engine.cpu.workers import Workers

_NUMBERS_PER_THREAD = {"decode": 2**19, "minmax": 2**18, "fit": 2**17, "search": 2**14}
"""Below that, starting a thread (50 us) takes longer than it saves."""
_REACH = {"fit": (1, 0, 1, 0), "search": (2, 1, 1, 1)}
"""How many grids are tried; see part_search.py."""


class Format(Protocol):
    """What the kernels must know of a codec."""

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    @property
    def encoder(self) -> str:
        """`search`, `fit` or `minmax`; min/max writes groups of one grid, the others groups of four."""


def decoder(form: Format, size: int) -> KernelDecoder:
    """Of tensors of `size` numbers."""
    from flexflow_plugins.codecs import kernels, parts  # noqa: PLC0415  # Numba takes half a second to import

    functions = kernels.DECODERS if form.encoder == "minmax" else parts.DECODERS
    addresses = {dtype: function.address for dtype, function in functions.items()}
    return KernelDecoder(addresses, (size, form.group_size, form.bits), functions)


def multiplying_decoder(form: Format, shape: tuple[int, ...]) -> KernelDecoder:
    """The same with products, if there are some with tensors of this shape."""
    from flexflow_plugins.codecs.products import products  # noqa: PLC0415  # as above
    from flexflow_plugins.codecs.row_products import suits  # noqa: PLC0415  # as above

    plain, has_products = decoder(form, prod(shape)), (form.encoder, form.bits) != ("minmax", 4)
    functions = products() if has_products and suits(shape, form.group_size) else None
    if functions is None:
        return plain
    pages = PageProducts(*(function.address for function in functions))
    return replace(plain, settings=(*plain.settings, *shape[1:]), owner=(plain.owner, functions), products=pages)


def integer_decoder(form: Format, size: int) -> IntegerDecoder:
    """Of tensors of `size` numbers."""
    from flexflow_plugins.codecs import kernels, parts  # noqa: PLC0415  # Numba takes half a second to import

    function = kernels.integer_decoder() if form.encoder == "minmax" else parts.integer_decoder()
    return IntegerDecoder(function.address, (size, form.group_size, form.bits), form.group_size, function)


def decode(form: Format, encoded: torch.Tensor, out: torch.Tensor) -> None:
    """encoded uint8 [n, nbytes] into out [n, *shape], any float dtype, on the CPU."""
    from flexflow_engine.cpu.decoding import Target, decode_numbers  # noqa: PLC0415  # Numba takes half a second to import

    target = out if _is_dense(out) and out.dtype in ARRAY_TYPES else torch.empty(out.shape, dtype=torch.float32)
    source = encoded if _is_dense(encoded) else encoded.contiguous()
    size = prod(out.shape[1:])
    compiled, place = decoder(form, size), Target(target.data_ptr(), target.stride(0) * target.itemsize, target.dtype)
    parts = min(torch.get_num_threads(), out.numel() // _NUMBERS_PER_THREAD["decode"])
    share(lambda first, stop: decode_numbers(compiled, source, size, range(first, stop), place), out.numel(), parts)
    if target is not out:
        out.copy_(target)


def encode(form: Format, values: torch.Tensor, out: torch.Tensor) -> None:
    """values [n, *shape], any float dtype, into out, uint8 [n, nbytes], on the CPU."""
    from flexflow_plugins.codecs import kernels, parts  # noqa: PLC0415  # Numba takes half a second to import

    known = values if values.dtype in ARRAY_TYPES else values.float()
    target = out if _is_dense(out) else torch.empty(out.shape, dtype=torch.uint8)
    numbers, encoded = _memory(known if _is_dense(known) else known.contiguous()), _memory(target)
    shape = prod(values.shape[1:]), form.group_size, form.bits

    def work(first: int, stop: int) -> None:
        if form.encoder == "minmax":
            kernels.encode(numbers, encoded, shape, (first, stop))
        else:
            parts.encode(numbers, encoded, shape, (first, stop), _REACH[form.encoder])

    # an import keeps torch to one thread, and searching is what it then waits for: that takes every core
    limit = _num_cores() if form.encoder == "search" else torch.get_num_threads()
    share(work, _groups(form, values), min(limit, values.numel() // _NUMBERS_PER_THREAD[form.encoder]))
    if target is not out:
        out.copy_(target)


def _num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def _groups(form: Format, values: torch.Tensor) -> int:
    return len(values) * ceil(prod(values.shape[1:]) / form.group_size)


def share(work: Callable[[int, int], None], count: int, parts: int) -> None:
    """Call `work` with ranges that cover 0 ... count, in `parts` threads at once, this one among them."""
    if parts <= 1:
        work(0, count)
        return
    bounds = [count * part // parts for part in range(parts + 1)]
    with closing(Workers(parts)) as workers:
        workers.share(lambda part: work(bounds[part], bounds[part + 1]), parts)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether every tensor of the first axis is contiguous, whatever lies between them."""
    return len(tensor) == 0 or tensor[0].is_contiguous()


def _memory(tensor: torch.Tensor) -> tuple[NDArray[Any], int]:
    """A dense [n, *shape] as one array over all its memory, and the elements from one tensor to the next."""
    array_type = np.uint8 if tensor.dtype == torch.uint8 else ARRAY_TYPES[tensor.dtype]
    if tensor.numel() == 0:
        return np.empty(0, array_type), 0
    stride, size = tensor.stride(0), prod(tensor.shape[1:])
    span = tensor.as_strided(((len(tensor) - 1) * stride + size,), (1,))
    raw = span if span.dtype in (torch.uint8, torch.float32) else span.view(torch.int16)
    return raw.detach().numpy().view(array_type), stride
