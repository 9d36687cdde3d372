"""What came out, in two or three sentences at the head of the page."""

from collections.abc import Sequence

from coconut.config.schema import BASE
from coconut.probing.conclusion import conclude
from coconut.report.results import Result, find_last, find_reference
from coconut.report.tables import paired_p
from coconut.report.text import format_p


def describe_outcome(results: Sequence[Result]) -> str:
    """Say how often the last latent entry is right, how often its rivals are, and what its thoughts do."""
    reference = find_reference(results)
    if reference is None or reference.metric("accuracy") is None:
        best = max((one for one in _scored(results)), key=_accuracy, default=None)
        if best is None:
            return "Nothing is evaluated yet."
        return f"{_share(best)}{'; that is the best of all entries' if len(results) > 1 else ''}."
    sentences = [f"{_share(reference)}."]
    words = find_last(results, "words")
    rivals = [
        one
        for one in _scored(results)
        if one.method != reference.method and one.kind.role != "words" and one.name != BASE
    ]
    if words is not None and words.metric("accuracy") is not None:
        sentences.append(f"{_against(words, reference)} with its steps in words.")
    if rivals:
        best = max(rivals, key=_accuracy)
        others = f"The best of the {len(rivals)} other entries" if len(rivals) > 1 else "The other entry"
        sentences.append(f"{others}: {_against(best, reference)}.")
    conclusion = None if reference.thoughts is None else conclude(reference.thoughts.rows)
    if conclusion is not None:
        sentences.append(f"{conclusion[0].upper()}{conclusion[1:]}.")
    return " ".join(sentences)


def _scored(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.metric("accuracy") is not None]


def _accuracy(result: Result) -> float:
    return result.metric("accuracy") or 0.0


def _share(result: Result) -> str:
    num = result.metric("num_examples")
    # A share would round 1,999 of 2,000 to all of them.
    share = f"{_accuracy(result) * num:,.0f} of {num:,.0f}" if num else f"{_accuracy(result):.1%} of the"
    return f"{result.label} answers {share} test questions right"


def _against(result: Result, reference: Result) -> str:
    p = paired_p(result, reference)
    test = "" if p is None else f" (p {format_p(p)})"
    return f"{result.label} {_accuracy(result):.1%}{test}"
