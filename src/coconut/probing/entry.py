"""One entry's checkpoint to `thoughts.json`, `thoughts.csv` and `thoughts.jsonl`."""

import json
from collections.abc import Sequence
from typing import Any

from loguru import logger

from coconut.checkpoints.meta import META_FILE, read_meta
from coconut.config.extensions import load_modules
from coconut.config.messages import first_line
from coconut.config.methods import build_method
from coconut.config.schema import BASE, Params
from coconut.data.encoded import load_encoded
from coconut.data.examples import read_examples
from coconut.devices import is_out_of_memory
from coconut.evaluation.entry import check_entry, open_evaluator
from coconut.evaluation.outputs import write_receipt
from coconut.files import replace_file, writing
from coconut.layout import ENCODED_DIR, EXAMPLES_DIR, OUTPUTS_DIR, PROBES_DIR, checkpoint_dir
from coconut.probing.attention import measure_attention
from coconut.probing.conclusion import conclude
from coconut.probing.decoding import measure_decoded, measure_geometry
from coconut.probing.graphs import Graphs, measure_graphs
from coconut.probing.linear import measure_probes
from coconut.probing.replacing import measure_replaced
from coconut.probing.rows import Row, find_row, missing, value_of, write_rows
from coconut.probing.shown import write_shown
from coconut.probing.stopping import measure_numbers
from coconut.probing.subject import Subject

FILES = ("thoughts.json", "thoughts.csv", "thoughts.jsonl")
NO_THOUGHTS = "the entry has no slots"
_NEEDS_SLOTS = ("decoded", "replaced", "probe", "mass", "swapped", "donor", "attention", "norm_ratio")


def probe_entry(params: Params, name: str) -> None:
    """Look into the thoughts of `outputs/<name>/checkpoint` on test questions, and write what was found.

    Raises:
        ValueError: if there is no such entry, its checkpoint is missing or damaged, or the model fails.
        OSError: if the outputs cannot be written.
    """
    check_entry(params, name)
    rows: list[Row] = []
    shown, summary = "", dict.fromkeys(SUMMARY)
    if params.probe.enabled:
        subject, c_thought = _open_subject(params, name)
        rows, shown = probe(subject, c_thought, count=params.probe.shown, top=params.probe.top)
        summary = summarise(rows, subject)
        logger.info("{}: {}", name, conclude(rows) or "no thoughts to look into")
    output_dir = OUTPUTS_DIR / name
    with writing(output_dir):
        replace_file(output_dir / "thoughts.csv", write_rows(rows))
        replace_file(output_dir / "thoughts.jsonl", shown)
        replace_file(output_dir / "thoughts.json", json.dumps(summary, indent=2) + "\n")
        write_receipt(PROBES_DIR, name, FILES)


def _open_subject(params: Params, name: str) -> tuple[Subject, int | None]:
    evaluator = open_evaluator(params, name)
    examples = read_examples(EXAMPLES_DIR / "test.jsonl")
    encoded = load_encoded(ENCODED_DIR, "test", params.probe.questions)
    indices: Sequence[int] = encoded[range(len(encoded))]["index"]
    asked = [examples[index] for index in indices]
    subject = Subject(evaluator, asked, list(encoded.examples()), indices, params.encode.prompt)
    entry = params.curriculum.get(name)
    if entry is not None:
        return subject, build_method(entry).thoughts_per_step()
    folder = checkpoint_dir(BASE)
    return subject, (read_meta(folder) if (folder / META_FILE).is_file() else params.latent).c_thought


def probe(subject: Subject, c_thought: int | None, *, count: int, top: int) -> tuple[list[Row], str]:
    """Take every measurement that the entry's slots and questions allow.

    Args:
        c_thought: slots that stand for one step; None where none stands for a step.

    Returns:
        (rows, shown): of `thoughts.csv`, and the text of `thoughts.jsonl`.
    """
    if not subject.examples:
        return [missing("accuracy_with", "there is no question")], ""
    graphs = Graphs.of(subject)
    rows, outcomes, scores = measure_numbers(subject, graphs)
    if not subject.num_slots:
        rows += [missing(measure, NO_THOUGHTS) for measure in _NEEDS_SLOTS]
        return rows, write_shown(subject, None, graphs, outcomes, scores, count=count, top=top)
    probs_NKV = subject.decoded(subject.trace.states_NJD[:, :-1])
    rows += measure_decoded(subject, probs_NKV, c_thought)
    rows += measure_replaced(subject)
    rows += measure_probes(subject, c_thought)
    rows += measure_graphs(subject, graphs, probs_NKV)
    rows += measure_attention(subject, graphs)
    rows += measure_geometry(subject, probs_NKV)
    rows += _measure_added(subject)
    return rows, write_shown(subject, probs_NKV, graphs, outcomes, scores, count=count, top=top)


