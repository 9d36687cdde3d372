"""Where the last layer looks in the question when a thought is formed: the edges of the graph, in groups.

An edge belongs to the groups of the node that it leads to: those of a breadth-first search after as many hops as the
thought stands for. What counts is each group's share of the attention that all edges get, beside its share of the
edges, which is what a thought that looks at all of them alike would give.

Legend: N questions, K slots, B rows, H heads, T columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coconut.data.encoding import question_offsets
from coconut.data.generators.graphs import edge_spans
from coconut.probing.graphs import GROUPS, Graphs, Search
from coconut.probing.rows import Row, mean_row, missing
from coconut.probing.subject import Subject


def measure_attention(subject: Subject, graphs: Graphs | None) -> list[Row]:
    """Measure the attention to edges for every thought, as the mean over the heads of the last layer."""
    if graphs is None:
        return [missing("attention", "no graph in these questions")]
    columns = _edge_columns(subject)
    if columns is None:
        return [missing("attention", "the tokenizer does not say where its tokens stand in the question")]
    looks = _attention(subject)
    if looks is None:
        return [missing("attention", "the model does not return what it attends to")]
    rows = []
    for slot in range(subject.num_slots):
        to_edges = [
            torch.stack([look[slot, ids].sum() for ids in edges]) for look, edges in zip(looks, columns, strict=True)
        ]
        rows.append(mean_row([float(one.sum()) for one in to_edges], measure="attention_to_edges", thought=slot + 1))
        for group in GROUPS:
            found, share = [], []
            for search, one in zip(graphs.searches, to_edges, strict=True):
                is_in = _is_in_group(search, group, slot + 1)
                if any(is_in):
                    found.append(float(one[torch.tensor(is_in)].sum() / one.sum().clamp(min=1e-30)))
                    share.append(sum(is_in) / len(is_in))
            names: dict[str, Any] = {"thought": slot + 1, "group": group}
            rows.append(mean_row(found, measure="attention", **names))
            rows.append(Row(measure="share_of_edges", value=fmean(share) if share else None, num=len(share), **names))
    return rows


def _is_in_group(search: Search, group: str, hops: int) -> list[bool]:
    nodes = set(search.group(group, hops))
    return [child in nodes for _, child in search.parsed.edges]


def _edge_columns(subject: Subject) -> list[list[list[int]]] | None:
    """Return for each question and edge the numbers of its tokens among the question's."""
    questions = [example.question for example in subject.examples]
    offsets = question_offsets(subject.evaluator.tokenizer, questions, subject.prompt)
    if offsets is None:
        return None
    found = []
    for question, own, encoded in zip(questions, offsets, subject.encoded, strict=True):
        if len(own) != len(encoded.question_ids):
            return None
        spans = edge_spans(question)
        edges = [[n for n, (start, end) in enumerate(own) if start < stop and end > begin] for begin, stop in spans]
        if not all(edges):
            return None
        found.append(edges)
    return found


@torch.no_grad()
def _attention(subject: Subject) -> list[Tensor] | None:
    """Return for each question what the columns before its slots attend to, K x tokens of the question, on the CPU."""
    model, found = subject.evaluator.model, []
    with _eager(model) as is_eager:
        if not is_eager:
            return None
        for places, batch, embeds_BTD, moments in subject.filled():
            output = model.base_model(
                inputs_embeds=embeds_BTD,
                attention_mask=batch.attention_mask_BT,
                position_ids=batch.position_ids_BT,
                output_attentions=True,
                use_cache=False,
            )
            if not output.attentions or output.attentions[-1] is None:
                return None
            looks_BTT = output.attentions[-1].float().mean(dim=1).cpu()
            for row, place in enumerate(places):
                num_tokens = len(subject.encoded[place].question_ids)
                left = int(batch.attention_mask_BT[row].argmax())
                found.append(looks_BTT[row, moments[:-1], left : left + num_tokens])
    return found


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[bool]:
    """Let the model compute attention in the way that returns it; say whether it can."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
    except (ValueError, ImportError, AttributeError, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        model.set_attn_implementation(before)
