"""What this processor multiplies by instructions of its own, as far as kernels are compiled for them."""

from __future__ import annotations

import ctypes
from functools import cache

_REQUEST_PERMISSION, _TILE_DATA, _ARCH_PRCTL = 0x1023, 18, 158
"""Linux asks programs to ask for AMX's eight KiB a thread: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)."""


@cache
def has_integer_instructions() -> bool:
    """8-bit integers."""
    from flexflow_engine.cpu.jit import has_feature  # noqa: PLC0415  # Numba takes half a second to import

    return has_feature("avx512vnni") or has_feature("avxvnni")


@cache
def has_bfloat_instructions() -> bool:
    """bfloat16, by AMX where the processor has it, or else by vectors. Where the system refuses a process AMX, vectors
    are not tried: kernels are kept for a processor, not for a process.
    """
    from flexflow_engine.cpu.vectors import has_bfloat_vectors  # noqa: PLC0415  # as above

    return _asks_for_amx() if has_amx() else has_bfloat_vectors()


def has_amx() -> bool:
    """Whether kernels are compiled for it."""
    from flexflow_engine.cpu.jit import has_feature  # noqa: PLC0415  # as above

    return has_feature("amx-bf16")


def _asks_for_amx() -> bool:
    """Whether the system grants it."""
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)
