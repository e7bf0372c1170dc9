"""Memory for results that are dropped soon, given again as long as it lasts."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from itertools import count
from math import prod

import numpy as np
import torch

SMALLEST_NBYTES = 2**19
"""What is smaller comes from the heap, which gives it again by itself; larger blocks are mapped anew each time by the
command line's allocator (docs/decisions/0025), and their pages are slow to touch first.
"""
_ALIGNMENT = 64


class Arena:
    """One block of memory, from which tensors are cut. A tensor's place is free again once nobody holds its storage.

    It is as large as what was asked for at once so far, within the limit; what does not fit is allocated as usual. For
    one thread; tensors may end in any.

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
        self._most_nbytes = max(self._most_nbytes, needed + self._live_nbytes)
        if not self._taken and len(self._block) < min(self._most_nbytes, self._limit_nbytes):
            self._block = np.empty(0, np.uint8)  # the old one ends before the larger one begins
            self._block = np.empty(min(self._most_nbytes, self._limit_nbytes), np.uint8)
        number, first = next(self._numbers), self._place(needed)
        if first is None:
            memory, self._beside[number] = np.empty(nbytes, np.uint8), needed
        else:
            memory, self._taken[number] = self._block[first : first + nbytes], (first, first + needed)
        weakref.finalize(memory, self._ended.append, number).atexit = False
        return torch.from_numpy(memory).view(dtype).view(tuple(shape))

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
