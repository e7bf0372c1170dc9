"""Plain host memory, where the CPU computes; with a budget of its own it stands in for a GPU."""

from flexflow_tiers.host import HostTier


class CpuTier(HostTier):
    """The host's memory as a place to compute."""

    name = "cpu"
    computes = True
