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


def write_outputs(outputs_dir: Path) -> None:
    """Write the outputs of `CURRICULUM`, every stage having run."""
    write_entry(outputs_dir, "cot", method="cot", right="+++++++-+-")
    write_entry(outputs_dir, "latent_1", right="+-+-+-+-+-", thoughts=1)
    write_entry(outputs_dir, "latent_2", right="+++++++++-", thoughts=2)
    write_entry(outputs_dir, "no_cot", method="no_cot", right="----------")
    facts = {"train": {"kept": 20, "dropped": {"duplicate": 1}}, "seconds": 0.51234}
    (outputs_dir / "preprocess.json").write_text(json.dumps(facts), encoding="utf-8")
