"""Peak memory of an import, above that of the interpreter with everything imported, against what is promised.

    python benchmarks/import_peak.py [CHECKPOINT ...]        default: synthetic:opt-125m synthetic:opt-1.3b

Each import runs in a process of its own, into a temporary store that is removed. The promise is two decoder layers plus
256 MiB, whatever the model's size.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

MIB = 2**20
PROMISE_MIB = 256


def main() -> None:
    """Print one line a checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="*", default=["synthetic:opt-125m", "synthetic:opt-1.3b"])
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    print(f"{'checkpoint':24} {'stored':>12} {'peak':>12} {'promised':>12}")
    for checkpoint in options.checkpoints:
        with tempfile.TemporaryDirectory() as folder:
            child = [sys.executable, __file__, "--child", checkpoint, options.dtype, folder]
            stored, peak, promised = map(int, subprocess.check_output(child, text=True).split())
        print(f"{checkpoint:24} {stored / MIB:8.1f} MiB {peak / MIB:8.1f} MiB {promised / MIB:8.1f} MiB")


def measure(checkpoint: str, dtype: str, folder: str) -> None:
    """Import in this process; print bytes stored, peak above the start, and the promise."""
    from flexflow_engine.abc.dtypes import DTYPES  # noqa: PLC0415  # the parent needs no torch
    from flexflow_engine.checkpoint.importing import import_checkpoint  # noqa: PLC0415
    from flexflow_engine.checkpoint.source import open_checkpoint  # noqa: PLC0415
    from flexflow_engine.plugins import Registry  # noqa: PLC0415

    registry = Registry.load()
    models = {name: registry.model(name) for name in registry.names("model")}
    opened = open_checkpoint(checkpoint, models, model_name=None, dtype=next(d for d in DTYPES if d == dtype))
    codec_class = registry.codec("none")
    codec = codec_class(codec_class.Options())
    before = peak_bytes()
    store = import_checkpoint(opened, opened.model, codec, codec, Path(folder), lambda done, total: None)
    shapes = {spec.name: spec.shape for spec in opened.model.tensors()}
    layer = next(layer for layer in opened.model.layers() if layer.kind == "decoder")
    layer_nbytes = sum(codec.encoded_nbytes(shapes[name], opened.dtype) for name in layer.matrices.values())
    print(store.nbytes, peak_bytes() - before, 2 * layer_nbytes + PROMISE_MIB * MIB)


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        measure(*sys.argv[2:])
    else:
        main()
