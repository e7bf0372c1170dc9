"""For all tests of the engine's core: one thread for torch, and no clock in properties."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("core", deadline=None)  # whole jobs run in an example, on cores that others use too
settings.load_profile("core")


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> Iterator[None]:
    """Matrices here are tiny, and test workers share few cores: OpenMP's threads spin while they wait for each other.
    A job of 1400 tasks took 11 s with two threads on two busy cores, and 0.2 s with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
