"""`plugins`: what is installed, and what of it is broken."""

from __future__ import annotations

import json
from dataclasses import asdict

from flexflow_engine.cli.columns import columns
from flexflow_engine.cli.session import Json, load_registry
from flexflow_engine.plugins import PluginRow


def plugins(as_json: Json = False) -> None:
    """List every tier, codec, model and scheduler, with the errors of those that can't be used."""
    rows = load_registry().listing()
    print(json.dumps([asdict(row) for row in rows], indent=2) if as_json else _table(rows))


def _table(rows: tuple[PluginRow, ...]) -> str:
    lines = [(row.kind, row.name, row.module, row.distribution, row.version) for row in rows]
    errors = [f"{row.kind} {row.name} ({row.distribution}) can't be used: {row.error}" for row in rows if row.error]
    return "\n".join([columns(("kind", "name", "module", "distribution", "version"), lines), *errors])
