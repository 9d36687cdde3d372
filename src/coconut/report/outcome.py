"""What came out, in a few sentences at the head of the page: the answer, its controls, and what lessens its worth."""

from collections.abc import Sequence

from coconut.config.schema import BASE
from coconut.probing.conclusion import conclude
from coconut.report.results import Result, count_updates, find_last, find_lineage, find_reference
from coconut.report.tables import paired_p
from coconut.report.text import format_p, format_share

_SIGNIFICANT = 0.05
_MOST_CONTROLS = 4
_SMALL_TEST_SET = 100
_MOST_SILENT = 0.5
"""Share of questions without an answer from which on the page says so in words."""
_MOST_FALL = 0.2
"""Share by which a validation loss falls in the last epoch of a warm-up that had not ended."""
_LEARNED = 0.99
"""Accuracy from which on a warm-up has ended, however its loss falls."""


def describe_outcome(results: Sequence[Result]) -> str:
    """Say how often the reference is right, whether its matched controls are, and what its thoughts do.

    A difference is claimed where McNemar's test over the same questions shows it (p < 0.05), and nowhere else.
    """
    reference = find_reference(results)
    if reference is None or reference.metric("accuracy") is None:
        best = max((one for one in _scored(results)), key=_accuracy, default=None)
        if best is None:
            return "Nothing is evaluated yet."
        return f"{_share(best)}{'; that is the best of all entries' if len(results) > 1 else ''}."
    sentences = [f"{_share(reference)}.", _describe_controls(results, reference)]
    words = find_last(results, "words")
    if words is not None and words is not reference and words.metric("accuracy") is not None:
        sentences.append(f"{_against(words, reference)} with its steps in words.")
    main = [one for one in _scored(results) if one.kind.role == "main"]
    best = max(main, key=_accuracy, default=reference)
    if _accuracy(best) > _accuracy(reference):
        sentences.append(f"The best entry with thoughts: {_against(best, reference)}.")
    others = [one for one in main if one.method not in (reference.method, best.method)]
    if others:
        sentences.append(f"The best of other methods: {_against(max(others, key=_accuracy), reference)}.")
    conclusion = None if reference.thoughts is None else conclude(reference.thoughts.rows)
    if conclusion is not None:
        sentences.append(f"{conclusion[0].upper()}{conclusion[1:]}.")
    elif reference.metric("thoughts"):
        sentences.append("Whether the answers need the thoughts was not measured.")
    return " ".join(sentences)


def _describe_controls(results: Sequence[Result], reference: Result) -> str:
    """Compare with the controls that had as many updates; where none had, say so, and name the best of the others."""
    controls = [
        one for one in _scored(results) if one.kind.role == "control" and one.name != BASE and one is not reference
    ]
    controls.sort(key=_accuracy, reverse=True)
    if not controls:
        return "No control was run."
    total = count_updates(results, reference)
    matched = [one for one in controls if total and abs(count_updates(results, one) - total) <= total / 100]
    if not matched:
        return (
            f"No control had as many updates: {_against(controls[0], reference)} had"
            f" {count_updates(results, controls[0]):,.0f}, {reference.label} {total:,.0f}."
        )
    slots = reference.metric("thoughts")
    shown = ", ".join(
        _against(one, reference, "as many slots" if slots and one.metric("thoughts") == slots else "")
        for one in matched[:_MOST_CONTROLS]
    )
    rivals = [one.label for one in matched if not _is_beaten(one, reference)]
    if rivals:
        return f"That is not shown to be more than {' and '.join(rivals)}, with as many updates: {shown}."
    return f"That is more than {'every control' if len(matched) > 1 else 'the control'} with as many updates: {shown}."


def _is_beaten(control: Result, reference: Result) -> bool:
    p = paired_p(control, reference)
    return p is not None and p < _SIGNIFICANT and _accuracy(control) < _accuracy(reference)


def describe_warnings(results: Sequence[Result]) -> str:
    """Say what makes these accuracies worth less than they seem; nothing where nothing does."""
    sentences = []
    smallest = min((int(result.metric("num_examples") or 0) for result in results if result.metrics), default=0)
    if 0 < smallest < _SMALL_TEST_SET:
        sentences.append(
            f"The test split is small: with {smallest} examples one more right answer is worth {1 / smallest:.3f}."
        )
    trained = [result for result in results if result.name != BASE]
    silent = [result.label for result in trained if (result.metric("no_answer_share") or 0) >= _MOST_SILENT]
    if silent:
        sentences.append(
            f"No answer to at least half of the questions: {', '.join(silent)}. A model that has not learnt the form"
            " of an answer scores 0 whatever it computes: train it longer, or raise evaluate.max_new_tokens if its"
            " text is cut off."
        )
    reference = find_reference(results)
    for one in [] if reference is None else find_lineage(results, reference.name):
        fall = _fall_at_the_end(one)
        if one.kind.role == "words" and fall > _MOST_FALL and (one.metric("accuracy") or 0) < _LEARNED:
            sentences.append(
                f"{one.training_label} was still learning when it ended (its validation loss fell by {fall:.0%} in its"
                " last epoch): with more epochs, what follows it may be another."
            )
    return " ".join(sentences)


def _fall_at_the_end(result: Result) -> float:
    """Return the share by which the validation loss fell in the last epoch, 0 where there was one epoch."""
    losses = [loss for row in result.history if (loss := row.get("valid_loss")) is not None]
    return 1 - losses[-1] / losses[-2] if len(losses) > 1 and losses[-2] > 0 else 0.0


def _scored(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.metric("accuracy") is not None]


def _accuracy(result: Result) -> float:
    return result.metric("accuracy") or 0.0


def _share(result: Result) -> str:
    num = result.metric("num_examples")
    # A share would round 1,999 of 2,000 to all of them.
    share = f"{_accuracy(result) * num:,.0f} of {num:,.0f}" if num else f"{_accuracy(result):.1%} of the"
    return f"{result.label} answers {share} test questions right"


def _against(result: Result, reference: Result, note: str = "") -> str:
    p = paired_p(result, reference)
    notes = "; ".join(filter(None, ["" if p is None else f"p {format_p(p)}", note]))
    return f"{result.label} {format_share(_accuracy(result))}{f' ({notes})' if notes else ''}"
