"""The Python interface on a plain Hugging Face folder and on a checkpoint."""

from pathlib import Path

import pytest
import torch
from loguru import logger

from coconut import Example, Reasoner
from coconut.data.tokenizer import build_word_tokenizer
from coconut.model.base import MARKERS, save_checkpoint
from tiny_models import build_tiny_model

EXAMPLES = [Example("1 + 2 + 3 ?", ["3", "6"], "6"), Example("2 + 2 + 1 + 1 ?", ["4", "5", "6"], "6")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain model folder: no markers, no coconut.json."""
    words = [text for example in EXAMPLES for text in (example.question, *example.steps, f"### {example.answer}")]
    tokenizer = build_word_tokenizer(words)
    model = build_tiny_model("llama")
    save_checkpoint(tmp_path / "model", model, tokenizer, None)
    return tmp_path / "model"


def open_plain(folder: Path) -> Reasoner:
    return Reasoner.from_pretrained(folder, c_thought=1, max_latent_stage=2, markers=True)


def test_a_plain_folder_needs_the_numbers_that_only_a_checkpoint_knows(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"without our coconut.json; give c_thought, markers too"):
        Reasoner.from_pretrained(folder, max_latent_stage=2)


def test_every_question_gets_a_solution_with_the_asked_number_of_thoughts(folder: Path) -> None:
    reasoner = open_plain(folder)
    questions = [example.question for example in EXAMPLES]
    for num_thoughts, expected in ((None, 2), (0, 0), (5, 5)):
        solutions = reasoner.solve(questions, num_thoughts, max_new_tokens=4)
        assert [s.num_thoughts for s in solutions] == [expected, expected]
        assert all(1 <= s.num_generated_tokens <= 4 for s in solutions)
    assert [s.text for s in reasoner.solve(questions[:1], max_new_tokens=4)] == [
        reasoner.solve(questions, max_new_tokens=4)[0].text
    ]
    with pytest.raises(ValueError, match="num_thoughts: found -1, wanted at least 0"):
        reasoner.solve(questions, -1)


def test_a_word_that_the_model_never_saw_is_said(folder: Path) -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    try:
        open_plain(folder).solve(["1 + 2 + 3 ?", "1 + 2 + 17 ?"], max_new_tokens=1)
    finally:
        logger.remove(sink)
    assert [line.strip() for line in lines] == ["'1 + 2 + 17 ?': '17' is unknown to the model's tokenizer"]


def test_markers_that_the_vocabulary_holds_are_kept(folder: Path) -> None:
    first = open_plain(folder)
    rows = first.model.get_input_embeddings().weight
    with torch.no_grad():
        rows[list(first.markers)] = torch.arange(3.0)[:, None].expand(3, rows.shape[1])
    save_checkpoint(folder, first.model, first.tokenizer, None)
    second = open_plain(folder)
    assert second.markers == first.markers
    assert torch.equal(second.model.get_input_embeddings().weight[list(second.markers)], rows[list(first.markers)])
    assert second.tokenizer.convert_ids_to_tokens(list(second.markers)) == list(MARKERS)


def test_the_loss_is_differentiable_and_additive(folder: Path) -> None:
    reasoner = open_plain(folder)
    nll, num_tokens = reasoner.nll(EXAMPLES, latent_stage=1)
    parts = [reasoner.nll([example], latent_stage=1) for example in EXAMPLES]
    assert num_tokens == sum(count for _, count in parts)
    assert abs(float(nll.detach()) - sum(float(part.detach()) for part, _ in parts)) < 1e-4
    nll.backward()
    gradient = reasoner.model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
