"""Tasks: the nodes of a graph, as plain data. What they name is laid out by `placement` and run by `runtime`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from flexflow_engine.abc.step import BatchStep
from flexflow_engine.placement.span import Span

TaskKind = Literal["load", "compute", "store"]

COMPUTE_LANE = "compute"
TOKENS_LANE = "tokens"
"""Carries sampled token ids from the compute tier to the host."""
ATTENTION_LANE = "attention"
"""The host's processor, where it attends to the KV cache beside the compute tier's computations."""


class Tile(NamedTuple):
    """(step i, layer j, gpu_batch k). Loads of weights serve every GPU batch of their layer; theirs is the one whose
    computation they overlap.
    """

    step: int
    layer: int
    gpu_batch: int


class TensorRef(NamedTuple):
    """A version of what a location holds. Versions count up from 0, what the location held before the run."""

    location: str
    version: int
    part: int = 0
    """Several tasks may fill one version, each its own part."""


class Move(NamedTuple):
    """Copy one span to another of the same size in bytes."""

    source: Span
    target: Span


@dataclass(frozen=True, slots=True)
class Copy:
    """Carry out moves between the near tier (the compute tier or a staging slot) and the far one, whose link it is."""

    far: str
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class GatherRows:
    """Look up the embedding rows of a batch's tokens that lie on tier `far`, and put them into `target`'s region."""

    far: str
    target: Span
    batch: BatchStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Run layer `layer` on one GPU batch. Slots are None where nothing is loaded."""

    layer: int
    batch: BatchStep
    weight_slot: int | None = None
    kv_slot: int | None = None
    hidden_slot: int | None = None
    """Holds the parts loaded for this tile, updated in place and stored from there."""
    embed_slot: int | None = None
    prompt_slot: int | None = None
    """Where a prompt's keys and values are left, if attention on the host can't address the compute tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """The first part of a decoder layer on one GPU batch: queries, keys and values, into an attention slot."""

    layer: int
    batch: BatchStep
    weight_slot: int | None
    hidden_slot: int | None
    attention_slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attend:
    """Attention of one GPU batch on the host: cache the keys and values of an attention slot, and replace its queries
    by what they attend to.
    """

    layer: int
    batch: BatchStep
    kv_slot: int | None
    attention_slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOutput:
    """The rest of a decoder layer on one GPU batch, from the attended values in an attention slot."""

    layer: int
    batch: BatchStep
    weight_slot: int | None
    hidden_slot: int | None
    attention_slot: int


@dataclass(frozen=True, slots=True)
class DecodeWeights:
    """Decode a layer's matrices, once for all GPU batches of a step."""

    layer: int
    weight_slot: int | None


@dataclass(frozen=True, slots=True)
class FetchTokens:
    """Bring a batch's sampled token ids to the host."""

    batch: BatchStep


Operation = Copy | GatherRows | DecodeWeights | Compute | AttentionInputs | Attend | AttentionOutput | FetchTokens


HOST_OPERATIONS = (GatherRows, Attend)
"""The host's own code touches buffers in these, so the host waits for the tasks before them, whatever the lane."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A node of the graph."""

    key: str
    """Unique in the whole run."""
    kind: TaskKind
    tile: Tile
    lane: str
    operation: Operation
    reads: tuple[TensorRef, ...]
    writes: tuple[TensorRef, ...]
    nbytes: int = 0
    """Bytes moved over the lane's link; of attention on the host, those of the cache that it reads."""
    flops: float = 0.0
    """Multiplications and additions of the matmuls and of attention."""
    fills: tuple[TensorRef, ...] = ()
    """Those of `reads` into which nothing was loaded: the task uses them as space and makes their next versions."""
