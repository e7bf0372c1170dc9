"""Shared by all tests: what needs a GPU is skipped, with the reason, where there is none."""

import pytest
import torch

pytest.register_assert_rewrite("flexflow_engine.testing")  # a failing assertion of a suite shows its values


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU; torch sees none")
