"""Every causal family of the installed transformers: read right by the passes that `base` chooses, or refused in words.

`docs/models.md` shows the outcomes. `COCONUT_FAMILIES=all pytest -m slow tests/test_families.py` tries every family,
in some twenty minutes; without it one family of each kind of outcome is tried. With `COCONUT_UPDATE_DOCS=1` the page is
written anew.
"""

import fcntl
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import oracle
from coconut.checkpoints.support import check_supported
from coconut.data.collator import collate
from coconut.data.views import IGNORED, View
from coconut.model.feedback import Feedback
from coconut.model.generation import generate
from coconut.model.latent import latent_nll
from families import FAMILIES, VOCAB_SIZE, build_family

PAGE = Path(__file__).parents[1] / "docs/models.md"
WIDTHS = (64, 256)
DECODER = " as a decoder"
ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Families that read in both directions unless their config says `is_decoder`."""
KINDS = sorted([*FAMILIES, *(family + DECODER for family in ENCODERS)])
SAMPLE = (
    *("bart", "bert", "falcon", "gemma2", "gpt2", "llama", "mamba", "mistral", "nemotron", "olmo", "phi3", "qwen2"),
    *("qwen3_next", "stablelm"),
)
"""Models that people use, and one of each kind that is read by the plain passes or refused."""
TRIED = KINDS if os.environ.get("COCONUT_FAMILIES") == "all" else [kind for kind in KINDS if kind in SAMPLE]
TOLERANCES = {"gemma4_unified": 5e-3, "gemma4_unified_text": 5e-3}
"""Their random weights divide by norms near zero: in float64 the difference is 4e-7, of the loss alone 8e-8."""
LENGTHS = [(5, 3, 4), (9, 3, 2), (2, 1, 6), (4, 2, 5)]
HEADER = f"""# Model families

What `base` makes of each causal family of transformers {transformers.__version__}, tried with tiny random weights of
the family's default config. Written by `tests/test_families.py`, which fails where an outcome differs from this page.

* **fast**: loss, gradients and greedy tokens of a padded batch are those of one row at a time without a cache, and
  the fast path reads the model.
* **plain**: the same, but the plain passes read it, because the fast path differs or fails.
* **refused**: `base` stops with these words.
* **not built**: transformers cannot build the family's default in this environment.

| family | {" | ".join(f"width {width}" for width in WIDTHS)} |
|---|{"---|" * len(WIDTHS)}
"""


def make_view(row: int, num_question: int, num_thoughts: int, num_target: int) -> View:
    length = num_question + num_thoughts + num_target
    ids = [3 + (5 + 13 * row + 7 * column) % (VOCAB_SIZE - 3) for column in range(length)]
    labels = [IGNORED] * (length - num_target) + ids[length - num_target :]
    return View(ids, labels, num_question, num_thoughts, num_thoughts)


def prompt_of(view: View, num_slots: int) -> View:
    length = view.prefix_length + num_slots
    return View(view.input_ids[:length], [IGNORED] * length, view.prefix_length, view.num_slots, view.num_thoughts)


def outcome(kind: str, width: int) -> str:
    """Build, prove and compare; return the words for the table."""
    family = kind.removesuffix(DECODER)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build_family(family, width, **({"is_decoder": True} if kind.endswith(DECODER) else {}))
    except Exception as error:  # noqa: BLE001 - the library's own, of any kind
        return f"not built: {' '.join(str(error).split())[:80]}"
    name = type(model).__name__
    try:
        support = check_supported(model)
    except ValueError as error:
        words = str(error)
        assert words.startswith(f"model: {name} "), words
        return "refused: " + words.removeprefix(f"model: {name} ").partition("; wanted")[0]
    assert_equal_to_rows_alone(model, TOLERANCES.get(kind, 1e-5))
    return re.sub(r" by [\d.]+%", "", str(support))


def assert_equal_to_rows_alone(model: PreTrainedModel, tolerance: float) -> None:
    views = [make_view(row, *lengths) for row, lengths in enumerate(LENGTHS)]
    model.zero_grad()
    wanted, _ = oracle.nll(model, views)
    wanted.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found, _ = latent_nll(model, Feedback(), collate(views, pad_id=0))
    found.backward()
    assert abs(found - wanted) <= 1e-5 * wanted
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None or name in gradients:
            blank = torch.zeros_like(parameter)
            of_batch = blank if parameter.grad is None else parameter.grad
            assert (of_batch - gradients.get(name, blank)).norm() <= tolerance * norm, name
    prompts = [prompt_of(view, num_slots=3) for view in views]
    limits = {"max_new_tokens": 6}
    decoded = generate(model, Feedback(), collate(prompts, pad_id=0), eos_ids=[1], **limits)
    for row, prompt in zip(decoded, prompts, strict=True):
        ids = oracle.generate(model, prompt, eos_id=1, **limits)
        assert row.ids == [token for token in ids if token != 1]


def read_rows() -> dict[str, str]:
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    return {kind: line for kind, line in rows.items() if kind != "family"}


def write_row(kind: str, line: str) -> None:
    with PAGE.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Tests of several processes write the page.
        rows = read_rows() | {kind: line}
        lines = [rows[kind] for kind in KINDS if kind in rows]
        PAGE.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRIED)
def test_a_family_is_read_right_or_refused_in_words(kind: str) -> None:
    outcomes = [outcome(kind, width).replace("|", "/") for width in WIDTHS]
    line = f"| {kind} | {' | '.join(outcomes)} |"
    if os.environ.get("COCONUT_UPDATE_DOCS"):
        write_row(kind, line)
    assert read_rows().get(kind) == line


def test_the_page_shows_every_family() -> None:
    assert PAGE.read_text(encoding="utf-8").startswith(HEADER)
    assert list(read_rows()) == KINDS
