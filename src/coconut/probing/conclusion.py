"""Whether the answers of an entry depend on its thoughts, in a sentence."""

from collections.abc import Sequence

from coconut.evaluation.statistics import format_ratio
from coconut.probing.rows import Row, find_row


def conclude(rows: Sequence[Row]) -> str | None:
    """Say in a sentence whether the answers depend on what stands in the slots.

    The test is the exchange with another question: zeros and noise are strange to a model in any slot, but another
    question's thoughts look like its own. None where there are no thoughts to look into.
    """
    row = find_row(rows, "replaced", condition="other_question", group="all")
    changed = find_row(rows, "replaced_changed", condition="other_question", group="all")
    if row is None or changed is None or row.value is None or changed.value is None:
        return None
    if changed.value == 0:
        return f"the thoughts do nothing here: those of another question change no answer of {row.num}"
    if row.p is not None and row.p < 0.01:
        return (
            f"the answers depend on the thoughts: with those of another question accuracy is {format_ratio(row.value)}"
        )
    return (
        f"no effect of the thoughts on accuracy was found: those of another question change {changed.value:.1%} of the"
        f" answers, and accuracy is {format_ratio(row.value)} (p {row.p:.2f})"
    )
