"""The arrays by which kernels tell number formats apart (`cpu.numbers`). Imports no Numba: callers load that late."""

from __future__ import annotations

import numpy as np
import torch

ARRAY_TYPES = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}
"""Of numbers, or of their bits."""
