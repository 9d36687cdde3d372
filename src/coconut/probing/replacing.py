"""Whether the answers need the thoughts: what enters the slots is replaced, and the questions are asked again."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from coconut.probing.edits import put, replacements
from coconut.probing.rows import Row, mean_row, share_row
from coconut.probing.subject import Subject


def measure_replaced(subject: Subject) -> list[Row]:
    """Replace one slot, all, all before and all after a slot, by five kinds of vectors."""
    others: Mapping[str, Tensor] = replacements(subject.trace.vectors_NKD)
    rows = []
    for condition, vectors_NKD in others.items():
        for group, thought, slots in _places(subject.num_slots, condition):
            rows += measure_edit(subject, vectors_NKD, slots, condition=condition, group=group, thought=thought)
    return rows


def _places(num_slots: int, condition: str) -> list[tuple[str, int | None, range]]:
    """Return the groups of slots that are replaced together: (name, thought, slots counted from 0)."""
    places: list[tuple[str, int | None, range]] = [("all", None, range(num_slots))]
    if condition == "reordered" or num_slots == 1:
        return places  # One slot has no order, and one of one slot is all.
    places += [("one", slot + 1, range(slot, slot + 1)) for slot in range(num_slots)]
    places += [("before", slot + 1, range(slot)) for slot in range(2, num_slots)]
    places += [("after", slot + 1, range(slot + 1, num_slots)) for slot in range(num_slots - 2)]
    return places


def measure_edit(
    subject: Subject, vectors_NKD: Tensor, slots: range, *, condition: str, group: str, thought: int | None
) -> list[Row]:
    """Return accuracy, share of answers that change, and change of log p(gold) with other vectors in these slots."""
    edits = put(vectors_NKD, slots)
    found, score = subject.ask(edits=edits), subject.score(edits=edits)
    names: dict[str, Any] = {"condition": condition, "group": group, "thought": thought}
    changed = [one.answer != other.answer for one, other in zip(found, subject.outcomes, strict=True)]
    moved = [after - before for after, before in zip(score, subject.log_p, strict=True)]
    return [
        share_row([outcome.right for outcome in found], subject.rights, measure="replaced", **names),
        share_row(changed, measure="replaced_changed", **names),
        mean_row(moved, measure="replaced_log_p", **names),
    ]
