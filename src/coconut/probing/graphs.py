"""Questions about graphs: what a thought holds of the search, and what its answer does if that is exchanged.

After j thoughts of a breadth-first search the nodes at exactly j hops from the root are its frontier. Nodes on the way
to the answer are its path; a node may be in several groups.

Legend: N questions, K slots, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from coconut.data.encoding import encode_questions, tokenize_texts
from coconut.data.examples import Example, fold
from coconut.data.generators.graphs import ParsedQuestion, breadth_first, children_of, read_question
from coconut.evaluation.answers import same_answer
from coconut.probing.edits import put
from coconut.probing.rows import Row, mean_row, missing, share_row
from coconut.probing.subject import Subject

KINDS = ("right", "longer_right", "invented_edge", "wrong_target", "dead_end", "other")
"""Of texts that name nodes."""
GROUPS = ("unreachable", "reachable", "frontier", "path")


@dataclass(frozen=True)
class Search:
    """The graph of one question, seen from its root."""

    parsed: ParsedQuestion
    nodes: list[str]
    distance: dict[str, int]
    """Hops from the root, of nodes that can be reached."""
    path: list[str]
    """The nodes of the gold steps, one a hop."""

    def group(self, name: str, hops: int) -> list[str]:
        """Return the nodes of a group after so many hops."""
        if name == "unreachable":
            return [node for node in self.nodes if node not in self.distance]
        if name == "reachable":
            return [node for node in self.nodes if 0 < self.distance.get(node, 0) <= hops]
        if name == "frontier":
            return [node for node in self.nodes if self.distance.get(node) == hops]
        return self.path[hops - 1 : hops]

    def other_root(self) -> str | None:
        """Return a root of the graph that is not asked."""
        children = {child for _, child in self.parsed.edges}
        return next((node for node in self.nodes if node not in children and node != self.parsed.root), None)


def read_search(example: Example) -> Search | None:
    """Read a question about a graph; None for any other."""
    parsed = read_question(example.question)
    if parsed is None or not example.steps:
        return None
    nodes = list(dict.fromkeys(node for edge in parsed.edges for node in edge))
    distance, _ = breadth_first(parsed.root, children_of(parsed.edges, [parsed.root, *nodes]))
    # A step is a node, or a sentence whose last word is one.
    path = [step.rstrip(".").split()[-1] for step in example.steps]
    return Search(parsed, nodes, distance, path)


@dataclass(frozen=True)
class Graphs:
    """The searches of all questions, and the token that stands for each node."""

    searches: Sequence[Search]
    tokens: dict[str, int]
    """The first token of a node as a step writes it."""
    are_whole: bool
    """Whether every node is one token."""

    @classmethod
    def of(cls, subject: Subject) -> "Graphs | None":
        """Read the questions; None unless all are about graphs."""
        searches = [search for example in subject.examples if (search := read_search(example)) is not None]
        if len(searches) < len(subject.examples) or not searches:
            return None
        names = sorted({node for search in searches for node in search.nodes})
        ids = tokenize_texts(subject.evaluator.tokenizer, names)
        return cls(
            searches, {name: row[0] for name, row in zip(names, ids, strict=True)}, all(len(r) == 1 for r in ids)
        )

    def mean_embedding(self, subject: Subject, nodes: Sequence[str]) -> Tensor:
        """Return the mean of the nodes' input embeddings, D."""
        model = subject.evaluator.model
        ids = torch.tensor([self.tokens[node] for node in nodes], device=model.device)
        with torch.no_grad():
            embeds: Tensor = model.get_input_embeddings()(ids).float().cpu().mean(dim=0)
        return embeds


def measure_graphs(subject: Subject, graphs: Graphs | None, probs_NKV: Tensor) -> list[Row]:
    """Measure where thoughts put their mass, and exchange thoughts for nodes and for those of the other root."""
    if graphs is None:
        return [missing(measure, "no graph in these questions") for measure in ("mass", "swapped", "donor")]
    rows = _measure_mass(subject, graphs, probs_NKV)
    return [*rows, *_measure_swaps(subject, graphs), *_measure_donor(subject, graphs)]


def _measure_mass(subject: Subject, graphs: Graphs, probs_NKV: Tensor) -> list[Row]:
    """Add up each group's probability; its share of the nodes is what a thought without a search would give."""
    embed = subject.evaluator.model.get_input_embeddings()
    vectors_NKD, note = subject.trace.vectors_NKD, "" if graphs.are_whole else ", first token of a node"
    rows = []
    for slot in range(probs_NKV.shape[1]):
        for group in GROUPS:
            mass, inner, share = [], [], []
            for number, search in enumerate(graphs.searches):
                nodes = search.group(group, slot + 1)
                if not nodes:
                    continue
                ids = torch.tensor([graphs.tokens[node] for node in nodes])
                mass.append(float(probs_NKV[number, slot, ids].sum()))
                with torch.no_grad():
                    embeds = embed(ids.to(embed.weight.device)).float().cpu()
                inner.append(float((embeds @ vectors_NKD[number, slot]).mean()))
                share.append(len(nodes) / len(search.nodes))
            names: dict[str, Any] = {"thought": slot + 1, "group": group + note}
            rows.append(mean_row(mass, measure="mass", **names))
            rows.append(mean_row(inner, measure="inner", **names))
            rows.append(Row(measure="share_of_nodes", value=fmean(share) if share else None, num=len(share), **names))
    return rows


