"""Measures what a profile lacks of what is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from types import TracebackType
from typing import Self

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.hardware import (
    DIRECTIONS,
    PLAIN,
    Direction,
    HardwareProfile,
    HostCosts,
    Link,
    Processor,
    measured_key,
)
from flexflow_engine.abc.tier import HOST, Tier
from flexflow_engine.errors import FlexFlowError, HardwareError
from flexflow_engine.placement.reach import is_staged
from flexflow_engine.planning.availability import unavailable
from flexflow_engine.planning.profile.arithmetic import (
    float32_from,
    matmul_load,
    memory_bytes_per_s,
    product_rates,
    team_rates,
)
from flexflow_engine.planning.profile.attention import decode_bytes_per_s, prefill_flops_per_s
from flexflow_engine.planning.profile.bench import Bench
from flexflow_engine.planning.profile.codecs import codec_rates
from flexflow_engine.planning.profile.extent import Extent
from flexflow_engine.planning.profile.host import host_costs, layer_s, measure_tasks
from flexflow_engine.planning.profile.links import Probe, measure_link
from flexflow_engine.planning.profile.needs import CodecPart, LinkPart, Needs, Part, ProcessorPart, TierChoice

Notice = Callable[[str], None]


def complete(
    known: HardwareProfile | None, needs: Needs, *, name: str, extent: Extent, notice: Notice
) -> Iterator[HardwareProfile]:
    """The profile, once more with each part that is measured, the last one with everything that is needed; nothing
    where it has that already.

    name: of the machine. notice: told of each part before it is measured. Raises HardwareError where this machine
    lacks a tier, or a tier the room that measuring takes.
    """
    profile = known or HardwareProfile(
        name=name, links={}, processors={}, host=HostCosts(compile_task_s=0.0, gather_row_s=0.0)
    )
    parts = needs.missing(known)
    if not parts:
        return
    if error := next(unavailable(needs.tiers), None):
        what = f"this machine can't be measured: {error.what}"
        raise HardwareError(what, where=error.where, fix="plan for a machine from a file: --hardware FILE") from error
    with _Workbench(needs, extent) as bench:
        for number, part in enumerate(parts, start=1):
            notice(f"measuring this machine: {part} ({number} of {len(parts)})")
            profile = bench.add(profile, part)
            yield profile


class _Workbench:
    """The tiers, open, and what is made on them. Everything is made when it is first needed, and closed at the end."""

    def __init__(self, needs: Needs, extent: Extent) -> None:
        self._needs, self._extent = needs, extent
        self._stack = ExitStack()
        self._tiers: dict[str, Tier] = {}
        self._benches: dict[str, Bench] = {}
        self._probes: dict[str, Probe] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, profile: HardwareProfile, part: Part) -> HardwareProfile:
        """The profile with a part more. Raises HardwareError, whatever it is that a tier can't do."""
        try:
            return self._measured(profile, part)
        except HardwareError:
            raise
        except FlexFlowError as error:
            raise HardwareError(f"it can't be measured: {error.what}", where=error.where, fix=error.fix) from error

    def _measured(self, profile: HardwareProfile, part: Part) -> HardwareProfile:
        if isinstance(part, ProcessorPart):
            return self._add_processor(profile, part)
        if isinstance(part, CodecPart):
            return self._add_codec(profile, part)
        return replace(profile, links={**profile.links, part.name: self._links(part, profile)})

    def _add_processor(self, profile: HardwareProfile, part: ProcessorPart) -> HardwareProfile:
        bench, extent, plain = self._bench(part.memory, profile), self._extent, self._needs.plain
        widened_from: dict[DType, int | None] = {}
        if part.memory == HOST and bench.dtype != "float32":
            widened_from = {bench.dtype: float32_from(bench, extent)}
            bench.choose(widened_from[bench.dtype])
        tasks = measure_tasks(self._needs.model, plain, self._tier(self._in_memory(part.memory)))
        products = product_rates(bench, extent, bench.multiply)
        processor = Processor(
            matmul_flops_per_s={bench.dtype: products.matmul_flops_per_s},
            prefill_attention_flops_per_s=prefill_flops_per_s(bench, extent),
            decode_attention_bytes_per_s={PLAIN: decode_bytes_per_s(bench, extent, plain)},
            codecs={},
            memory_bytes_per_s=memory_bytes_per_s(bench, extent),
            task_s=tasks.run_s,
            layer_s=layer_s(bench, extent, plain),
            product_s=products.product_s,
            float32_from=widened_from,
            torch_team={bench.dtype: team_rates(bench, extent)} if part.memory == HOST else {},
        )
        measured = replace(profile, processors={**profile.processors, part.memory: processor})
        return measured if profile.processors else replace(measured, host=host_costs(bench, extent, tasks))

    def _add_codec(self, profile: HardwareProfile, part: CodecPart) -> HardwareProfile:
        bench, processor = self._bench(part.memory, profile), profile.processors[part.memory]
        name = measured_key(part.codec)
        curve = decode_bytes_per_s(bench, self._extent, part.codec.for_cache())
        processor = replace(
            processor,
            decode_attention_bytes_per_s={**processor.decode_attention_bytes_per_s, name: curve},
            codecs={**processor.codecs, name: codec_rates(bench, self._extent, part.codec, processor.product_s)},
        )
        return replace(profile, processors={**profile.processors, part.memory: processor})

    def _links(self, part: LinkPart, profile: HardwareProfile) -> Mapping[Direction, Link]:
        probe = self._probe(part.tier)
        others = [self._probe(other.tier) for other in self._needs.links if other.tier is not part.tier]
        bench = self._bench(str(self._needs.device.tier_class.memory), profile)
        compute = matmul_load(bench, self._extent)
        return {direction: measure_link(probe, direction, others, compute) for direction in DIRECTIONS}

    def _tier(self, choice: TierChoice) -> Tier:
        if choice.name not in self._tiers:
            tier = choice.tier_class(label=choice.name, budget_bytes=sys.maxsize, options=choice.options)
            self._tiers[choice.name] = self._stack.enter_context(closing(tier))
        return self._tiers[choice.name]

    def _in_memory(self, memory: str) -> TierChoice:
        return next(choice for choice in self._needs.tiers if choice.tier_class.memory == memory)

    def _bench(self, memory: str, profile: HardwareProfile) -> Bench:
        """It multiplies as the profile says, where it does."""
        if memory not in self._benches:
            tier = self._tier(self._in_memory(memory))
            bench = Bench(tier, self._needs.model.dtype, self._extent.seconds)
            self._benches[memory] = self._stack.enter_context(closing(bench))
            known = profile.processors.get(memory)
            if known and bench.dtype in known.float32_from:
                bench.choose(known.float32_from[bench.dtype])
        return self._benches[memory]

    def _probe(self, choice: TierChoice) -> Probe:
        if choice.name not in self._probes:
            device = self._needs.device
            staged = is_staged(choice.tier_class.memory, device.tier_class.memory)
            near = self._in_memory(HOST) if staged else device
            probe = Probe(self._tier(choice), self._tier(near), self._extent)
            self._probes[choice.name] = self._stack.enter_context(closing(probe))
        return self._probes[choice.name]
