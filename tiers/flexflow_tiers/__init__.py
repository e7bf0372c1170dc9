"""Built-in tiers: places where bytes live.

cuda    a GPU's memory; the model computes there
cpu     plain host memory; the model can compute there too
pinned  host memory that a GPU copies from and to at full speed, without the host's help
zarr    files on a disk, in Zarr's format

A tier of your own is a subclass of `flexflow_engine.abc.tier.Tier` with a unique `name`, a module with a function like
the one below, and one line of packaging that names the module in the entry-point group `flexflow_engine`. Inherit
`flexflow_engine.testing.tier_suite.TierTests` to know that it keeps the contract.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexflow_engine import hookimpl

if TYPE_CHECKING:
    from flexflow_engine.abc.tier import Tier


@hookimpl
def flexflow_register_tiers() -> list[type[Tier]]:
    # ruff: noqa: PLC0415 - importing this package costs nothing; only a registry that is built loads the tiers.
    from flexflow_tiers.cpu import CpuTier
    from flexflow_tiers.cuda import CudaTier
    from flexflow_tiers.pinned import PinnedTier
    from flexflow_tiers.zarr import ZarrTier

    return [CudaTier, CpuTier, PinnedTier, ZarrTier]
