"""Numbers that the host makes and kernels read: places, positions, counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def indices(numbers: Sequence[int] | NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """int64 [n] on `device`; on the host it may share the array's memory.

    Reaches a GPU from pinned memory, in the order of the stream. From plain memory the caller would wait until all
    kernels before the copy are done, and nothing could be queued behind them.
    """
    tensor = torch.from_numpy(np.asarray(numbers, np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
