"""`store list` and `store remove`: the weight stores that imports have left on the disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexflow_engine.abc.sizes import format_size
from flexflow_engine.cli.columns import columns
from flexflow_engine.cli.session import Json
from flexflow_engine.user_cache import user_cache

if TYPE_CHECKING:
    from flexflow_engine.checkpoint.catalogue import StoreEntry

Under = Annotated[
    Path | None,
    typer.Option("--under", metavar="FOLDER", help="A disk tier's path; default: the user's cache folder."),
]
StoreName = Annotated[str, typer.Argument(metavar="NAME", help="As `store list` prints it.")]


def list_(under: Under = None, as_json: Json = False) -> None:
    """List the weight stores with their sizes."""
    from flexflow_engine.checkpoint.catalogue import list_stores  # noqa: PLC0415  # torch; --help must not import it

    root = _root(under)
    stores = list_stores(root)
    if as_json:
        print(json.dumps([{**asdict(store), "path": str(store.path)} for store in stores], indent=2))
    elif stores:
        print(columns(("name", "checkpoint", "dtype", "codec", "size", ""), [_row(store) for store in stores]))
    else:
        print(f"no weight store under {root}")
        if under is None:
            print("a disk tier keeps its own under its `path`, as the shipped recipes do: store list --under .flexflow")


def remove(name: StoreName, under: Under = None) -> None:
    """Remove one weight store; the next run that needs it imports it again."""
    from flexflow_engine.checkpoint.catalogue import remove_store  # noqa: PLC0415  # torch; --help must not import it

    removed = remove_store(_root(under), name)
    print(f"removed {removed.path} ({format_size(removed.nbytes)})")


def _root(under: Path | None) -> Path:
    return user_cache() if under is None else under.expanduser()


def _row(store: StoreEntry) -> tuple[str, ...]:
    state = "" if store.complete else "unfinished"
    codecs = " + ".join(dict.fromkeys((store.codec, store.table_codec)))
    return store.name, store.reference, store.dtype, codecs, format_size(store.nbytes), state
