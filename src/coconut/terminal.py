"""`coconut solve`, `coconut think` and `coconut chat`: ask a trained entry on a terminal."""

import io
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
    from coconut.reasoner import Reasoner
    from coconut.solutions import Solution, Thinking

_WIDTH = 20
"""Characters of a bar that stands for probability 1."""
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEAST = 0.005
"""Tokens less probable than this are not shown."""
_HELP = """\
  /thoughts            what each thought about the last question says
  /replace 1 node 7    the last question again, with the embedding of `7` in place of thought 1; of several words, their
                       mean; of a word of several tokens, the first; the thoughts after it are made anew
  /help                this list
  /quit                the end, as the end of the input is
"""


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
    reasoner = _open(entry)
    trained = reasoner.meta.layout().num_latents
    thoughts = reasoner.think(questions, num_thoughts)
    drawn = reasoner.solve(questions, num_thoughts, num_samples=num_samples, temperature=temperature)
    for thinking, solution in zip(thoughts, drawn, strict=True):
        lines = [visible(thinking.question)]
        if shows_thoughts:
            lines += _show_thoughts(thinking)
            if thinking.solution.num_thoughts < trained:
                lines.append(f"  {thinking.solution.num_thoughts} of {trained} thoughts; the rest in words:")
        lines += [_show_text(solution), *_count_samples(solution)]
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


def chat(entry: str = "") -> int:
    """Answer the questions of the standard input, one a line, until it ends or says `/quit`; 0.

    `/help` lists the commands. What is wrong with a line is one message, and the next line is read.

    Args:
        entry: of the curriculum, or the folder of a checkpoint; the last latent entry if empty.

    Raises:
        ValueError: if there is no such checkpoint, or it is damaged.
    """
    reasoner = _open(entry)
    prompt = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # Gives `input` arrow keys and a history.

        sys.stdout.write(f"{reasoner!r}; a question on each line, /help for the commands\n")
        prompt = "> "
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # Bytes that are no text concern their own line.
    question = ""
    while (line := _read_line(prompt)) is not None and line != "/quit":
        try:
            if not line.startswith("/"):
                answer = [_show_text(one) for one in reasoner.solve([line] if line else [])]
                question = line or question
            else:
                answer = _obey(reasoner, line, question)
        except ValueError as error:
            sys.stderr.write(f"coconut: {visible(str(error))}\n")
        else:
            sys.stdout.write("".join(f"{text}\n" for text in answer))
        sys.stdout.flush()  # A program at the other end of a pipe waits for it.
    return 0


def _open(entry: str) -> "Reasoner":
    folder = find_checkpoint(entry)
    if difference := describe_difference(folder, Path()):
        sys.stderr.write(f"coconut: {difference}\n")
    # Imported here: torch takes seconds, which a wrong argument need not wait for.
    from coconut.reasoner import Reasoner

    return Reasoner.from_pretrained(folder)


def _read_line(prompt: str) -> str | None:
    try:
        return input(prompt).strip()
    except EOFError:
        return None


def _obey(reasoner: "Reasoner", line: str, question: str) -> list[str]:
    """Carry out a command about the last question."""
    command, *words = line.split()
    if command == "/help":
        return _HELP.splitlines()
    if command not in ("/thoughts", "/replace"):
        raise ValueError(f"{command:.40}: no such command; /help lists them")
    if not question:
        raise ValueError(f"{command}: no question was asked yet; it is about the last one")
    if not (num_thoughts := reasoner.meta.layout().num_latents):
        raise ValueError(f"{command}: this model answers without thoughts; ask an entry that has some (--entry)")
    if command == "/thoughts":
        return [line for thinking in reasoner.think([question]) for line in _show_thoughts(thinking)]
    if len(words) < 3 or words[0] not in map(str, range(1, num_thoughts + 1)) or words[1] != "node":
        raise ValueError(f"{line:.80}: wanted a thought from 1 to {num_thoughts} and words, as in /replace 1 node 7")
    replaced, vector_D = int(words[0]) - 1, reasoner.embedding(words[2:])
    solutions = reasoner.solve(
        [question],
        intervene=lambda slot, vectors_BD, _: vector_D.expand_as(vectors_BD) if slot == replaced else vectors_BD,
    )
    return [_show_text(solution) for solution in solutions]


def _show_thoughts(thinking: "Thinking") -> list[str]:
    lines = []
    for number, thought in enumerate(thinking.thoughts, start=1):
        tokens = "  ".join(f"{visible(token):>4} {draw_bar(p)} {p:.2f}" for token, p in thought.tokens if p >= _LEAST)
        lines.append(f"  thought {number}  {tokens}  (entropy {thought.entropy:.2f})")
    return lines


def _show_text(solution: "Solution") -> str:
    text = " / ".join(filter(None, (line.strip() for line in solution.text.split("\n"))))
    return f"  {visible(text) or '(no text)'}"


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
