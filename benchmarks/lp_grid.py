"""The policy that `lp` chooses, measured, against the best of a grid of hand policies measured in the same run.

    python benchmarks/lp_grid.py [--work FOLDER] [--output F.json] [--only NAME]

A small model, tight budgets and throttled links stand in for a large model on real ones. Everything runs in one
process. The policies of a configuration are measured one after another; then lp's and the best of the grid again, in
turns, so that neither a lucky measurement nor a machine that drifts decides: medians of those count. Each measurement
is written to a file as it comes, and is not made again. The machine itself is measured each time, before all else:
nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from transformers import OPTConfig, OPTForCausalLM

from flexflow_engine.abc.hardware import HardwareProfile
from flexflow_engine.abc.progress import JobProgress
from flexflow_engine.engine import plan_recipe, run_recipe
from flexflow_engine.jobs.load import load_recipe
from flexflow_engine.planning.plan import Plan
from flexflow_engine.planning.profile.cache import this_machine
from flexflow_engine.planning.profile.extent import Extent
from flexflow_engine.planning.profile.needs import Needs
from flexflow_engine.plugins import Registry
from prediction import install_throttled_tier
from throughput.child import say
from throughput.table import markdown

MODEL = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "ffn_dim": 2048,
    "word_embed_proj_dim": 512,
    "num_hidden_layers": 6,
    "max_position_embeddings": 256,
    "vocab_size": 2048,
}
"""20 million parameters, 80 MB in float32."""
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 32, 12
GRID_POLICIES = 21
BEST, ROUNDS = 3, 3
"""How many of the grid's best are measured again, and how often."""
HEADER = ("configuration", "lp tokens/s", "best of the grid", "lp / best", "policies", "the grid's best")

