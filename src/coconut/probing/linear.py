"""Linear probes: can a step's result be read off a layer's state, and of which thought?

A ridge regression onto one-hot results is fitted on half of the questions and tested on the other half. Selectivity is
the accuracy for a thought's own step minus the mean for the other steps; permuted labels show what chance and the
probe's own capacity give.

Source: Hewitt and Liang 2019 (arXiv:1909.03368), probes with control tasks.

Legend: N questions, K slots, I steps, L layers, D hidden, C classes.
"""

from typing import Any

import torch
from torch import Tensor

from coconut.probing.decoding import own_step, step_tokens
from coconut.probing.rows import Row, missing, share_row
from coconut.probing.subject import Subject

_MIN_QUESTIONS = 40
_RIDGE = 1e-2
"""Weight of the penalty, relative to the mean square of the features."""


def measure_probes(subject: Subject, c_thought: int | None) -> list[Row]:
    """Fit a probe for every layer, thought and step."""
    labels_NI = step_tokens(subject)
    if c_thought is None:
        return [missing("probe", "no thought stands for a step")]
    if len(labels_NI) < _MIN_QUESTIONS or labels_NI.numel() == 0:
        reason = "the questions have no steps" if not labels_NI.numel() else f"fewer than {_MIN_QUESTIONS} questions"
        return [missing("probe", reason)]
    generator = torch.Generator().manual_seed(0)
    permuted_NI = labels_NI[torch.randperm(len(labels_NI), generator=generator)]
    rows = []
    for layer, states_NKD in enumerate(subject.layer_states()):
        for slot in range(states_NKD.shape[1]):
            rows += _probe_thought(states_NKD[:, slot], labels_NI, permuted_NI, own_step(slot, c_thought), layer, slot)
    return rows


def _probe_thought(
    states_ND: Tensor, labels_NI: Tensor, permuted_NI: Tensor, own: int | None, layer: int, slot: int
) -> list[Row]:
    if own is None or own >= labels_NI.shape[1]:
        return []
    names: dict[str, Any] = {"measure": "probe", "layer": layer, "thought": slot + 1}
    rights = [fit_probe(states_ND, labels_NI[:, step]) for step in range(labels_NI.shape[1])]
    others = [right for step, one in enumerate(rights) if step != own for right in one]
    row = share_row(rights[own], condition="own_step", **names)
    rows = [row]
    if others:
        other = share_row(others, condition="other_steps", **names)
        rows += [other, Row(condition="selectivity", value=(row.value or 0) - (other.value or 0), num=row.num, **names)]
    return [*rows, share_row(fit_probe(states_ND, permuted_NI[:, own]), condition="permuted_labels", **names)]


def fit_probe(states_ND: Tensor, labels_N: Tensor) -> list[bool]:
    """Fit on the even questions that have this step; return which of the odd ones are right."""
    has_step = labels_N >= 0
    states_ND, labels_N = states_ND[has_step].double(), labels_N[has_step]
    classes_C, targets_N = labels_N.unique(return_inverse=True)
    features_ND = torch.cat([states_ND, torch.ones(len(states_ND), 1, dtype=torch.float64)], dim=1)
    train_ND, test_ND = features_ND[::2], features_ND[1::2]
    onehot_NC = torch.nn.functional.one_hot(targets_N[::2], len(classes_C)).double()
    gram_DD = train_ND.T @ train_ND
    penalty = _RIDGE * gram_DD.diagonal().mean()
    weights_DC = torch.linalg.solve(
        gram_DD + penalty * torch.eye(len(gram_DD), dtype=torch.float64), train_ND.T @ onehot_NC
    )
    right: list[bool] = ((test_ND @ weights_DC).argmax(dim=-1) == targets_N[1::2]).tolist()
    return right
