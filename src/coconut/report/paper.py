"""Shows Table 1 of the paper next to our results, where the curriculum holds the paper's arms.

Source: Hao et al. 2024 (arXiv:2412.06769), table 1.
"""

from collections.abc import Sequence

from coconut.report.results import Result, find_end, find_lineage
from coconut.report.tables import Table, format_accuracy, paired_p
from coconut.report.text import NOTHING, format_number, format_p

_WITHOUT_CURRICULUM = "- w/o curriculum"

_MAIN = "Coconut"

# Accuracy in % and tokens on GSM8K, ProntoQA, ProsQA; with a spread where the paper gives one.
_PUBLISHED = {
    "CoT": ("42.9 ±0.2, 25.0", "98.8, 92.5", "77.5 ±1.9, 49.4"),
    "No-CoT": ("16.5 ±0.5, 2.2", "93.8, 3.0", "76.7, 8.2"),
    "iCoT": ("30.0, 2.2", "99.8, 3.0", "98.2, 8.2"),
    "Pause token": ("16.4, 2.2", "77.7, 3.0", "75.9, 8.2"),
    "Coconut": ("34.1 ±1.5, 8.2", "99.8, 9.0", "97.0 ±0.3, 14.2"),
    _WITHOUT_CURRICULUM: ("14.4, 8.2", "52.4, 9.0", "76.1, 14.2"),
    "- w/o thought": ("21.6, 2.3", "99.9, 3.0", "95.5, 8.2"),
    "- pause as thought": ("24.1, 2.2", "100.0, 3.0", "96.6, 8.2"),
}

PAPER_NOTE = (
    "The right-hand columns are the paper's GPT-2 124M on the paper's tasks (accuracy in %, tokens). They are another"
    " model on other data: compare the order of the arms, not the numbers. Tokens count generated tokens and, as in"
    " the paper, the thoughts that are fed back. p: exact McNemar test of our arm against our Coconut."
)


def paper_table(results: Sequence[Result]) -> Table | None:
    """Lay our arms out as the paper does; None unless an arm of its ablation is among them."""
    arms = find_arms(results)
    if not arms.keys() - {"CoT", "No-CoT", _MAIN}:
        return None
    header = ["arm", "our entry", "our accuracy [95 %]", "our tokens", "p", *_published_header()]
    reference = arms.get(_MAIN)
    rows = []
    for arm, published in _PUBLISHED.items():
        ours = [NOTHING] * 4
        if arm in arms:
            p = None if reference is None or arm == _MAIN else paired_p(arms[arm], reference)
            ours = [arms[arm].label, format_accuracy(arms[arm]), _format_tokens(arms[arm]), format_p(p)]
        rows.append([arm, *ours, *published])
    return Table(header, rows, num_text_columns=2)


def find_arms(results: Sequence[Result]) -> dict[str, Result]:
    """Map the paper's arms to the entries that stand for them: each the end of its method's curriculum."""
    arms = {}
    for arm in _PUBLISHED:
        # Evaluated or not: an earlier stage in its place would pass for the whole arm.
        result = _find_without_curriculum(results) if arm == _WITHOUT_CURRICULUM else _find_arm(results, arm)
        if result is not None:
            arms[arm] = result
    return arms


def _find_arm(results: Sequence[Result], arm: str) -> Result | None:
    method = next((result.method for result in results if result.kind.paper_arm == arm), None)
    return None if method is None else find_end(results, method, among=results)


def _find_without_curriculum(results: Sequence[Result]) -> Result | None:
    """Find the entry that goes straight to the stage at which the curriculum of the main arm ends."""
    reference = _find_arm(results, _MAIN)
    if reference is None or _num_stages(results, reference) < 2:
        return None
    for result in results:
        if result.method != reference.method or _num_stages(results, result) > 1:
            continue
        if result.latent_stage >= min(reference.latent_stage, reference.max_latent_stage):
            return result
    return None


def _num_stages(results: Sequence[Result], result: Result) -> int:
    # At stage 0 nothing is latent: a warm-up with markers.
    lineage = find_lineage(results, result.name)
    return sum(ancestor.method == result.method and ancestor.latent_stage > 0 for ancestor in lineage)


def _published_header() -> list[str]:
    return [f"paper: {task}" for task in ("GSM8K", "ProntoQA", "ProsQA")]


def _format_tokens(result: Result) -> str:
    generated, thoughts = result.metric("generated_tokens"), result.metric("thoughts")
    if generated is None:
        return NOTHING
    # Pause tokens are inputs, not thoughts: the paper counts 2.2 tokens for its pause arms.
    return format_number(generated + (thoughts or 0) if result.kind.paper_arm == _MAIN else generated, 1)
