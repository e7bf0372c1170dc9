"""What a machine can do, as plain data: measured by `profile`, or taken from published figures in a file.

Rates are those of one resource alone; what is left of them while others work is told beside them. `planning.hardware`
reads and writes the same as YAML, `planning.cost` makes seconds of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import exp, log
from typing import Literal, get_args

from flexflow_engine.abc.codec import Codec, with_products
from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.policy import TierDescription
from flexflow_engine.errors import HardwareError

Direction = Literal["read", "write"]
"""read: towards the tier where the model computes; write: away from it."""
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

PLAIN = "none"
"""The codec name under which rates of numbers in the model's own dtype stand."""


def measured_key(codec: Codec) -> str:
    """Under which rates of a codec with just these settings stand; encoding is measured as a cache needs it."""
    return with_products(codec.for_cache().key, codec)


@dataclass(frozen=True, slots=True)
class Curve:
    """A rate that depends on a size: (size, rate) points in ascending order of size, sizes and rates above 0.

    Between two points it is a straight line on doubly logarithmic axes; beyond the ends it keeps their value, so a
    size that was never measured is never extrapolated.
    """

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        index = bisect_right(self.points, size, key=lambda point: point[0])
        if index == 0:
            return self.points[0][1]
        if index == len(self.points):
            return self.points[-1][1]
        (x0, y0), (x1, y1) = self.points[index - 1], self.points[index]
        along = log(size / x0) / log(x1 / x0)
        return exp(log(y0) + along * (log(y1) - log(y0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What is left of a link's rate while others work, as a fraction of the rate alone, above 0 and at most 1.

    Where several of them work, the fractions are multiplied.
    """

    reverse: float = 1.0
    """While the other direction of the same link works."""
    links: float = 1.0
    """While at least one other tier's link works."""
    processors: float = 1.0
    """While at least one processor computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction between a tier and the tier where the model computes, or host memory where bytes are staged."""

    bytes_per_s: float
    """Of all transfers that run at once, together."""
    latency_s: float
    """What every contiguous transfer takes before its first byte; latencies of transfers that run at once overlap."""
    unit_s: float | None = None
    """What each of many single units takes beyond its bytes that a tier gathers in one call; None: `latency_s`."""
    beside: Beside = field(default_factory=Beside)
    leaves_processors: float = 1.0
    """What is left of a processor's rates while this link works: where the host moves bytes and checks sums, fewer
    cores compute. Where several links work, their fractions are multiplied."""

    @property
    def gathered_unit_s(self) -> float:
        """What a gathered unit takes beyond its bytes."""
        return self.latency_s if self.unit_s is None else self.unit_s


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecRates:
    """Numbers encoded and decoded a second by one processor, in its own memory."""

    encode_values_per_s: float
    decode_values_per_s: float
    product_flops_per_s: Curve | None = None
    """Of products with a matrix in these codes, by tokens as `matmul_flops_per_s`, where the host decodes some of its
    rows at a time and multiplies them out of its cache. None: decoding and a product of plain numbers add up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductRates:
    """Products in one of the ways in which a processor makes them."""

    matmul_flops_per_s: Curve
    """By the rows (tokens) of one call, as `Processor.matmul_flops_per_s`."""
    product_s: float
    """As `Processor.product_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What computes on one kind of memory."""

    matmul_flops_per_s: Mapping[DType, Curve]
    """By the rows (tokens) of one call; two operations a multiplication and addition."""
    prefill_attention_flops_per_s: Curve
    """By the prompt's tokens; only what the causal mask leaves counts, 2 * tokens * (tokens + 1) * width operations."""
    decode_attention_bytes_per_s: Mapping[str, Curve]
    """By cached tokens a sequence, for each codec (as in `codecs`) whose pages attention reads as they are; bytes as
    they lie in the cache, keys and values. `PLAIN` must be there: other codecs' pages are decoded first and then read
    at its rate."""
    codecs: Mapping[str, CodecRates]
    """By codec name, or `measured_key`, which is looked for first; `PLAIN` costs nothing and is left out."""
    memory_bytes_per_s: float
    """Reads and writes together: norms, additions, copies."""
    task_s: float
    """What any task takes beside its arithmetic: its lane, and its calls."""
    layer_s: float = 0.0
    """What a decoder layer takes beside that: the calls of its norms and additions, and of its attention."""
    product_s: float = 0.0
    """What multiplying by a matrix takes beside its operations, whatever its size: threads to wake and to wait for."""
    float32_from: Mapping[DType, int | None] = field(default_factory=dict)
    """Tokens from which on products of such 16-bit numbers are faster if they are widened to float32, some rows of the
    matrix at a time; None: they never are. Runs multiply accordingly. Of the host's processor."""
    torch_team: Mapping[DType, ProductRates | None] = field(default_factory=dict)
    """What products of such numbers take that torch's own threads share; None: the engine's are as fast. Runs that move
    nothing multiply accordingly. Of the host's processor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCosts:
    """Seconds of the host's own code, which no device shortens."""

    compile_task_s: float
    """To compile one task and to hand it to its lane, while the step before runs."""
    gather_row_s: float
    """To put one looked-up row of the embedding table to its place; what its tier takes, and decoding, not included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """One machine."""

    name: str
    links: Mapping[str, Mapping[Direction, Link]]
    """By a tier's name in the recipe, or by its plugin's name; the tier's own name is looked for first."""
    processors: Mapping[str, Processor]
    """By the kind of memory that they compute on: "cpu", "cuda"."""
    host: HostCosts
    capacity_bytes: Mapping[str, int] = field(default_factory=dict)
    """What the machine has at most, by tier plugin, where that is known. Budgets are the recipe's."""

    def lacking_bytes(self, budgets: Iterable[tuple[str, int]]) -> dict[str, int]:
        """By how many bytes (tier plugin, budget) pairs add up to more than the machine has, by plugin; those that fit,
        and those of which nothing is known, are left out.
        """
        asked = Counter[str]()
        for plugin, nbytes in budgets:
            asked[plugin] += nbytes
        lacking = {plugin: asked[plugin] - capacity for plugin, capacity in self.capacity_bytes.items()}
        return {plugin: nbytes for plugin, nbytes in lacking.items() if nbytes > 0}

    def link(self, tier: TierDescription, direction: Direction) -> Link:
        """Raises HardwareError where the profile doesn't know the tier."""
        link = self.links.get(tier.name, self.links.get(tier.plugin, {})).get(direction)
        if link is None:
            raise HardwareError(
                f"there is no link `{tier.plugin}.{direction}`, and tier `{tier.name}` needs it",
                where=f"hardware profile {self.name}",
                fix=f"let `profile` measure it, or give links.{tier.plugin}.{direction} in the file",
            )
        return link

    def processor(self, memory: str | None) -> Processor:
        """Raises HardwareError where the profile has none for this kind of memory."""
        found = self.processors.get(str(memory))
        if found is None:
            raise HardwareError(
                f"there is no processor that computes on {memory} memory",
                where=f"hardware profile {self.name}",
                fix=f"let `profile` measure it, or give processors.{memory} in the file",
            )
        return found