def _measure_added(subject: Subject) -> list[Row]:
    """Take the measurements of the files in `coconut/probing/added`."""
    modules, failed = load_modules("coconut.probing.added")
    if failed:
        logger.warning("{}", failed.removeprefix("; "))
    rows: list[Row] = []
    for module in modules:
        try:
            rows += module.measure(subject)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"{module.__name__}: cannot measure: {type(error).__name__}: {first_line(error)}"
            ) from error
    return rows


SUMMARY = (
    *("num_questions", "num_thoughts", "accuracy", "accuracy_without_thoughts", "log_p_gain"),
    *("accuracy_zero", "accuracy_mean", "accuracy_noise", "accuracy_other_question", "accuracy_reordered"),
    *("changed_other_question", "p_other_question", "own_top1", "own_top1_shuffled", "any_top5", "any_top5_shuffled"),
    *("probe_own_step", "probe_permuted_labels", "frontier_mass_1", "frontier_mass_2", "share_of_nodes_1"),
    *("swapped_frontier_mean_1", "swapped_outside_node_1", "moved_to_donor", "entropy", "norm_ratio"),
)
"""Keys of `thoughts.json`, the same for every entry; null where a measure could not be taken."""


def summarise(rows: Sequence[Row], subject: Subject) -> dict[str, Any]:
    """Choose the numbers that stand beside each other in `dvc metrics show`."""
    last = subject.num_slots
    every: dict[str, Any] = {"condition": "other_question", "group": "all"}
    without = value_of(rows, "log_p_after", thought=0)
    with_all = value_of(rows, "log_p_after", thought=last)
    found: dict[str, Any] = {
        "num_questions": len(subject.examples),
        "num_thoughts": last,
        "accuracy": value_of(rows, "accuracy_with", thought=last, group="answer"),
        "accuracy_without_thoughts": value_of(rows, "accuracy_with", thought=0, group="answer"),
        "log_p_gain": None if without is None or with_all is None or not last else with_all - without,
        "changed_other_question": value_of(rows, "replaced_changed", **every),
        "p_other_question": getattr(find_row(rows, "replaced", **every), "p", None),
        "probe_own_step": _best(rows, "own_step"),
        "probe_permuted_labels": _best(rows, "permuted_labels"),
        "frontier_mass_1": value_of(rows, "mass", thought=1, group="frontier"),
        "frontier_mass_2": value_of(rows, "mass", thought=2, group="frontier"),
        "share_of_nodes_1": value_of(rows, "share_of_nodes", thought=1, group="frontier"),
        "swapped_frontier_mean_1": value_of(rows, "swapped", condition="frontier_mean", thought=1),
        "swapped_outside_node_1": value_of(rows, "swapped", condition="outside_node", thought=1),
        "moved_to_donor": value_of(rows, "donor", condition="moved_to_donor"),
        "entropy": value_of(rows, "entropy", thought=last),
        "norm_ratio": value_of(rows, "norm_ratio", thought=last),
    }
    for condition in ("zero", "mean", "noise", "other_question", "reordered"):
        found[f"accuracy_{condition}"] = value_of(rows, "replaced", condition=condition, group="all")
    for condition in ("own_top1", "own_top1_shuffled", "any_top5", "any_top5_shuffled"):
        found[condition] = value_of(rows, "decoded", condition=condition, thought=None)
    return {key: None if found[key] is None else round(float(found[key]), 6) for key in SUMMARY}


def _best(rows: Sequence[Row], condition: str) -> float | None:
    """Return the accuracy of the best layer, as a mean over the thoughts."""
    layers: dict[int, list[float]] = {}
    for row in rows:
        if row.measure == "probe" and row.condition == condition and row.value is not None and row.layer is not None:
            layers.setdefault(row.layer, []).append(row.value)
    return max((sum(values) / len(values) for values in layers.values()), default=None)
