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
SPLITS = ("train", "valid", "test")


def checkpoint_dir(entry_name: str) -> Path:
    """The checkpoint of a curriculum entry, or of `base`."""
    return OUTPUTS_DIR / entry_name / "checkpoint"


def optimizer_file(entry_name: str) -> Path:
    """The moments that an entry leaves to its children; without tensors where it keeps none, as `base`."""
    return OUTPUTS_DIR / entry_name / "optimizer.safetensors"
