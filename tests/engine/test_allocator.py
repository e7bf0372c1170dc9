"""Freed blocks are the machine's again, in the command line's process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flexflow_engine.cli.allocator import MMAP_THRESHOLD_NBYTES

SCRIPT = """
import sys
from flexflow_engine.cli.allocator import return_freed_blocks
import torch

def resident_nbytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

return_freed_blocks({name: "set" for name in sys.argv[2:]})
large, small = int(sys.argv[1]), []
torch.ones(8 * large, dtype=torch.uint8)  # freed at once: glibc takes that as a hint to keep such blocks
blocks = []
for _ in range(64):
    blocks.append(torch.ones(large, dtype=torch.uint8))
    small.append(torch.ones(4096, dtype=torch.uint8))  # lives on between the large ones
before = resident_nbytes()
blocks.clear()
print(before - resident_nbytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; the setting is glibc's")
def test_freed_blocks_go_back_to_the_machine_unless_the_user_has_set_the_allocator() -> None:
    assert _returned_nbytes() > 60 * MMAP_THRESHOLD_NBYTES
    assert _returned_nbytes("MALLOC_MMAP_THRESHOLD_") < 8 * MMAP_THRESHOLD_NBYTES


def _returned_nbytes(*set_by_user: str) -> int:
    command = [sys.executable, "-c", SCRIPT, str(MMAP_THRESHOLD_NBYTES), *set_by_user]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
