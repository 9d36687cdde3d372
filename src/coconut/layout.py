"""Where the pipeline keeps its files, relative to the repository's top folder."""

from pathlib import Path

EXAMPLES_DIR = Path("data/examples")
ENCODED_DIR = Path("data/encoded")
OUTPUTS_DIR = Path("outputs")
CODE_DIR = OUTPUTS_DIR / "code"
"""One file per stage script: digests of what its code does."""
LOG_DIR = OUTPUTS_DIR / "logs"
RECEIPTS_DIR = OUTPUTS_DIR / "evaluations"
"""One small file per evaluated entry: digests of what the report reads."""
PROBES_DIR = OUTPUTS_DIR / "probes"
"""One small file per probed entry: digests of what the report reads."""
REPORT_DIR = OUTPUTS_DIR / "report"
UPDATE_COLUMNS = ("update", "loss", "lr", "grad_norm")
"""Of `updates.csv`; the parts of a loss that has several follow them."""
SPLITS = ("train", "valid", "test")
"""Every run has these; `test` is the first test set."""
FURTHER_TESTS = "tests"
"""Folder of the files of every test set but the first, below those of the splits."""


def find_test_sets(examples_dir: Path = EXAMPLES_DIR) -> dict[str, str]:
    """Return the names of the test sets by the names of their files, the first set's as `test`.

    Further sets are in alphabetical order.
    """
    further = sorted(path.stem for path in (examples_dir / FURTHER_TESTS).glob("*.jsonl"))
    return {"test": "test"} | {f"{FURTHER_TESTS}/{name}": name for name in further}


def checkpoint_dir(entry_name: str) -> Path:
    """The checkpoint of a curriculum entry, or of `base`."""
    return OUTPUTS_DIR / entry_name / "checkpoint"


def optimizer_file(entry_name: str) -> Path:
    """The optimizer state that an entry leaves to its children; without tensors where it keeps none, as `base`."""
    return OUTPUTS_DIR / entry_name / "optimizer.safetensors"
