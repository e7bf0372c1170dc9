"""What was measured of one configuration, kept as JSON, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import TypeAdapter

from throughput.configuration import Configuration
from throughput.published import published_shape
from throughput.roofline import Bound, Rates, decode_bound, decode_work, prefill_bound, prefill_work

PLAIN_BITS = 16.0
INT4_BITS = 4.5
"""A bfloat16 number of the cache as it is, and in groups of 64 with a scale and a minimum of 16 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRun:
    """One whole job of this engine."""

    metrics: Mapping[str, Any]
    """As `--json` prints them."""
    peak_bytes: int
    rates: Rates
    """Measured right before the run and right after it, the two taken together."""

    @property
    def tokens_per_s(self) -> float:
        return float(self.metrics["tokens_per_s"])


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineTry:
    """One batch size of the baseline, extrapolated to the whole job."""

    batch_size: int
    tokens_per_s: float
    """0 where it did not finish."""
    note: str
    """Why it has no figure; empty where it has one."""
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Everything measured of one configuration in one run of the benchmark."""

    caches: str
    """State of the page cache before every run."""
    engine: tuple[EngineRun, ...] = ()
    engine_note: str = ""
    """Why there is a run less than wanted; empty where there is none."""
    baseline: tuple[BaselineTry, ...] = ()

    @property
    def engine_tokens_per_s(self) -> float:
        """The median run; 0 without one."""
        return median(run.tokens_per_s for run in self.engine) if self.engine else 0.0

    @property
    def best_batch_size(self) -> int | None:
        """The baseline's fastest batch size; None where none finished."""
        finished = [attempt for attempt in self.baseline if attempt.tokens_per_s]
        return max(finished, key=lambda attempt: attempt.tokens_per_s).batch_size if finished else None

    @property
    def baseline_tokens_per_s(self) -> float:
        """The median of the best batch size's tries; 0 where none finished."""
        best = [a.tokens_per_s for a in self.baseline if a.batch_size == self.best_batch_size]
        return median(best) if best else 0.0


def job_bounds(configuration: Configuration, run: EngineRun) -> tuple[Bound, Bound]:
    """The bounds of prefill and decode, from the bytes that the run moved and the rates measured beside it.

    Weights on the far tier are read once for the prompts of all rows; of the cache, the prompts' share is written then.
    """
    c, lanes, shape = configuration, run.metrics["lanes"], published_shape(configuration.model)
    read, written = (_moved(lanes, lane) for lane in (f"{c.far}.read", f"{c.far}.write"))
    waves = ceil(c.sequences / (c.gpu_batch_size * c.num_gpu_batches))
    prefill_read = min(read, waves * run.metrics["placement"]["weights"][c.far])
    prefill_written = written * c.prompt_tokens / (c.prompt_tokens + c.new_tokens - 1)
    prefill = prefill_work(
        shape,
        sequences=c.sequences,
        prompt_tokens=c.prompt_tokens,
        far_read_nbytes=prefill_read,
        far_write_nbytes=prefill_written,
    )
    decode = decode_work(
        shape,
        sequences=c.sequences,
        prompt_tokens=c.prompt_tokens,
        new_tokens=c.new_tokens,
        cache_bits=INT4_BITS if "kv_cache" in c.codecs else PLAIN_BITS,
        far_read_nbytes=read - prefill_read,
        far_write_nbytes=written - prefill_written,
    )
    return prefill_bound(prefill, run.rates), decode_bound(decode, run.rates)


def roofline_tokens_per_s(configuration: Configuration, run: EngineRun) -> float:
    """Tokens a second if both phases took no longer than their slowest resource."""
    seconds = sum(bound.total_s for bound in job_bounds(configuration, run))
    return configuration.sequences * configuration.new_tokens / seconds


def read_results(path: Path) -> dict[str, Result]:
    """Results by configuration, as `write_results` left them."""
    return _ADAPTER.validate_json(path.read_bytes())


def write_results(path: Path, results: Mapping[str, Result]) -> None:
    path.write_bytes(_ADAPTER.dump_json(dict(results), indent=1))


_ADAPTER = TypeAdapter(dict[str, Result])


def _moved(lanes: Mapping[str, Any], lane: str) -> float:
    return float(lanes.get(lane, {}).get("bytes", 0))
