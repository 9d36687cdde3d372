"""Answers as mathematics, judged by the package math-verify, as results on MATH and AIME are."""


def verify(found: str, gold: str) -> bool:
    r"""Say whether math-verify takes two answers for equal, which are LaTeX or plain text.

    Raises:
        ValueError: The package is not installed.
    """
    try:
        import math_verify  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            "evaluate.answer_rules: found math_verify, but the package math-verify is not installed; run"
            " pip install -e '.[math]' in the repository, or take the rule out"
        ) from None
    # It reads LaTeX only inside of a box or of dollar signs.
    boxed = [text if r"\boxed" in text else rf"\boxed{{{text.strip('$')}}}" for text in (gold, found)]
    return bool(math_verify.verify(*map(math_verify.parse, boxed)))
