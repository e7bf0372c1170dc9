"""Hardware profiles of round numbers, and sizes to measure this machine with in no time."""

from __future__ import annotations

from collections.abc import Mapping

from flexflow_engine.abc.hardware import (
    Beside,
    CodecRates,
    Curve,
    Direction,
    HardwareProfile,
    HostCosts,
    Link,
    Processor,
)
from flexflow_engine.planning.profile.extent import Extent

TINY = Extent(
    seconds=1e-3,
    link_seconds=2e-3,
    tokens=(1, 4),
    features=32,
    small_features=8,
    cold_nbytes=2**14,
    prompts=(4, 8),
    contexts=(4, 8),
    heads=2,
    head_dim=8,
    attention_rows=2,
    page_tokens=4,
    page_nbytes=8192,
    pages=4,
    written_pages=8,
    small_nbytes=512,
    small_units=4,
)


def constant(rate: float) -> Curve:
    return Curve(((1.0, rate),))


def link(bytes_per_s: float = 1e6, latency_s: float = 0.0, beside: Beside | None = None) -> Link:
    return Link(bytes_per_s=bytes_per_s, latency_s=latency_s, beside=beside or Beside())


def both_ways(of: Link) -> Mapping[Direction, Link]:
    return {"read": of, "write": of}


def processor(*, task_s: float = 0.0, layer_s: float = 0.0, product_s: float = 0.0) -> Processor:
    """A million of everything a second; int4 is decoded at 2 million numbers, int8 at a fifth of one, and both are
    encoded at half a million.
    """
    return Processor(
        matmul_flops_per_s={"float32": constant(1e6), "float16": constant(1e6)},
        prefill_attention_flops_per_s=constant(1e6),
        decode_attention_bytes_per_s={"none": constant(1e6)},
        codecs={
            "group-int4": CodecRates(encode_values_per_s=0.5e6, decode_values_per_s=2e6),
            "group-int8": CodecRates(encode_values_per_s=0.5e6, decode_values_per_s=0.2e6),
        },
        memory_bytes_per_s=1e6,
        task_s=task_s,
        layer_s=layer_s,
        product_s=product_s,
    )


def profile(
    *,
    links: Mapping[str, Link] | None = None,
    cpu: Processor | None = None,
    compile_task_s: float = 0.0,
    gather_row_s: float = 0.0,
) -> HardwareProfile:
    """links: by tier plugin, for both directions; 1 MB/s without latency where none is given."""
    given = {"pinned": link(), "throttled": link(), "zarr": link()} | dict(links or {})
    return HardwareProfile(
        name="round",
        links={plugin: both_ways(one) for plugin, one in given.items()},
        processors={"cpu": cpu or processor(), "island": cpu or processor()},
        host=HostCosts(compile_task_s=compile_task_s, gather_row_s=gather_row_s),
    )
