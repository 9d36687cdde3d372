"""What the output head reads in the thoughts, and their geometry.

A thought is read before it is fed: softmax(W h) of the last layer's state in the column before its slot. Step results
are compared by their first token, which is all of them where a step is one token.

Legend: N questions, K slots, I steps, D hidden, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from coconut.probing.rows import Row, mean_row, missing, share_row
from coconut.probing.subject import Subject

_NO_STEP = -1
_TOP = (1, 5)


def step_tokens(subject: Subject) -> Tensor:
    """Return the first token id of every step, N x I; `_NO_STEP` where a question has fewer steps."""
    num_steps = max((len(row.steps_ids) for row in subject.encoded), default=0)
    firsts = [[ids[0] for ids in row.steps_ids if ids] for row in subject.encoded]
    return torch.tensor([row + [_NO_STEP] * (num_steps - len(row)) for row in firsts], dtype=torch.long)


def own_step(slot: int, c_thought: int | None) -> int | None:
    """Return which step a slot stands for, both counted from 0; None where it stands for none."""
    return None if c_thought is None else slot // max(1, c_thought)


def measure_decoded(subject: Subject, probs_NKV: Tensor, c_thought: int | None) -> list[Row]:
    """Compare the most probable tokens of each thought with the steps, and with the steps of other questions."""
    labels_NI = step_tokens(subject)
    if labels_NI.numel() == 0:
        return [missing("decoded", "the questions have no steps")]
    longest = max(len(ids) for row in subject.encoded for ids in row.steps_ids)
    group = "" if longest <= 2 else "first token of each step"
    rows = []
    for suffix, labels in (("", labels_NI), ("_shuffled", labels_NI.roll(1, dims=0))):
        for top in _TOP:
            top_NKX = probs_NKV.topk(min(top, probs_NKV.shape[-1]), dim=-1).indices
            found_NKI = (top_NKX[:, :, None, :] == labels[:, None, :, None]).any(dim=-1)
            if c_thought is not None:
                rows += _own_rows(found_NKI, labels, c_thought, f"own_top{top}{suffix}", group)
            has_step_NI = labels != _NO_STEP
            anywhere = found_NKI.any(dim=1)[has_step_NI].tolist()
            rows.append(share_row(anywhere, measure="decoded", condition=f"any_top{top}{suffix}", group=group))
    return rows


def _own_rows(found_NKI: Tensor, labels_NI: Tensor, c_thought: int, condition: str, group: str) -> list[Row]:
    rows, together = [], []
    for slot in range(found_NKI.shape[1]):
        step = own_step(slot, c_thought)
        if step is None or step >= labels_NI.shape[1]:
            continue
        found = found_NKI[labels_NI[:, step] != _NO_STEP, slot, step].tolist()
        together += found
        rows.append(share_row(found, measure="decoded", condition=condition, thought=slot + 1, group=group))
    return [*rows, share_row(together, measure="decoded", condition=condition, group=group)]


def measure_geometry(subject: Subject, probs_NKV: Tensor) -> list[Row]:
    """Measure length against the embeddings, likeness of thoughts in a row, rank over questions, and entropy."""
    vectors_NKD = subject.trace.vectors_NKD
    embed = subject.evaluator.model.get_input_embeddings()
    with torch.no_grad():
        table_VD = embed(torch.arange(embed.weight.shape[0], device=embed.weight.device)).float().cpu()
    mean_norm = table_VD.norm(dim=-1).mean()
    entropy_NK = entropies(probs_NKV)
    rows = []
    for slot in range(vectors_NKD.shape[1]):
        thought = slot + 1
        vectors_ND = vectors_NKD[:, slot]
        rows.append(mean_row((vectors_ND.norm(dim=-1) / mean_norm).tolist(), measure="norm_ratio", thought=thought))
        if slot:
            likeness = torch.cosine_similarity(vectors_NKD[:, slot - 1], vectors_ND, dim=-1)
            rows.append(mean_row(likeness.tolist(), measure="cosine", thought=thought))
        rows.append(
            Row(measure="effective_rank", thought=thought, value=effective_rank(vectors_ND), num=len(vectors_ND))
        )
        rows.append(mean_row(entropy_NK[:, slot].tolist(), measure="entropy", thought=thought))
    return rows


def top_tokens(tokenizer: PreTrainedTokenizerBase, probs_V: Tensor, top: int) -> list[tuple[str, float]]:
    """Return the most probable tokens with their probabilities."""
    best = probs_V.topk(min(top, len(probs_V)))
    return [
        (tokenizer.decode([token]), p) for token, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def entropies(probs: Tensor) -> Tensor:
    """Return the entropy of distributions in nats, ... x V -> ..."""
    entropy: Tensor = torch.special.entr(probs).sum(dim=-1)
    return entropy


def effective_rank(vectors_ND: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values of the vectors without their mean.

    1 for vectors on a line, min(N, D) for vectors that fill all directions alike; 0 if all are the same.

    Source: Roy and Vetterli 2007, the effective rank.
    """
    values = torch.linalg.svdvals(vectors_ND - vectors_ND.mean(dim=0))
    if float(values.max()) <= 1e-6 * float(vectors_ND.norm() + 1e-30):
        return 0.0
    return float(entropies(values / values.sum()).exp())
