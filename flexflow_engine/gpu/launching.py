"""Starting Triton's kernels without asking each time which of their compiled forms is meant.

Triton looks at all arguments of a call, at environment variables and at global names before it starts a kernel: 20 to
40 us on the host, as long as many a kernel runs. Here whatever it tells forms apart by is a key.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

_ALIGNMENT = 16
"""Triton compiles wider accesses where addresses and numbers are multiples of it."""
_TOO_LARGE = 2**31
"""For an integer of 32 bits."""


class Launcher:
    """Starts one kernel, whose parameters are tensors, then numbers, then constants.

    changing state    _forms    what was compiled, by what it was compiled for; an entry never changes
    """

    def __init__(self, kernel: Any) -> None:
        """kernel: of `triton.jit`."""
        self._kernel = kernel
        self._forms: dict[Hashable, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        num_warps: int = 4,
    ) -> None:
        """On the current stream of the current device, the tensors'. numbers: integers from 0 on, and floats."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        dtypes, aligned = [tensor.dtype for tensor in tensors], [address % _ALIGNMENT == 0 for address in addresses]
        kinds = [(number == 1, number % _ALIGNMENT == 0, number >= _TOO_LARGE) for number in numbers]
        key = (tensors[0].device, constants, num_warps, *dtypes, *aligned, *kinds)
        form = self._forms.get(key)
        if form is not None:
            form[grid](*addresses, *numbers, *constants)
            return
        form = self._kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)
        if form is not None:  # Triton's interpreter compiles nothing
            self._forms[key] = form
