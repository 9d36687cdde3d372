"""The Python interface on a plain Hugging Face folder and on a checkpoint."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger

from coconut import Example, Reasoner
from coconut.checkpoints.folder import save_checkpoint
from coconut.data.examples import MARKERS
from coconut.data.tokenizer import build_word_tokenizer
from families import build_family
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
    assert reasoner.solve([]) == []


def test_a_word_that_the_model_never_saw_is_said(folder: Path) -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    try:
        open_plain(folder).solve(["1 + 2 + 3 ?", "1 + 2 + 17 ?"], max_new_tokens=1)
    finally:
        logger.remove(sink)
    assert [line.strip() for line in lines] == ["'1 + 2 + 17 ?': '17' is unknown to the model's tokenizer"]


def test_a_loss_over_a_word_that_the_model_never_saw_says_so(folder: Path, log_lines: list[str]) -> None:
    open_plain(folder).nll([EXAMPLES[0], Example("1 + 2 + 3 ?", ["3", "17"], "6")], latent_stage=0)
    assert log_lines == ["'1 + 2 + 3 ?': '17' is unknown to the model's tokenizer"]


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


# --- what a caller can get wrong ------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("latent_4", r"found an entry's outputs, wanted its checkpoint; did you mean \S*/latent_4/checkpoint\?"),
        ("laten_4/checkpoint", r"found no such folder, .*; did you mean \S*/latent_4/checkpoint\?"),
        ("latent_4/chekpoint", r"found no such folder, .*; did you mean \S*/latent_4/checkpoint\?"),
        ("latent_4/checkpoint/config.json", r"found a file, wanted a checkpoint; correct the path"),
        ("elsewhere/else", r"found no such folder, wanted a checkpoint; correct the path, or let `dvc repro`"),
        (".", r"found a folder without config.json, wanted a checkpoint; correct the path"),
    ],
)
def test_a_path_that_is_no_checkpoint_leads_to_the_one_that_was_meant(folder: Path, wrong: str, message: str) -> None:
    (folder.parent / "latent_4").mkdir()
    folder.rename(folder.parent / "latent_4" / "checkpoint")
    with pytest.raises(ValueError, match=message):
        Reasoner.from_pretrained(folder.parent / wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"c_thought": "2"}, "c_thought: found '2', wanted a whole number .int. of at least 0"),
        ({"c_thought": -1}, "c_thought: found -1, wanted a whole number .int. of at least 0"),
        ({"c_thought": True}, "c_thought: found True, wanted a whole number"),
        ({"max_latent_stage": 1.5}, "max_latent_stage: found 1.5, wanted a whole number"),
        ({"markers": "no"}, "markers: found 'no', wanted True or False"),
        ({"device": "gpu"}, "device: found 'gpu', wanted cpu, cuda, or cuda:1 and so on"),
        ({"device": None}, "device: found None, wanted cpu, cuda, or cuda:1 and so on"),
        ({"device": "cuda:99"}, r"device: found 'cuda:99', but torch sees \d+ GPUs here; use cpu"),
    ],
)
def test_opening_with_a_wrong_value_names_it(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Reasoner.from_pretrained(folder, **({"c_thought": 1, "max_latent_stage": 2, "markers": True} | arguments))


@pytest.mark.parametrize(
    ("questions", "arguments", "message"),
    [
        ("1 + 2 ?", {}, r"questions: found one str, wanted a list of text; put \[ \] around it"),
        (5, {}, "questions: found one int, wanted a list of text"),
        (EXAMPLES[0], {}, "questions: found one Example, wanted a list of text"),
        (["1 + 2 ?", 5], {}, r"questions\[1\]: found 5 \(int\), wanted text"),
        (["1 + 2 ?", " "], {}, r"questions\[1\]: found ' ', wanted text that is not empty"),
        (["1 + 2 ?"], {"num_thoughts": -1}, "num_thoughts: found -1, wanted a whole number .int. of at least 0"),
        (["1 + 2 ?"], {"num_thoughts": 1.5}, "num_thoughts: found 1.5, wanted a whole number"),
        (["1 + 2 ?"], {"max_new_tokens": 0}, "max_new_tokens: found 0, wanted a whole number .int. of at least 1"),
        (["1 + 2 ?"], {"max_new_tokens": "9"}, "max_new_tokens: found '9', wanted a whole number"),
        (["1 + 2 ?"], {"batch_size": 0}, "batch_size: found 0, wanted a whole number .int. of at least 1"),
        (
            ["1 ?", "1 + 2 ?"],
            {"num_thoughts": 10**12},
            r"questions\[0\]: found 1000000000005 tokens, 1000000000000 of them thoughts .* wanted at most 128",
        ),
        (["1 ?", "1 + " * 70 + "2 ?"], {}, r"questions\[1\]: found 147 tokens, 2 of them thoughts"),
    ],
)
def test_solving_with_a_wrong_value_names_it(
    folder: Path, questions: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        open_plain(folder).solve(questions, **arguments)


@pytest.mark.parametrize(
    ("examples", "latent_stage", "message"),
    [
        (EXAMPLES[0], 1, r"examples: found one Example, wanted a list of Example; put \[ \] around it"),
        ([], 1, "examples: found none, wanted at least one"),
        (["1 + 2 ?"], 1, r"examples\[0\]: found '1 \+ 2 \?' \(str\), wanted Example"),
        ([EXAMPLES[0], Example("1 + 2 ?", ["3"])], 1, r"examples\[1\].answer: found '', wanted text that is not empty"),
        ([Example("1 + 2 ?", [3], "3")], 1, r"examples\[0\].steps\[0\]: found 3, wanted text"),  # type: ignore[list-item]
        (EXAMPLES, -1, "latent_stage: found -1, wanted a whole number .int. of at least 0"),
        (EXAMPLES, "1", "latent_stage: found '1', wanted a whole number"),
        ([EXAMPLES[0], Example("1 ?", ["3"] * 130, "3")], 1, r"examples\[1\]: found \d+ tokens, 1 of them thoughts"),
    ],
)
def test_a_loss_with_a_wrong_value_names_it(folder: Path, examples: Any, latent_stage: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        open_plain(folder).nll(examples, latent_stage)


def test_thoughts_beyond_the_positions_are_counted_before_they_are_laid_out(folder: Path) -> None:
    reasoner = Reasoner.from_pretrained(folder, c_thought=10**12, max_latent_stage=2, markers=True)
    for ask in (lambda: reasoner.solve(["1 + 2 + 3 ?"]), lambda: reasoner.nll(EXAMPLES, latent_stage=2)):
        with pytest.raises(ValueError, match=r"\[0\]: found \d+ tokens, 2000000000000 of them thoughts"):
            ask()


def test_a_question_may_take_all_positions_but_one_and_its_answer_ends_there(folder: Path) -> None:
    reasoner = open_plain(folder)
    (solution,) = reasoner.solve(["1 + 2 + 3 ?"], num_thoughts=119, max_new_tokens=50)
    assert solution.num_generated_tokens == 1
    with pytest.raises(ValueError, match=r"questions\[0\]: found 129 tokens, 120 of them thoughts"):
        reasoner.solve(["1 + 2 + 3 ?"], num_thoughts=120)


# --- thoughts -------------------------------------------------------------------------------


def test_samples_depend_on_nothing_but_seed_question_and_number(folder: Path) -> None:
    reasoner, questions = open_plain(folder), ["1 + 2 + 3 ?", "2 + 3 + 1 ?"]
    drawn = {"num_samples": 6, "temperature": 2.0, "thought_noise": "gaussian", "noise_scale": 0.5, "max_new_tokens": 4}
    solutions = reasoner.solve(questions, **drawn)
    assert [s.text for s in solutions] == [s.text for s in reasoner.solve(questions, max_new_tokens=4)], "greedy stays"
    assert [len(s.samples) for s in solutions] == [6, 6]
    assert len({sample.text for sample in solutions[0].samples}) > 1
    again = reasoner.solve(questions[::-1], **drawn | {"num_samples": 9}, batch_size=1)[::-1]
    assert [s.samples[:6] for s in again] == [s.samples for s in solutions]
    assert reasoner.solve(questions, **drawn, seed=1)[0].samples != solutions[0].samples
    for wrong in (
        {"num_samples": -1},
        {"temperature": -0.1},
        {"thought_noise": "x"},
        {"noise_scale": True},
        {"seed": 0.5},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: found"):
            reasoner.solve(questions, **drawn | wrong)


def test_thinking_shows_the_thoughts_that_solve_feeds_back(folder: Path) -> None:
    reasoner = open_plain(folder)
    questions = [example.question for example in EXAMPLES]
    thinkings = reasoner.think(questions, max_new_tokens=4, top=3)
    assert [thinking.question for thinking in thinkings] == questions
    assert [thinking.solution for thinking in thinkings] == reasoner.solve(questions, max_new_tokens=4)
    for thinking in thinkings:
        assert len(thinking.thoughts) == 2
        for thought in thinking.thoughts:
            probabilities = [p for _, p in thought.tokens]
            assert len(probabilities) == 3
            assert probabilities == sorted(probabilities, reverse=True)
            assert thought.vector.shape == (32,)
            assert thought.entropy > 0
    vectors = torch.stack([torch.stack([thought.vector for thought in t.thoughts]) for t in thinkings])
    seen = []

    def watch(slot: int, vectors_BD: torch.Tensor, places: Any) -> torch.Tensor:
        seen.append(slot)
        assert torch.allclose(vectors_BD, vectors[list(places), slot], atol=1e-5)
        return vectors_BD

    assert reasoner.solve(questions, max_new_tokens=4, intervene=watch) == reasoner.solve(questions, max_new_tokens=4)
    assert seen == [0, 1]


def test_what_enters_a_slot_can_be_another_questions_thought(folder: Path) -> None:
    reasoner = open_plain(folder)
    questions = [example.question for example in EXAMPLES]
    vectors = [[thought.vector for thought in thinking.thoughts] for thinking in reasoner.think(questions)]
    own = reasoner.solve(questions, intervene=lambda slot, _, places: torch.stack([vectors[p][slot] for p in places]))
    assert own == reasoner.solve(questions)
    entered = []

    def exchange(slot: int, vectors_BD: torch.Tensor, places: Any) -> torch.Tensor:
        entered.append(vectors_BD)
        return torch.stack([vectors[1 - place][slot] for place in places])

    reasoner.solve(questions, batch_size=1, intervene=exchange)
    assert len(entered) == 4, "a question at a time, two slots each"


def test_with_fewer_thoughts_than_in_training_the_rest_is_said(folder: Path) -> None:
    reasoner = open_plain(folder)
    (thinking,) = reasoner.think([EXAMPLES[0].question], 1, max_new_tokens=4)
    assert len(thinking.thoughts) == 1
    assert not thinking.solution.text.startswith("###")
    assert thinking.solution == reasoner.solve([EXAMPLES[0].question], 1, 4, in_words=True)[0]
    assert reasoner.think([EXAMPLES[0].question], 0, max_new_tokens=4)[0].thoughts == []
    assert reasoner.think([]) == []


def test_on_a_terminal_a_line_stands_for_a_thought(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from coconut.terminal import run

    open_plain(folder).save_pretrained(tmp_path / "checkpoint")
    question = EXAMPLES[0].question
    assert run([question], entry=str(tmp_path / "checkpoint"), shows_thoughts=True) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == question
    assert [line.split()[:2] for line in printed[1:3]] == [["thought", "1"], ["thought", "2"]]
    assert "█" in "".join(printed) or "▏" in "".join(printed)
    run([question], entry=str(tmp_path / "checkpoint"), num_thoughts=1, shows_thoughts=True)
    assert "  1 of 2 thoughts; the rest in words:" in capsys.readouterr().out.splitlines()
    run([question], entry=str(tmp_path / "checkpoint"), shows_thoughts=False)
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model whose answer changes with what either slot holds."""
    tokenizer = build_word_tokenizer([text for one in EXAMPLES for text in (one.question, *one.steps, "### 6")])
    model = build_tiny_model("gpt2", seed=1, vocab_size=len(tokenizer), tie_word_embeddings=False)
    save_checkpoint(tmp_path / "plain", model, tokenizer, None)
    open_plain(tmp_path / "plain").save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def said_in_chat(
    lines: list[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[list[str], list[str]]:
    """Return what a chat of these lines prints, and its errors."""
    from coconut.terminal import chat

    content = "\n".join(lines).encode("utf-8", "surrogateescape")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    assert chat(str(checkpoint)) == 0
    said = capsys.readouterr()
    return said.out.splitlines(), said.err.splitlines()


def test_a_chat_answers_shows_thoughts_and_replaces_them(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reasoner, question = Reasoner.from_pretrained(checkpoint), EXAMPLES[0].question
    embeds = reasoner.model.get_input_embeddings().weight.detach()
    ids = [reasoner.tokenizer.convert_tokens_to_ids(word) for word in ("4", "6")]
    torch.testing.assert_close(reasoner.embedding(["4", "6"]), embeds[ids].mean(dim=0))

    enters = [
        lambda slot, vectors, _, place=place: embeds[ids].mean(dim=0).expand_as(vectors) if slot == place else vectors
        for place in (0, 1)
    ]
    asked = [
        question,
        "/thoughts",
        "/replace 1 node 4 6",
        "/replace 2 node 4 6",
        EXAMPLES[1].question,
        "/quit",
        question,
    ]
    printed, errors = said_in_chat(asked, checkpoint, monkeypatch, capsys)
    assert errors == []
    assert [line.split()[:2] for line in printed[1:3]] == [["thought", "1"], ["thought", "2"]]
    texts = [reasoner.solve([question])[0].text]
    texts += [reasoner.solve([question], intervene=enter)[0].text for enter in enters]
    assert len(set(texts)) == 3
    texts.append(reasoner.solve([EXAMPLES[1].question])[0].text)
    shown = [" / ".join(filter(None, map(str.strip, text.split("\n")))) for text in texts]
    assert [line.strip() for line in (printed[0], *printed[3:])] == shown, "and nothing is read after /quit"


def test_a_chat_goes_on_after_a_wrong_line_with_one_line_of_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [
        "/thoughts",
        "/nothing",
        EXAMPLES[0].question,
        "/replace 3 node 4",
        "/replace 1 4",
        "/replace 1 node zebra",
    ]
    wrong += ["1 + " * 200 + "1 ?", "", "/help", "1 + \udcff ?", EXAMPLES[0].question]
    printed, errors = said_in_chat(wrong, checkpoint, monkeypatch, capsys)
    starts = ["/thoughts: no question", "/nothing: no such command", "/replace 3 node 4: wanted a thought from 1 to 2"]
    starts += ["/replace 1 4: wanted", "words[0]: found 'zebra'", "questions[0]: found"]
    assert [line.startswith(f"coconut: {start}") for line, start in zip(errors, starts, strict=True)] == [True] * 6
    assert printed[0] == printed[-1], "it answers as before"
    assert "/quit" in "".join(printed)


def test_a_name_that_leads_to_no_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coconut.terminal import find_checkpoint

    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="'latent_9': found neither an entry of the curriculum nor a folder"):
        find_checkpoint("latent_9")
    with pytest.raises(ValueError, match="found no latent entry that is trained, wanted one to ask; run `dvc repro`"):
        find_checkpoint("")
    assert find_checkpoint("cot") == Path("outputs/cot/checkpoint")


def test_its_representation_says_what_it_is_and_where(folder: Path) -> None:
    assert repr(open_plain(folder).to("cpu")).startswith("Reasoner(LlamaForCausalLM, ")
    assert repr(open_plain(folder)).endswith(" weights on cpu, method coconut, 2 thoughts)")


def test_logits_are_those_by_which_the_loss_judges(folder: Path) -> None:
    reasoner = open_plain(folder)
    nll, num_tokens = reasoner.nll(EXAMPLES, latent_stage=1)
    logits = reasoner.logits(EXAMPLES, latent_stage=1)
    assert sum(map(len, logits)) == num_tokens
    targets = []
    for example in EXAMPLES:
        text = "".join(f"{step}\n" for step in example.steps[1:]) + f"### {example.answer}"
        targets.append([*reasoner.tokenizer(text, add_special_tokens=False).input_ids, reasoner.tokenizer.eos_token_id])
    found = sum(
        torch.nn.functional.cross_entropy(row, torch.tensor(ids), reduction="sum")
        for row, ids in zip(logits, targets, strict=True)
    )
    torch.testing.assert_close(found, nll.detach())


def test_a_score_is_the_share_of_right_answers(folder: Path) -> None:
    reasoner = open_plain(folder)
    answers = [one.answer or "none" for one in reasoner.solve([example.question for example in EXAMPLES])]
    right = [Example(example.question, [], answer) for example, answer in zip(EXAMPLES, answers, strict=True)]
    wanted = sum(answer != "none" for answer in answers) / 2
    assert reasoner.score(right) == wanted
    assert reasoner.score([Example(EXAMPLES[0].question, [], "no such answer")]) == 0
    with pytest.raises(ValueError, match="examples: found none"):
        reasoner.score([])


@pytest.mark.parametrize(
    ("entering", "message"),
    [
        (lambda _: None, "returned None, wanted a tensor of shape"),
        (lambda vectors: vectors[:, :1], "returned a tensor of shape"),
        (lambda vectors: vectors * float("nan"), "not all finite"),
        (lambda vectors: torch.zeros(vectors.shape, dtype=torch.int64), "returned torch.int64"),
    ],
)
def test_what_cannot_enter_a_slot_is_refused(folder: Path, entering: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"intervene: .*{message}"):
        open_plain(folder).solve(["1 + 2 + 3 ?"], intervene=lambda _slot, vectors, _places: entering(vectors))


def test_in_a_work_tree_the_name_of_an_entry_is_enough(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_plain(folder).save_pretrained(tmp_path / "outputs/latent_2/checkpoint")
    monkeypatch.chdir(tmp_path)
    assert repr(Reasoner.from_pretrained("latent_2")) == repr(open_plain(folder))


def test_a_family_that_base_refuses_is_refused_here_unless_the_caller_knows(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", build_family("bart", 32), build_word_tokenizer(["1 + 2 ? ### 3"]), None)
    asked: dict[str, Any] = {"c_thought": 1, "max_latent_stage": 1, "markers": True}
    with pytest.raises(ValueError, match=r"wanted a decoder-only model with causal attention in every layer"):
        Reasoner.from_pretrained(tmp_path / "model", **asked)
    assert Reasoner.from_pretrained(tmp_path / "model", **asked, prove=False)
