"""Kernels that Triton compiles on the user's machine, where there is Triton and it finds its compilers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_LOGGER = logging.getLogger(__name__)


def working(device: torch.device, attempt: Callable[[], T], *, without: str) -> T | None:
    """What `attempt` gives, which imports kernels and calls them on the device; None where they can't work there.

    without: what a user is told to expect then. Raises torch.OutOfMemoryError.
    """
    import torch  # noqa: PLC0415  # takes long to import

    if device.type != "cuda" or find_spec("triton") is None:
        return None
    try:
        with torch.cuda.device(device):
            return attempt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever its compilers fail with
        _LOGGER.warning("%s: Triton does not work: %s", without, error)
        return None
