"""Outputs of a whole pipeline as a handful of literal files, without training anything."""

import json
from pathlib import Path
from typing import Any

import yaml

from coconut.config.params import parse_params
from coconut.config.schema import Params
from coconut.evaluation.statistics import wilson_interval

HISTORY_HEAD = (
    "entry,epoch,update,train_loss,grad_norm,lr,valid_loss,valid_accuracy,first_update_loss,first_update_accuracy,"
    "num_latents,tokens,padding_share,tokens_per_s,ms_per_update,seconds,cpu_seconds,load"
)

CURRICULUM = {
    "cot": {"parent": "base", "method": "cot", "latent_stage": 0, "epochs": 2, "lr": 0.002},
    "latent_1": {"parent": "cot", "method": "coconut", "latent_stage": 1, "epochs": 2, "lr": 0.002},
    "latent_2": {"parent": "latent_1", "method": "coconut", "latent_stage": 2, "epochs": 2, "lr": 0.002},
    "no_cot": {"parent": "base", "method": "no_cot", "latent_stage": 0, "epochs": 2, "lr": 0.002},
}


def default_tree(**changes: Any) -> dict[str, Any]:
    """The shipped params.yaml as plain mappings, with a short curriculum and top-level changes."""
    tree = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8"))
    return {**tree, "curriculum": CURRICULUM, **changes}


def fake_params(**changes: Any) -> Params:
    """`default_tree` as Params."""
    params: Params = parse_params(default_tree(**changes))
    return params


