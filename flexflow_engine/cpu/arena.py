"""Memory for results that are dropped soon, given again as long as it lasts."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from itertools import count
from math import prod

import numpy as np
import torch

from flexflow_engine.cpu.mapping import populated_bytes

SMALLEST_NBYTES = 2**19
"""What is smaller comes from the heap, which gives it again by itself. From 1 MiB on the command line's allocator maps
every block anew (docs/decisions/0025), and its pages are slow to touch first; half of that may come of one product as
well as of two.
"""
_ALIGNMENT = 64


class Arena:
    """One block of memory, from which tensors are cut. A tensor's place is free again once nobody holds its storage.

    The block is as large as what lived at once since `clear`, within the limit; what does not fit is mapped by itself.
    For one thread; tensors may end in any.

    Changing state: `_block`; `_taken`, number of a tensor -> its first byte in the block, and where it ends; `_beside`,
    number -> bytes of those that did not fit; `_most_nbytes`, that lived at once; `_ended`, numbers of tensors that
    nobody holds any more.
    """

    def __init__(self, limit_nbytes: int) -> None:
        self._limit_nbytes = limit_nbytes
        self._block = np.empty(0, np.uint8)
        self._taken: dict[int, tuple[int, int]] = {}
        self._beside: dict[int, int] = {}
        self._numbers = count()
        self._most_nbytes = 0
        self._ended = deque[int]()

    @property
    def nbytes(self) -> int:
        """Of the block, whether in use or not."""
        return len(self._block)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """As `torch.empty`, in host memory."""
        nbytes = prod(shape) * dtype.itemsize
        if nbytes < SMALLEST_NBYTES or nbytes > self._limit_nbytes:
            return torch.empty(tuple(shape), dtype=dtype)
        self._forget_ended()
        needed = nbytes + -nbytes % _ALIGNMENT
        self._most_nbytes = min(self._limit_nbytes, max(self._most_nbytes, needed + self._live_nbytes))
        if not self._taken and len(self._block) < self._most_nbytes:
            self._block = np.empty(0, np.uint8)  # the old one ends before the larger one begins
            self._block = populated_bytes(self._most_nbytes)
        number, first = next(self._numbers), self._place(needed)
        if first is None:
            memory, self._beside[number] = populated_bytes(nbytes), needed
        else:
            memory, self._taken[number] = self._block[first : first + nbytes], (first, first + needed)
        weakref.finalize(memory, self._ended.append, number).atexit = False
        return torch.from_numpy(memory).view(dtype).view(tuple(shape))

    def clear(self) -> None:
        """Give the block back, unless a tensor still lies there."""
        self._forget_ended()
        if not self._taken:
            self._block, self._most_nbytes = np.empty(0, np.uint8), 0

    def _forget_ended(self) -> None:
        while self._ended:
            number = self._ended.popleft()
            self._taken.pop(number, None)
            self._beside.pop(number, None)

    @property
    def _live_nbytes(self) -> int:
        return sum(stop - first for first, stop in self._taken.values()) + sum(self._beside.values())

    def _place(self, nbytes: int) -> int | None:
        """The first gap of so many bytes."""
        end = 0
        for first, stop in sorted(self._taken.values()):
            if first - end >= nbytes:
                break
            end = stop
        return end if end + nbytes <= len(self._block) else None
