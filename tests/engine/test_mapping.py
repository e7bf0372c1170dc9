"""Memory that is there before it is touched."""

from __future__ import annotations

import errno
import sys
from mmap import PAGESIZE, mmap

import pytest

from flexflow_engine.cpu import mapping
from flexflow_engine.cpu.mapping import populated

resource = pytest.importorskip("resource")


@pytest.mark.skipif(sys.platform != "linux", reason="MADV_POPULATE_WRITE is Linux's")
@pytest.mark.parametrize("nbytes", [1, 3 * 2**20 + 5])
def test_no_page_is_faulted_in_later(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_POPULATED_AT_ONCE", 2**20)
    memory = populated(nbytes)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for place in range(0, nbytes, PAGESIZE):
        memory[place] = 1
    assert len(memory) == nbytes
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 20


@pytest.mark.skipif(sys.platform != "linux", reason="MADV_POPULATE_WRITE is Linux's")
@pytest.mark.parametrize(("number", "raised"), [(errno.EINVAL, False), (errno.ENOMEM, True)])
def test_a_kernel_may_lack_the_advice_but_not_the_memory(
    number: int, raised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(mmap):
        def madvise(self, *advice: int) -> None:
            raise OSError(number, "refused")

    monkeypatch.setattr(mapping, "mmap", Refusing)
    if raised:
        with pytest.raises(OSError, match="refused"):
            populated(4096)
    else:
        assert len(populated(4096)) == 4096
