"""How a run multiplies on the host: as a hardware profile has measured it, or as is usual."""

from __future__ import annotations

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.hardware import HardwareProfile, Processor
from flexflow_engine.abc.tier import HOST
from flexflow_engine.placement.layout import Layout
from flexflow_engine.products.matmul import HostProducts, TeamProducts, usual_float32_from, usual_products


def float32_from(layout: Layout, dtype: DType, machine: HardwareProfile | None) -> int | None:
    """Tokens from which on products are computed in float32; None: never, or where the host multiplies nothing."""
    if layout.device.memory != HOST:
        return None
    processor = _host_processor(machine)
    known = processor.float32_from if processor else {}
    return known[dtype] if dtype in known else usual_float32_from(dtype)


def host_products(layout: Layout, dtype: DType, machine: HardwareProfile | None) -> type[HostProducts]:
    """Who makes the host's products; what was measured counts where nothing else wants a core."""
    if layout.device.memory != HOST or not layout.only_computes:
        return HostProducts
    processor = _host_processor(machine)
    known = processor.torch_team if processor else {}
    if dtype not in known:
        return usual_products(dtype)
    return HostProducts if known[dtype] is None else TeamProducts


def _host_processor(machine: HardwareProfile | None) -> Processor | None:
    """None where nothing was measured of it."""
    return machine.processors.get(HOST) if machine else None
