"""A few questions in full, for people to look at: steps, every thought's tokens, the answer after each thought."""

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from coconut.evaluation.outcomes import Outcome
from coconut.probing.decoding import entropies, top_tokens
from coconut.probing.graphs import Graphs
from coconut.probing.subject import Subject


def choose(rights: Sequence[bool], count: int) -> list[int]:
    """Choose places: wrong answers up to half of them, then right ones, in their order.

    >>> choose([True, True, False, True], 3)
    [0, 1, 2]
    """
    wrong = [place for place, right in enumerate(rights) if not right]
    right = [place for place, is_right in enumerate(rights) if is_right]
    num_wrong = max(count // 2, count - len(right))
    chosen = wrong[:num_wrong]
    return sorted([*chosen, *right[: count - len(chosen)]])


def write_shown(
    subject: Subject,
    probs_NKV: Tensor | None,
    graphs: Graphs | None,
    outcomes: Sequence[Sequence[Outcome]],
    scores: Sequence[Sequence[float]],
    *,
    count: int,
    top: int,
) -> str:
    """Write JSON lines, one a question; `probs_NKV` is None of an entry without thoughts."""
    lines = []
    for place in choose(subject.rights, count):
        example, outcome = subject.examples[place], subject.outcomes[place]
        row: dict[str, Any] = {
            "index": outcome.index,
            "question": example.question,
            "steps": list(example.steps),
            "gold": example.answer,
            "answer": outcome.answer,
            "right": outcome.right,
            "text": outcome.text,
            "thoughts": [] if probs_NKV is None else _thoughts(subject, probs_NKV[place], graphs, place, top),
            "after": [
                {
                    "num_thoughts": number,
                    "answer": found[place].answer,
                    "right": found[place].right,
                    "log_p_gold": round(score[place], 4),
                }
                for number, (found, score) in enumerate(zip(outcomes, scores, strict=True))
            ],
            "graph": None,
        }
        if graphs is not None:
            parsed = graphs.searches[place].parsed
            row["graph"] = {"edges": parsed.edges, "root": parsed.root, "candidates": parsed.targets}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def _thoughts(subject: Subject, probs_KV: Tensor, graphs: Graphs | None, place: int, top: int) -> list[dict[str, Any]]:
    tokenizer, vectors_KD = subject.evaluator.tokenizer, subject.trace.vectors_NKD[place]
    found = []
    for probs_V, vector_D in zip(probs_KV, vectors_KD, strict=True):
        found.append(
            {
                "tokens": [[token, round(p, 4)] for token, p in top_tokens(tokenizer, probs_V, top)],
                "entropy": round(float(entropies(probs_V)), 4),
                "norm": round(float(vector_D.norm()), 4),
                "nodes": None if graphs is None else _nodes(graphs, place, probs_V),
            }
        )
    return found


def _nodes(graphs: Graphs, place: int, probs_V: Tensor) -> dict[str, float]:
    """Return the probability of each node of the graph among the nodes."""
    found = {node: float(probs_V[graphs.tokens[node]]) for node in graphs.searches[place].nodes}
    total = sum(found.values()) or 1.0
    return {node: round(p / total, 4) for node, p in found.items()}
