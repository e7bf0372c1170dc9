"""Rule 7 of legal graphs: what a slot holds is used for what it was made for.

A slot's version may be loaded, waited for and complete, and still be another tile's: two tiles in flight, one slot.

- Whoever reads a slot belongs to the tile of those who made what is in it; for weights, to their layer.
- The host attends to what its tile's inputs left, and a tile's output takes what was attended to: nothing but a copy
  between two memories lies between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from flexflow_engine.graph.task import Attend, AttentionInputs, AttentionOutput, Copy, Operation, Task

_WEIGHTS = ("weights.slot.", "weights.decoded")
_SLOTS = ("hidden.slot.", "embed.slot.", "kv.slot.", "kv.prompt.", "attention.", "staging.")
_TAKES: Mapping[type[Operation], type[Operation]] = {Attend: AttentionInputs, AttentionOutput: Attend}
"""Whose work each takes out of its attention slot."""

_Makers = Mapping[tuple[str, int], list[Task]]
"""Who made a version of a location."""


def check_slots(tasks: Iterable[Task]) -> None:
    """Raises AssertionError, naming the tasks. What earlier steps have made counts as made for whoever reads it."""
    tasks = tuple(tasks)
    makers: dict[tuple[str, int], list[Task]] = defaultdict(list)
    for task in tasks:
        for ref in task.writes:
            makers[ref.location, ref.version].append(task)
    for task in tasks:
        _check_owner(task, makers)
        if type(task.operation) in _TAKES:
            _check_taken(task, makers, _TAKES[type(task.operation)])


def _check_owner(task: Task, makers: _Makers) -> None:
    for ref in task.reads:
        for maker in makers.get((ref.location, ref.version), []):
            broken = f"rule 7: {task.key} finds in {ref.location} what {maker.key} made"
            if ref.location.startswith(_WEIGHTS):
                assert maker.tile.layer == task.tile.layer, broken
            if ref.location.startswith(_SLOTS):
                assert maker.tile == task.tile, broken


def _check_taken(task: Task, makers: _Makers, expected: type[Operation]) -> None:
    (maker,) = _attention_makers(task, makers)
    if isinstance(maker.operation, Copy):
        (maker,) = _attention_makers(maker, makers)
    assert isinstance(maker.operation, expected), f"rule 7: {task.key} takes what {maker.key} left"


def _attention_makers(task: Task, makers: _Makers) -> list[Task]:
    return [m for r in task.reads if r.location.startswith("attention.") for m in makers[r.location, r.version]]
