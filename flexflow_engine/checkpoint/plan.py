"""What an import will write, and everything that stands against it, found from the checkpoint's headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.compressor import Compressor
from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.model import Model
from flexflow_engine.checkpoint.checkpoint import Checkpoint
from flexflow_engine.errors import CheckpointError, FlexFlowError, raise_problems
from flexflow_engine.placement.pages import PagedTensor, paged_tensors
from flexflow_engine.store.array import ArrayLayout
from flexflow_engine.store.encoding import Compression, Encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One parameter: how it is cut and encoded, and how its array is laid out."""

    tensor: PagedTensor
    layout: ArrayLayout

    @property
    def name(self) -> str:
        """The model's name of it."""
        return self.tensor.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportPlan:
    """Every parameter of a model, in the model's order."""

    dtype: DType
    codec: Codec
    small_codec: Codec
    tensors: tuple[TensorPlan, ...]

    @classmethod
    def of(cls, model: Model, codec: Codec, small_codec: Codec) -> ImportPlan:
        """codec: for the large tensors, tables by its `for_table`; small_codec: for the small ones."""
        paged = paged_tensors(model, codec, small_codec)
        return cls(
            dtype=model.dtype,
            codec=codec,
            small_codec=small_codec,
            tensors=tuple(_plan_tensor(tensor, model.dtype) for tensor in paged),
        )

    @property
    def compressor(self) -> Compressor | None:
        """Of the large tensors."""
        return self.codec.compressor(self.dtype) if self.codec.compresses else None

    @property
    def nbytes(self) -> int:
        """Bytes of all units, before they are compressed."""
        return sum(entry.layout.nbytes for entry in self.tensors)


def find_names(checkpoint: Checkpoint, model: Model) -> Mapping[str, str]:
    """The checkpoint's name of each of the model's tensors; what the model does not know is left alone.

    Raises CheckpointError or, for several, ProblemsError: every tensor that is missing or of the wrong shape.
    """
    available, names, problems = checkpoint.tensor_names(), dict[str, str](), list[FlexFlowError]()
    for spec in model.tensors():
        spelling = next((name for name in model.spellings(spec.name) if name in available), None)
        if spelling is None:
            problems.append(CheckpointError(f"the tensor {spec.name} is missing", where=checkpoint.reference))
            continue
        names[spec.name] = spelling
        problem = checkpoint.problem(spelling, spec.shape)
        if problem is not None:
            problems.append(problem)
    raise_problems(problems)
    return names


def _plan_tensor(tensor: PagedTensor, dtype: DType) -> TensorPlan:
    """An array of the tensor's own shape, of the numbers as they are or as the codec serialises them."""
    codec = tensor.codec
    compression = Compression.parse(codec.compressor(dtype).zarr_codec()) if codec.compresses else None
    if codec.keeps_bytes:
        layout = ArrayLayout.plain(tensor.shape, dtype, page_rows=tensor.page_rows, unit_rows=tensor.unit_rows)
    else:
        layout = ArrayLayout.encoded(
            tensor.shape,
            dtype,
            page_rows=tensor.page_rows,
            unit_rows=tensor.unit_rows,
            encoding=Encoding.of(codec.configuration(), tensor.unit_nbytes),
        )
    layout = replace(layout, compression=compression)
    assert (layout.num_units, layout.unit_nbytes) == (tensor.num_units, tensor.unit_nbytes), tensor
    return TensorPlan(tensor=tensor, layout=layout)