def write_entry(
    outputs_dir: Path, name: str, *, right: str, method: str = "coconut", thoughts: int = 0, cpu_share: float = 1.0
) -> None:
    """Write the files of an entry; `right` is one character a test example, `+` for right ones.

    Args:
        cpu_share: CPU seconds per second of the clock.
    """
    entry_dir = outputs_dir / name
    entry_dir.mkdir(parents=True)
    low, high = wilson_interval(right.count("+"), len(right))
    metrics = {
        "accuracy": right.count("+") / len(right),
        "accuracy_low": low,
        "accuracy_high": high,
        "num_examples": len(right),
        "loss": 0.25,
        "generated_tokens": 3.0,
        "thoughts": float(thoughts),
        "truncated_share": 0.0,
        "no_answer_share": right.count("-") / len(right),
        "cot_match": 0.5 if method == "cot" else None,
        "valid_accuracy": 0.5,
        "valid_loss": 0.25,
        "seconds_per_example": 0.0125,
        "train_seconds": 20.0 + 10 * thoughts,
        "train_updates": 8,
        "peak_memory_mb": 500.0,
        "train_oom_retries": 0,
        "eval_oom_retries": 0,
    }
    (entry_dir / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    predictions = [
        {
            "index": index,
            "num_steps": 2 + index % 2,
            "gold": str(index % 11),
            "answer": str(index % 11) if mark == "+" else None,
            "right": mark == "+",
            "truncated": False,
            "num_generated_tokens": 3,
            "text": f"### {index % 11}" if mark == "+" else "<script>alert('&')</script> | no answer",
        }
        for index, mark in enumerate(right)
    ]
    lines = "".join(json.dumps(prediction) + "\n" for prediction in predictions)
    (entry_dir / "predictions.jsonl").write_text(lines, encoding="utf-8")
    rate, ms = 10000 / (1 + thoughts), 50.0 * (1 + thoughts)
    rows = [
        f"{name},1,4,2.0,1.0,0.002,2.1,0.25,2.3,0.1,{thoughts},4000,0.125,{rate},{ms},1.5,{cpu_share * 1.5},0.5",
        f"{name},2,8,1.0,1.0,0.002,1.1,0.50,,,{thoughts},4000,0.125,{rate},{ms},3.0,{cpu_share * 3.0},0.5",
    ]
    (entry_dir / "history.csv").write_text("\n".join([HISTORY_HEAD, *rows]) + "\n", encoding="utf-8")
    updates = "".join(f"{number},{3 - number / 4},0.00{number},1.5\n" for number in range(1, 9))
    (entry_dir / "updates.csv").write_text(f"update,loss,lr,grad_norm\n{updates}", encoding="utf-8")
    facts = {"train_load": 0.5, "passes": "fast", "versions": {"torch": "9.9.9"}}
    (entry_dir / "train.json").write_text(json.dumps(facts), encoding="utf-8")


def write_thoughts(outputs_dir: Path, name: str, *, questions: list[dict[str, Any]], rows: list[str]) -> None:
    """Write the files that the probes of an entry leave; `rows` are lines of `thoughts.csv`."""
    head = "measure,condition,thought,layer,group,value,low,high,p,num"
    (outputs_dir / name / "thoughts.csv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (outputs_dir / name / "thoughts.jsonl").write_text(lines, encoding="utf-8")


def fake_question(index: int, *, right: bool, **changes: Any) -> dict[str, Any]:
    """Return a question about a graph with two thoughts, as the probes write it."""
    nodes = {"13": 0.0, "4": 0.6, "9": 0.4, "2": 0.0, "10": 0.0, "1": 0.0}
    question = {
        "index": index,
        "question": "13>4 13>9 4>2 9>10 [Q] 10 1 [R] 13",
        "steps": ["9", "10"],
        "gold": "10",
        "answer": "10" if right else "1",
        "right": right,
        "text": "### 10" if right else "### 1",
        "thoughts": [
            {"tokens": [["4", 0.6], [" 9", 0.4]], "entropy": 0.67, "norm": 1.0, "nodes": nodes},
            {"tokens": [["10", 0.9], ["2", 0.1]], "entropy": 0.33, "norm": 1.1, "nodes": nodes | {"10": 0.9}},
        ],
        "after": [
            {"num_thoughts": number, "answer": "1", "right": False, "log_p_gold": -2.5 + number} for number in range(3)
        ],
        "graph": {
            "edges": [["13", "4"], ["13", "9"], ["4", "2"], ["9", "10"]],
            "root": "13",
            "candidates": ["10", "1"],
        },
    }
    return question | changes


THOUGHT_ROWS = [
    "accuracy_with,0,0,,answer,0.5,0.45,0.55,0.001,100",
    "accuracy_with,1,1,,answer,0.75,0.7,0.8,0.001,100",
    "accuracy_with,2,2,,answer,1,0.97,1,,100",
    "accuracy_with,1,1,,words,0.6,0.5,0.7,0.001,100",
    "accuracy_after,,0,,,0.5,0.45,0.55,0.001,100",
    "accuracy_after,,2,,,1,0.97,1,,100",
    "replaced,zero,,,all,0.48,0.44,0.52,0.001,100",
    "replaced_changed,zero,,,all,0.52,0.48,0.56,,100",
    "replaced,other_question,,,all,0.1,0.08,0.13,0.001,100",
    "replaced_changed,other_question,,,all,0.9,0.87,0.92,,100",
    "decoded,own_top1,1,,,0.5,0.4,0.6,,100",
    "decoded,own_top1_shuffled,1,,,0.06,0.02,0.1,,100",
    "mass,,1,,frontier,0.995,0.99,1,,100",
    "share_of_nodes,,1,,frontier,0.14,,,,100",
    "swapped,frontier_mean,1,,,0.99,0.97,1,0.5,100",
    "swapped,outside_node,1,,,0.26,0.22,0.3,0.001,100",
    "probe,own_step,1,2,,0.65,0.6,0.7,,50",
    "probe,permuted_labels,1,2,,0.08,0.05,0.1,,50",
    "entropy,,1,,,0.67,0.6,0.7,,100",
    "norm_ratio,,1,,,1.02,1,1.04,,100",
    "donor,,,,a graph has one root only,,,,,0",
]


def write_outputs(outputs_dir: Path) -> None:
    """Write the outputs of `CURRICULUM`, every stage having run."""
    write_entry(outputs_dir, "cot", method="cot", right="+++++++-+-")
    write_entry(outputs_dir, "latent_1", right="+-+-+-+-+-", thoughts=1)
    write_entry(outputs_dir, "latent_2", right="+++++++++-", thoughts=2)
    write_entry(outputs_dir, "no_cot", method="no_cot", right="----------")
    facts = {"train": {"kept": 20, "dropped": {"duplicate": 1}}, "seconds": 0.51234}
    (outputs_dir / "preprocess.json").write_text(json.dumps(facts), encoding="utf-8")
