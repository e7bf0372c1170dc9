"""How much error our int4 encoder makes against plain min/max, at the same groups and bits, and how fast both are.

    python benchmarks/codec_error.py [CHECKPOINT.safetensors]

Without a file the weights of the shipped checkpoint are taken. Errors are mean squared differences between bfloat16
weights and what float32 decoding gives back; rates are the best of several runs, in all threads and in one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from flexflow_engine.abc.codec import Codec
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt4Options, GroupInt8Codec
from timing import best_seconds

SHIPPED = Path(__file__).parents[1] / "recipes/data/quickstart-opt/model.safetensors"
ROWS, COLUMNS = 1024, 2048
PAGE_NBYTES = 16 * 2**20
"""Of bfloat16 numbers that the rates are measured with: the largest page of weights."""
SEARCH, MINMAX = GroupInt4Codec(), GroupInt4Codec(GroupInt4Options(encoder="minmax"))


@dataclass(frozen=True, slots=True)
class Rates:
    """MB of bfloat16 encoded a second, and billions of values decoded to bfloat16 a second."""

    encode: float
    decode: float
    decode_one_thread: float


def main() -> None:
    checkpoint = Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED
    console = Console(width=120)
    console.print(_error_table(checkpoint))
    console.print(_rate_table())


def _error_table(checkpoint: Path) -> Table:
    table = Table("weights", "min/max MSE", "search MSE", "search / min/max", "saved", title="group-int4, groups of 64")
    for name, matrices in _weights(checkpoint).items():
        plain, searched = _squared_error(MINMAX, matrices), _squared_error(SEARCH, matrices)
        ratio = searched / plain
        table.add_row(name, f"{plain:.4e}", f"{searched:.4e}", f"{ratio:.4f}", f"{1 - ratio:.1%}")
    return table


def _rate_table() -> Table:
    table = Table(
        "codec",
        "encode MB/s",
        "decode G values/s",
        "in one thread",
        title=f"bfloat16, {torch.get_num_threads()} threads",
    )
    for codec in (SEARCH, MINMAX, GroupInt8Codec()):
        rates = _rates(codec)
        table.add_row(codec.key, f"{rates.encode:.0f}", f"{rates.decode:.2f}", f"{rates.decode_one_thread:.2f}")
    return table


def _weights(checkpoint: Path) -> dict[str, list[torch.Tensor]]:
    """Matrices in bfloat16 by kind."""
    torch.manual_seed(0)
    shape = (ROWS, COLUMNS)
    made = {
        "Gaussian": torch.randn(shape),
        "Student-t(5)": torch.distributions.StudentT(5.0).sample(shape),
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample(shape),
    }
    stored = [tensor.bfloat16() for tensor in load_file(checkpoint).values() if tensor.ndim == 2]
    return {name: [tensor.bfloat16()] for name, tensor in made.items()} | {checkpoint.parent.name: stored}


def _squared_error(codec: Codec, matrices: list[torch.Tensor]) -> float:
    """Mean over all numbers of all matrices."""
    total = sum(float((_round_trip(codec, m) - m.float()).double().square().sum()) for m in matrices)
    return total / sum(matrix.numel() for matrix in matrices)


def _round_trip(codec: Codec, matrix: torch.Tensor) -> torch.Tensor:
    values = matrix[None]
    data = torch.empty((1, codec.encoded_nbytes(tuple(matrix.shape), "bfloat16")), dtype=torch.uint8)
    out = torch.empty(values.shape)
    codec.encode(values, data)
    codec.decode(data, out)
    return out[0]


def _rates(codec: Codec) -> Rates:
    values = torch.randn(PAGE_NBYTES // 2 // COLUMNS, COLUMNS).bfloat16()[None]
    data = torch.empty((1, codec.encoded_nbytes(tuple(values.shape[1:]), "bfloat16")), dtype=torch.uint8)
    out, threads = torch.empty_like(values), torch.get_num_threads()
    encode_s = best_seconds(lambda: codec.encode(values, data), 5)
    decode_s = best_seconds(lambda: codec.decode(data, out), 30)
    torch.set_num_threads(1)
    one_thread_s = best_seconds(lambda: codec.decode(data, out), 30)
    torch.set_num_threads(threads)
    return Rates(values.nbytes / encode_s / 1e6, values.numel() / decode_s / 1e9, values.numel() / one_thread_s / 1e9)


if __name__ == "__main__":
    main()
