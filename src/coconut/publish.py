"""`coconut push`: an entry's checkpoint to a model hub, with a card that holds its results."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coconut.config.messages import shown, suggest
from coconut.config.params import load_params
from coconut.config.schema import BASE, Params
from coconut.files import amount, files_below
from coconut.layout import OUTPUTS_DIR, checkpoint_dir
from coconut.pipeline.record import describe_difference
from coconut.report.provenance import judge
from coconut.report.reading import read_folder
from coconut.report.results import read_results
from coconut.report.text import visible

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_SHOWN = {
    "accuracy": "accuracy on the test split, with its 95 % Wilson interval",
    "num_examples": "test examples",
    "loss": "loss, nats per token",
    "generated_tokens": "generated tokens an answer",
    "thoughts": "thoughts an answer",
}


def push(entry: str, hub_id: str, *, dry_run: bool = False, private: bool = False) -> int:
    """Upload `outputs/<entry>/checkpoint` in one commit, or print what would be uploaded; 0.

    The optimizer's state and the resume states are not in that folder and stay here.

    Raises:
        ValueError: if there is no such entry or checkpoint, or `hub_id` is none.
        OSError: if the hub cannot be reached or refuses.
    """
    params = load_params()
    _check(params, entry, hub_id)
    if difference := describe_difference(checkpoint_dir(entry), Path()):
        sys.stderr.write(f"coconut push: {difference}\n")
    files = collect(params, entry)
    total = sum(map(len, files.values()))
    lines = [f"{amount(len(content)):>10}  {visible(name)}" for name, content in files.items()]
    sys.stdout.write("\n".join([*lines, f"{amount(total):>10}  in {len(files)} files for {hub_id}", ""]))
    if dry_run:
        sys.stdout.write(f"\n{files['README.md'].decode()}\nNothing was uploaded (--dry-run).\n")
        return 0
    from huggingface_hub import HfApi  # Imported here: a dry run needs no hub.

    upload(HfApi(), hub_id, files, message=f"Checkpoint {entry}", private=private)
    return 0


def collect(params: Params, entry: str) -> dict[str, bytes]:
    """Return every file to upload, by name: the checkpoint's, with a card that holds the entry's results."""
    # Imported here: transformers takes seconds, which a wrong argument need not wait for.
    from coconut.checkpoints.card import CARD_FILE, describe_entry, write_card
    from coconut.checkpoints.meta import read_meta
    from coconut.data.tokenizer import load_tokenizer

    folder, settings = checkpoint_dir(entry), params.curriculum[entry]
    lineage, ancestor = [entry], settings.parent
    while ancestor != BASE:
        lineage.insert(0, ancestor)
        ancestor = params.curriculum[ancestor].parent
    training = describe_entry(settings) | {"curriculum": " > ".join([BASE, *lineage]), "seed": params.seed}
    card = write_card(
        entry,
        read_meta(folder),
        load_tokenizer(folder),
        training=training,
        results=_results(params, entry),
        base_model=params.model if _HUB_ID.fullmatch(params.model) and not Path(params.model).exists() else "",
    )
    return {name: (folder / name).read_bytes() for name in files_below(folder)} | {CARD_FILE: card.encode()}


def upload(api: "HfApi", hub_id: str, files: Mapping[str, bytes], *, message: str, private: bool) -> None:
    """Make the repository if it is not there, and commit the files.

    Raises:
        OSError: if the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(hub_id, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(hub_id, operations, commit_message=message)
    except HfHubHTTPError as error:
        raise OSError(
            f"{hub_id}: the hub refused ({' '.join(str(error).split())[:300]}); `hf auth login` gives the right"
        ) from None
    sys.stdout.write(f"{visible(str(commit.commit_url))}\n")


def _check(params: Params, entry: str, hub_id: str) -> None:
    if entry not in params.curriculum:
        raise ValueError(
            f"{shown(entry)}: no entry of the curriculum, wanted one of {', '.join(params.curriculum)}"
            f"{suggest(entry, params.curriculum)}"
        )
    if not _HUB_ID.fullmatch(hub_id):
        raise ValueError(f"{shown(hub_id)}: no hub id, wanted owner/name, such as someone/coconut-search")
    folder = checkpoint_dir(entry)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: found no checkpoint, wanted that of {entry}; run `dvc repro train@{entry}`")


def _results(params: Params, entry: str) -> Sequence[tuple[str, str]]:
    """Return the entry's figures; none that are of another run."""
    marks = judge(Path()).marks
    results = read_results(params.curriculum, read_folder(OUTPUTS_DIR), marks=marks)
    (result,) = (one for one in results if one.name == entry)
    if result.mark is not None:
        sys.stderr.write(
            f"coconut push: {entry} is not scored with these parameters and code; the card has no figures\n"
        )
        return []
    figures = []
    for key, name in _SHOWN.items():
        if (value := result.metric(key)) is not None:
            low, high = result.metric("accuracy_low"), result.metric("accuracy_high")
            interval = f" [{low:.3f}, {high:.3f}]" if key == "accuracy" and low is not None and high is not None else ""
            figures.append((name, f"{value:.4g}{interval}"))
    return figures