def _measure_swaps(subject: Subject, graphs: Graphs) -> list[Row]:
    """Put embeddings of nodes into one slot: the frontier's mean, the true node, a wrong one beside it, one outside."""
    rows = []
    for slot in range(subject.num_slots):
        for condition in ("frontier_mean", "true_node", "wrong_child", "outside_node"):
            chosen = [_swap_in(search, condition, slot + 1) for search in graphs.searches]
            places = [number for number, nodes in enumerate(chosen) if nodes]
            names: dict[str, Any] = {"measure": "swapped", "condition": condition, "thought": slot + 1}
            if not places:
                rows.append(Row(**names | {"group": "no such node after so many hops"}))
                continue
            vectors_NKD = subject.trace.vectors_NKD.clone()
            for number in places:
                vectors_NKD[number, slot] = graphs.mean_embedding(subject, chosen[number])
            found = subject.ask(edits=put(vectors_NKD, {slot}))
            rights = [found[number].right for number in places]
            rows.append(share_row(rights, [subject.rights[number] for number in places], **names))
    return rows


def _swap_in(search: Search, condition: str, hops: int) -> list[str]:
    """Return the nodes whose mean embedding is put into a slot; none where there is no such node."""
    frontier, true = search.group("frontier", hops), search.group("path", hops)
    if condition == "frontier_mean":
        return frontier
    if condition == "true_node":
        return true
    if condition == "wrong_child":
        return [node for node in frontier if node not in true][:1]
    return [node for node in search.group("unreachable", hops) if node not in search.parsed.targets][:1]


def _measure_donor(subject: Subject, graphs: Graphs) -> list[Row]:
    """Put in the thoughts of the same graph asked from another root; count whose answer comes out."""
    donors = [
        _ask_from(example.question, search) for example, search in zip(subject.examples, graphs.searches, strict=True)
    ]
    if any(donor is None for donor in donors):
        return [missing("donor", "a graph has one root only, so that no other question has the same graph")]
    questions = [donor for donor in donors if donor is not None]
    ids = encode_questions(subject.evaluator.tokenizer, questions, subject.prompt)
    if any(len(row) != len(own.question_ids) for row, own in zip(ids, subject.encoded, strict=True)):
        return [missing("donor", "the other root takes more tokens")]
    other = Subject(
        subject.evaluator,
        [Example(question) for question in questions],
        [own._replace(question_ids=row) for row, own in zip(ids, subject.encoded, strict=True)],
        subject.indices,
        subject.prompt,
    )
    found = subject.ask(edits=put(other.trace.vectors_NKD, range(subject.num_slots)))
    theirs = [outcome.answer for outcome in other.outcomes]
    own = [outcome.answer for outcome in subject.outcomes]
    apart = [number for number in range(len(own)) if not same_answer(own[number], theirs[number] or "")]
    moved = [fold(found[n].answer or "") == fold(theirs[n] or "") for n in apart]
    kept = [fold(found[n].answer or "") == fold(own[n] or "") for n in apart]
    neither = [not (one or two) for one, two in zip(moved, kept, strict=True)]
    names = (("moved_to_donor", moved), ("kept_own", kept), ("other", neither))
    return [share_row(values, measure="donor", condition=condition) for condition, values in names]


def _ask_from(question: str, search: Search) -> str | None:
    """Return the question about another root of the same graph."""
    other = search.other_root()
    if other is None:
        return None
    mark = next(mark for mark in ("[R] ", " Is ", " reached from ") if mark in question)
    head, _, tail = question.rpartition(mark)
    return f"{head}{mark}{other}{tail.removeprefix(search.parsed.root)}"


def kind_of_text(search: Search, text: str) -> str:
    """Say what a text that names nodes of a graph is: a right path, a longer one, or in what it is wrong.

    Source: Hao et al. 2024 (arXiv:2412.06769), section 5.1, the kinds of reasoning on ProsQA.
    """
    reasoning, _, answer = text.rpartition("###")
    nodes = [line.rstrip(". ").split()[-1] for line in reasoning.split("\n") if line.strip(". ")]
    walk = [search.parsed.root, *nodes]
    if any(edge not in search.parsed.edges for edge in pairwise(walk)):
        return "invented_edge"
    named = answer.strip(" .\n").split()[-1:] or walk[-1:]
    if named == search.path[-1:]:
        return "right" if len(nodes) <= len(search.path) else "longer_right"
    if walk[-1] in search.parsed.targets or named[0] in search.parsed.targets:
        return "wrong_target"
    is_leaf = all(parent != walk[-1] for parent, _ in search.parsed.edges)
    return "dead_end" if is_leaf else "other"
