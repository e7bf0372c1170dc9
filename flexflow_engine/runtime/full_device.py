"""A device whose memory is full although the plan fits its budget: what a kernel takes for itself found no room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flexflow_engine.abc.policy import TierDescription
from flexflow_engine.abc.sizes import rounded_down
from flexflow_engine.errors import TaskError, TierError


@contextmanager
def full_device_told(device: TierDescription) -> Iterator[None]:
    """Raise TierError, which names the budget to lower, where torch found no memory inside, in a lane or outside."""
    try:
        yield
    except (TaskError, torch.OutOfMemoryError) as error:
        if not any(isinstance(cause, torch.OutOfMemoryError) for cause in _chain(error)):
            raise
        raise TierError(
            "the device's memory is full, although the plan keeps to the budget of "
            f"{rounded_down(device.budget_bytes)}",
            where=f"tiers.{device.name}.budget",
            fix="lower it by a GiB, or end other programs on the device",
        ) from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
