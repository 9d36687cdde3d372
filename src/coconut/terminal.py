"""`coconut solve` and `coconut think`: ask a trained entry on a terminal."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coconut.config.methods import find_method
from coconut.config.params import load_params
from coconut.config.schema import Params
from coconut.layout import checkpoint_dir
from coconut.pipeline.record import describe_difference
from coconut.report.text import visible

if TYPE_CHECKING:
    from coconut.solutions import Solution

_WIDTH = 20
"""Characters of a bar that stands for probability 1."""
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEAST = 0.005
"""Tokens less probable than this are not shown."""


def run(
    questions: Sequence[str],
    *,
    entry: str = "",
    num_thoughts: int | None = None,
    shows_thoughts: bool,
    num_samples: int = 0,
    temperature: float = 0.7,
) -> int:
    """Print the answers to questions, and what was thought on the way; 0.

    Args:
        entry: of the curriculum, or the folder of a checkpoint; the last latent entry if empty.
        num_thoughts: before the answer; as many as in training if None.
        num_samples: answers that are drawn beside the most probable one.
        temperature: of the samples' tokens.

    Raises:
        ValueError: if there is no such checkpoint, or a question does not fit.
    """
    folder = find_checkpoint(entry)
    if difference := describe_difference(folder, Path()):
        sys.stderr.write(f"coconut: {difference}\n")
    from coconut.reasoner import (
        Reasoner,
    )  # Imported here: torch takes seconds, which a wrong argument need not wait for.

    reasoner = Reasoner.from_pretrained(folder)
    trained = reasoner.meta.layout().num_latents
    thoughts = reasoner.think(questions, num_thoughts)
    drawn = reasoner.solve(questions, num_thoughts, num_samples=num_samples, temperature=temperature)
    for thinking, solution in zip(thoughts, drawn, strict=True):
        lines = [visible(thinking.question)]
        if shows_thoughts:
            for number, thought in enumerate(thinking.thoughts, start=1):
                tokens = "  ".join(
                    f"{visible(token):>4} {draw_bar(p)} {p:.2f}" for token, p in thought.tokens if p >= _LEAST
                )
                lines.append(f"  thought {number}  {tokens}  (entropy {thought.entropy:.2f})")
            if thinking.solution.num_thoughts < trained:
                lines.append(f"  {thinking.solution.num_thoughts} of {trained} thoughts; the rest in words:")
        text = " / ".join(filter(None, (line.strip() for line in thinking.solution.text.split("\n"))))
        lines.append(f"  {visible(text)}")
        lines += _count_samples(solution)
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _count_samples(solution: "Solution") -> list[str]:
    """Say how often each answer was drawn, the most frequent first."""
    counts = Counter(sample.answer for sample in solution.samples)
    return [
        f"  {draw_bar(count / len(solution.samples))} {count:3} {'no answer' if answer is None else visible(answer)}"
        for answer, count in counts.most_common()
    ]


def draw_bar(p: float) -> str:
    """Draw a probability as a bar of eighths of characters.

    >>> draw_bar(0.5).strip(), len(draw_bar(0.5)), draw_bar(0.0).strip()
    ('██████████', 20, '')
    """
    eighths = round(p * _WIDTH * 8)
    bar = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    return f"{bar:<{_WIDTH}}"


def find_checkpoint(entry: str) -> Path:
    """Return the folder that a name leads to: an entry's checkpoint, or the folder itself.

    Raises:
        ValueError: if the curriculum has no latent entry to take where the name is empty.
    """
    if entry and Path(entry).is_dir():
        return Path(entry)
    params = load_params()
    name = entry or _last_latent(params)
    if name not in params.curriculum and name != "base":
        raise ValueError(
            f"{name!r:.80}: found neither an entry of the curriculum nor a folder, wanted one of"
            f" {', '.join(params.curriculum)}, or the folder of a checkpoint"
        )
    return checkpoint_dir(name)


def _last_latent(params: Params) -> str:
    """Return the entry that the report is about, or else a trained one of most latent stages."""
    latent = [entry for entry in params.curriculum.values() if find_method(entry.method).role == "main"]
    trained = [entry for entry in latent if (checkpoint_dir(entry.name) / "config.json").is_file()]
    if not trained:
        raise ValueError(
            "params.yaml: found no latent entry that is trained, wanted one to ask; run `dvc repro`, or name an entry"
            " with --entry"
        )
    chosen = [entry for entry in trained if entry.name == params.report.reference]
    trained = chosen or trained
    return max(trained, key=lambda entry: entry.latent_stage).name
