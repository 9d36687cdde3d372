"""How many thoughts an answer needs: fewer and more of them than in training, and when the answer is there."""

from coconut.data.encoding import answer_start
from coconut.evaluation.outcomes import Outcome
from coconut.probing.graphs import KINDS, Graphs, kind_of_text
from coconut.probing.rows import Row, mean_row, missing, share_row
from coconut.probing.subject import Subject


def measure_numbers(
    subject: Subject, graphs: Graphs | None
) -> tuple[list[Row], list[list[Outcome]], list[list[float]]]:
    """Ask with 0 to twice as many thoughts as in training.

    Returns:
        (rows, outcomes, scores): the outcomes and log probabilities of the gold text by number of thoughts, 0 to K.
    """
    most = subject.num_slots
    rows: list[Row] = []
    outcomes, scores = [], []
    for number in range(2 * most + 1 if most else 1):
        found = subject.outcomes if number == most else subject.ask(num_thoughts=number)
        rights = [outcome.right for outcome in found]
        against = None if number == most else subject.rights
        names = {"condition": str(number), "thought": number, "group": "answer"}
        rows.append(share_row(rights, against, measure="accuracy_with", **names))
        rows.append(mean_row([float(o.num_generated_tokens) for o in found], measure="tokens_with", **names))
        if number <= most:
            scores.append(subject.log_p if number == most else subject.score(num_thoughts=number))
            outcomes.append(found)
            rows.append(share_row(rights, against, measure="accuracy_after", thought=number))
            rows.append(mean_row(scores[-1], measure="log_p_after", thought=number))
    return [*rows, *_first_right(outcomes), *_measure_words(subject, graphs)], outcomes, scores


def _first_right(outcomes: list[list[Outcome]]) -> list[Row]:
    """Say after how many thoughts the answer is right and stays right."""
    by_question = list(zip(*([o.right for o in found] for found in outcomes), strict=True))
    firsts = [first_stable(rights) for rights in by_question]
    return [
        share_row([first == number for first in firsts], measure="first_right", thought=number)
        for number in range(len(outcomes))
    ]


def first_stable(rights: tuple[bool, ...]) -> int | None:
    """Return the first place from which on all are right, None if the last is not.

    >>> first_stable((True, False, True, True)), first_stable((True, False))
    (2, None)
    """
    place = len(rights)
    while place and rights[place - 1]:
        place -= 1
    return place if place < len(rights) else None


def _measure_words(subject: Subject, graphs: Graphs | None) -> list[Row]:
    """With fewer thoughts than in training, forbid the answer's mark first, so that the rest is said in words."""
    if not subject.num_slots:
        return [missing("accuracy_with", "the entry has no thoughts, so that nothing can be left to words")]
    mark = answer_start(subject.evaluator.tokenizer)
    rows = []
    for number in range(subject.num_slots):
        found = subject.ask(num_thoughts=number, not_first=mark)
        names = {"condition": str(number), "thought": number, "group": "words"}
        rows.append(share_row([o.right for o in found], subject.rights, measure="accuracy_with", **names))
        rows.append(mean_row([float(o.num_generated_tokens) for o in found], measure="tokens_with", **names))
        if graphs is not None:
            kinds = [kind_of_text(search, o.text) for search, o in zip(graphs.searches, found, strict=True)]
            for kind in KINDS:
                said = [one == kind for one in kinds]
                rows.append(share_row(said, measure="said", condition=str(number), thought=number, group=kind))
    return rows
