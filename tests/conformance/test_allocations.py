"""`PeakAllocations` counts what operators make, while it lives, and nothing else."""

import torch
from torch.nn import functional

from flexflow_engine.testing.allocations import PeakAllocations


def test_the_peak_is_what_lived_at_once() -> None:
    with PeakAllocations() as allocations:
        first = torch.zeros(1000)
        del first
        second = torch.zeros(600)
        third = second + 1
    assert (allocations.live_bytes, allocations.peak_bytes) == (4800, 4800)
    del second, third
    assert (allocations.live_bytes, allocations.peak_bytes) == (0, 4800)


def test_what_was_there_before_and_views_of_it_do_not_count() -> None:
    before = torch.zeros(4, 4)
    with PeakAllocations() as allocations:
        before.t()[1:].add_(1)
        before.relu_()
    assert allocations.peak_bytes == 0


def test_a_view_keeps_its_storage_counted() -> None:
    with PeakAllocations() as allocations:
        view = torch.zeros(100)[:1]
    assert allocations.live_bytes == 400
    del view
    assert allocations.live_bytes == 0


def test_intermediates_of_compound_operators_count_in_inference_mode_too() -> None:
    x, weight = torch.zeros(10, 8), torch.zeros(16, 8)
    with torch.inference_mode(), PeakAllocations() as allocations:
        y = functional.linear(x.t().contiguous().t(), weight).reshape(2, 80)
    assert allocations.peak_bytes == (80 + 160) * 4
    assert allocations.live_bytes == y.nbytes
