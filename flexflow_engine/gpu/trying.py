"""Kernels that Triton compiles on the user's machine, where there is Triton and it finds its compilers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")
_LOGGER = logging.getLogger(__name__)


def working(device_type: str, attempt: Callable[[], T], *, without: str) -> T | None:
    """What `attempt` gives, which imports kernels and calls them; None where they can't work on such a device.

    without: what a user is told to expect then.
    """
    import torch  # noqa: PLC0415  # takes long to import

    if device_type != "cuda" or find_spec("triton") is None:
        return None
    try:
        return attempt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever its compilers fail with
        _LOGGER.warning("%s: Triton does not work: %s", without, error)
        return None
