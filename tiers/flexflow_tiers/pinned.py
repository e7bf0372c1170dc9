"""Page-locked host memory: a GPU copies from and to it on its own, while the host does something else.

Each region is an exact mapping that is registered with CUDA and unregistered before it is unmapped. torch's pinned
allocator is not used: it rounds every block up to a power of two, up to twice the budget, and keeps what is freed.
Without a GPU the same tier is plain host memory, so that one recipe runs on both kinds of machine.
"""

from __future__ import annotations

import errno
from typing import Any

from flexflow_tiers.host import HostMemory, HostTier

REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every GPU, not just for the one that is current now."""


class PinnedTier(HostTier):
    """Host memory that is ready for a GPU's copies.

    `direct` stays True: a processor that can address the memory may compute on it in place. Next to a `cuda` tier that
    is not the computing processor, so the engine copies; next to a `cpu` tier it is, and the copy falls away.
    """

    name = "pinned"
    more_room = "a higher limit of locked memory (ulimit -l), a smaller budget for this tier, or plugin: cpu would do"

    def _memory(self, nbytes: int) -> HostMemory:
        import torch  # noqa: PLC0415 - listing plugins must not load it

        if not torch.cuda.is_available() or nbytes == 0:  # CUDA refuses to register nothing
            return HostMemory(nbytes)
        return PinnedMemory(nbytes)


class PinnedMemory(HostMemory):
    """A mapping that CUDA knows. Whoever closes it has waited for the copies that use it."""

    def __init__(self, nbytes: int) -> None:
        """Raises OSError when the machine or the driver refuses; nothing stays mapped then."""
        super().__init__(nbytes)
        self._address = self.view.ctypes.data
        self._registered = False
        error = int(_cudart().cudaHostRegister(self._address, nbytes, REGISTER_PORTABLE))
        if error:
            self.close()
            raise OSError(errno.ENOMEM, f"cudaHostRegister: cudaError {error}")
        self._registered = True

    def close(self) -> None:
        if self._registered:
            self._registered = False
            error = int(_cudart().cudaHostUnregister(self._address))
            assert not error, f"cudaHostUnregister: cudaError {error}"
        super().close()


def _cudart() -> Any:
    import torch  # noqa: PLC0415 - listing plugins must not load it

    return torch.cuda.cudart()