Policy = Mapping[str, Any]
"""As the `fixed` scheduler takes it."""
LP: Policy = {"plugin": "lp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A machine and codecs; the first tier is `device`."""

    name: str
    tiers: Mapping[str, Mapping[str, Any]]
    codecs: Mapping[str, str] = field(default_factory=dict)

    def recipe(self, work: Path, scheduler: Policy) -> dict[str, Any]:
        paths = {"zarr": {"path": str(work / "disk")}}
        return {
            "name": "lp_grid",
            "model": {"plugin": "opt", "checkpoint": str(work / "model"), "dtype": "float32"},
            "tiers": {name: {**tier, **paths.get(tier["plugin"], {})} for name, tier in self.tiers.items()},
            "codecs": dict(self.codecs),
            "scheduler": dict(scheduler),
            "workload": {
                "prompts": {"synthetic": {"count": PROMPTS, "prompt_tokens": PROMPT_TOKENS}},
                "max_new_tokens": NEW_TOKENS,
            },
        }


def device(budget: str) -> dict[str, str]:
    return {"plugin": "cpu", "budget": budget}


def slow(budget: str, rate: float, latency_s: float = 0.0) -> dict[str, Any]:
    """Memory behind a link of so many bytes a second."""
    return {"plugin": "throttled", "budget": budget, "bytes_per_second": rate, "latency_s": latency_s}


DISK = {"plugin": "zarr", "budget": "4GiB"}
CONFIGURATIONS = (
    Configuration(name="0.2 GB/s", tiers={"device": device("64MiB"), "far": slow("1GiB", 0.2e9), "disk": DISK}),
    Configuration(name="1 GB/s, 2 ms", tiers={"device": device("64MiB"), "far": slow("1GiB", 1e9, 2e-3), "disk": DISK}),
    Configuration(name="disk only", tiers={"device": device("80MiB"), "disk": DISK}),
    Configuration(
        name="three tiers, int8 cache",
        tiers={"device": device("80MiB"), "far": slow("40MiB", 0.5e9), "disk": DISK},
        codecs={"kv_cache": "group-int8"},
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A policy and what it reached, each time that it was measured."""

    configuration: str
    policy: Policy
    tokens_per_s: list[float]

    @property
    def middle(self) -> float:
        return median(self.tokens_per_s)


class Results:
    """What was measured, by configuration and policy; lies in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        known = json.loads(path.read_text()) if path.exists() else []
        self._measured = {_key(x["configuration"], x["policy"]): Measured(**x) for x in known}

    def of(self, configuration: str, policy: Policy) -> Measured:
        """Empty where it was never measured."""
        empty = Measured(configuration=configuration, policy=policy, tokens_per_s=[])
        return self._measured.get(_key(configuration, policy), empty)

    def add(self, configuration: str, policy: Policy, tokens_per_s: float) -> None:
        """Keep a measurement, in the file too."""
        measured = self.of(configuration, policy)
        measured.tokens_per_s.append(tokens_per_s)
        self._measured[_key(configuration, policy)] = measured
        document = [
            {"configuration": m.configuration, "policy": m.policy, "tokens_per_s": m.tokens_per_s}
            for m in self._measured.values()
        ]
        self._path.write_text(json.dumps(document, indent=2) + "\n")

    def policies(self, configuration: str) -> list[Measured]:
        """Of the grid, fastest first."""
        found = [m for m in self._measured.values() if m.configuration == configuration and m.policy != LP]
        return sorted(found, key=lambda m: -m.middle)


@dataclass(frozen=True, slots=True)
class Verdict:
    """lp against the grid."""

    configuration: str
    lp: float
    best: Measured
    policies: int

    @property
    def ratio(self) -> float:
        return self.lp / self.best.middle


class Measurement:
    """Runs policies of one configuration in this process, and knows what was run before."""

    def __init__(self, configuration: Configuration, work: Path, registry: Registry, results: Results) -> None:
        self._configuration, self._work, self._registry, self._results = configuration, work, registry, results
        self._chosen: Policy | None = None
        """What lp chose; it is asked once."""

    def repeat(self, policy: Policy, times: int) -> None:
        """Until the policy was measured so many times."""
        name = self._configuration.name
        while (done := len(self._results.of(name, policy).tokens_per_s)) < times:
            tokens_per_s = self._run(policy)
            self._results.add(name, policy, tokens_per_s)
            say(f"{name}, {_short(policy)}: {tokens_per_s:.1f} tokens/s ({done + 1} of {times})")

    def fits(self, policy: Policy) -> bool:
        return not self._plan(policy).memory.exceeded

    def _run(self, policy: Policy) -> float:
        fixed = self._choice() if policy == LP else policy
        metrics = run_recipe(
            load_recipe(self._recipe(fixed), [], self._registry),
            self._registry,
            output=self._work / "out.jsonl",
            trace=None,
            progress=Quiet(),
            hardware=self._hardware,
        )
        return float(metrics["tokens_per_s"])

    def _choice(self) -> Policy:
        """As `fixed` takes it."""
        if self._chosen is None:
            self._chosen = {"plugin": "fixed", **self._plan(LP).policy.as_fixed()}
            say(f"{self._configuration.name}, lp chose {_short(self._chosen)}")
        return self._chosen

    def _plan(self, policy: Policy) -> Plan:
        return plan_recipe(load_recipe(self._recipe(policy), [], self._registry), self._registry, self._hardware).plan

    def _recipe(self, policy: Policy) -> Path:
        path = self._work / "recipe.yaml"
        path.write_text(yaml.safe_dump(self._configuration.recipe(self._work, policy), sort_keys=False))
        return path

    def _hardware(self, needs: Needs) -> HardwareProfile:
        return this_machine(needs, extent=Extent(), notice=say)


class Quiet:
    """Progress that nobody is told of."""

    def reading(self, done_bytes: int, total_bytes: int) -> None:
        return

    def importing(self, done_bytes: int, total_bytes: int) -> None:
        return

    def step(self, job: JobProgress) -> None:
        return

    def notice(self, text: str) -> None:
        return


def main() -> None:
    """Print one row a configuration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=[c.name for c in CONFIGURATIONS], help="may be repeated")
    parser.add_argument("--work", type=Path, help="folder for weights and the disk tier; default: a temporary one")
    parser.add_argument("--output", type=Path, default=Path("lp_grid.json"), help="measurements, and those of before")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        os.environ["XDG_CACHE_HOME"] = str(Path(temporary) / "cache")  # the machine as it is today
        prepare(work)
        registry, results = Registry.load(), Results(options.output)
        asked = [c for c in CONFIGURATIONS if not options.only or c.name in options.only]
        print(table([measure(configuration, work, registry, results) for configuration in asked]))


def prepare(work: Path) -> None:
    """The model, and the tier that stands in for slow links, to be found by this process."""
    sys.path.insert(0, str(install_throttled_tier(work)))
    if not (work / "model").exists():
        torch.manual_seed(0)
        OPTForCausalLM(OPTConfig(**MODEL)).save_pretrained(work / "model")  # type: ignore[arg-type]  # a dict of sizes


def measure(configuration: Configuration, work: Path, registry: Registry, results: Results) -> Verdict:
    """Every policy once, then lp's and the best ones of the grid in turns."""
    measurement = Measurement(configuration, work, registry, results)
    measurement.repeat(LP, 1)
    policies = spread([p for p in hand_policies(list(configuration.tiers)) if measurement.fits(p)], GRID_POLICIES)
    for policy in policies:
        measurement.repeat(policy, 1)
    best = [m.policy for m in results.policies(configuration.name)[:BEST]]
    for times in range(2, ROUNDS + 2):
        for policy in (LP, *best):
            measurement.repeat(policy, times)
    return verdict(configuration.name, results, best, len(policies))


def verdict(configuration: str, results: Results, best: Sequence[Policy], policies: int) -> Verdict:
    """By the medians of what was measured in turns: a policy's first figure only tells whether it is among the best."""
    turns = [
        Measured(configuration=configuration, policy=policy, tokens_per_s=_turns(results, configuration, policy))
        for policy in best
    ]
    lp = median(_turns(results, configuration, LP))
    return Verdict(configuration, lp, max(turns, key=lambda m: m.middle), policies)


def _turns(results: Results, configuration: str, policy: Policy) -> list[float]:
    return results.of(configuration, policy).tokens_per_s[1:]


def hand_policies(tiers: Sequence[str]) -> Iterator[Policy]:
    """Batch shapes times shares of weights and cache on the device, the rest on either of the other tiers."""
    shapes = [(8, 1), (16, 1), (32, 1), (64, 1), (8, 4), (16, 2), (16, 4), (32, 2)]
    for shape, weights, cache, far in product(shapes, (0, 30, 60), (0, 50, 100), tiers[1:]):
        yield {
            "plugin": "fixed",
            "gpu_batch_size": shape[0],
            "num_gpu_batches": shape[1],
            "weights": _shares(tiers[0], weights, far),
            "kv_cache": _shares(tiers[0], cache, far),
            "activations": {tiers[0]: 100},
        }


def spread(items: Sequence[Policy], count: int) -> list[Policy]:
    """So many of them, evenly from first to last. Raises SystemExit where there are fewer."""
    if len(items) < count:
        raise SystemExit(f"of the hand policies {len(items)} fit, and {count} are asked for")
    return [items[n * (len(items) - 1) // (count - 1)] for n in range(count)]


def table(verdicts: Sequence[Verdict]) -> str:
    rows = [
        (
            v.configuration,
            f"{v.lp:.1f}",
            f"{v.best.middle:.1f}",
            f"{v.ratio:.2f}",
            str(v.policies),
            _short(v.best.policy),
        )
        for v in verdicts
    ]
    return f"{markdown(HEADER, rows)}\n\nlp reaches at least {min(v.ratio for v in verdicts):.2f} of the grid's best"


def _shares(near: str, percent: int, far: str) -> dict[str, int]:
    return {tier: share for tier, share in ((near, percent), (far, 100 - percent)) if share}


def _short(policy: Policy) -> str:
    if policy == LP:
        return "lp"
    shares = ", ".join(f"{x} {policy[x]}" for x in ("weights", "kv_cache")).translate(str.maketrans("", "", "'{}"))
    return f"{policy['gpu_batch_size']} rows x {policy['num_gpu_batches']}, {shares}"


def _key(configuration: str, policy: Policy) -> str:
    return json.dumps([configuration, policy], sort_keys=True)


if __name__ == "__main__":
    main()
