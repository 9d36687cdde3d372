"""What enters the slots can be watched and replaced, on every path, as if the row were read alone without a cache."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from arms import layout_of
from coconut.checkpoints.markers import add_markers
from coconut.config.schema import LatentConfig
from coconut.data.encoding import encode_batch
from coconut.data.examples import Example
from coconut.data.tokenizer import build_word_tokenizer
from coconut.evaluation.evaluator import Evaluator
from coconut.model.feedback import Feedback, build_feedback
from coconut.model.passes import PassOptions
from coconut.model.thoughts import pause_feedback
from coconut.probing.edits import put, replacements
from coconut.probing.subject import Subject
from tiny_models import build_tiny_model
from ways import WAYS

EXAMPLES = [
    Example("1 + 2 + 3 ?", ["3", "6"], "6"),
    Example("2 + 2 ?", ["4", "4"], "4"),
    Example("1 + 1 + 1 + 3 + 2 ?", ["2", "8"], "8"),
]


def make_subject(
    family: str = "gpt2",
    *,
    method: str = "coconut",
    thought: str = "hidden[-1]",
    markers: bool = False,
    rounds: int = 0,
    c_thought: int = 1,
    options: PassOptions | None = None,
    examples: Sequence[Example] = EXAMPLES,
) -> Subject:
    texts = [" ".join((example.question, *example.steps, "###", example.answer)) for example in examples]
    tokenizer = build_word_tokenizer(texts)
    model = build_tiny_model(family)
    add_markers(model, tokenizer)
    latent = LatentConfig(c_thought, 2, True, markers, uniform_prob=0.0, thought=thought, parallel_iterations=rounds)
    evaluator = Evaluator(
        model,
        build_feedback(thought, model, parallel_iterations=rounds),
        tokenizer,
        layout_of(method, 2, latent),
        max_new_tokens=4,
        batch_size=2,
        options=options or PassOptions(),
    )
    return Subject(evaluator, examples, encode_batch(tokenizer, examples), range(len(examples)))


@torch.no_grad()
def read_alone(subject: Subject, row: int, vectors_KD: Tensor) -> tuple[list[int], float]:
    """Put vectors into the slots of one row and decode it without a cache; its tokens, and log p of the gold answer."""
    evaluator = subject.evaluator
    model, (prompt,) = evaluator.model, [subject._prompts(None)[row]]
    embed = model.get_input_embeddings()
    embeds_1TD = embed(torch.tensor([prompt.input_ids])).clone()
    slots = slice(prompt.prefix_length, prompt.prefix_length + prompt.num_slots)
    embeds_1TD[0, slots] = vectors_KD.to(embeds_1TD)

    def logits(ids: list[int]) -> Tensor:
        further = embed(torch.tensor([ids], dtype=torch.long))
        return model(inputs_embeds=torch.cat([embeds_1TD, further], dim=1), use_cache=False).logits[0]

    ids: list[int] = []
    while len(ids) < evaluator.max_new_tokens:
        ids.append(int(logits(ids)[-1].argmax()))
        if ids[-1] in evaluator.eos_ids:
            ids.pop()
            break
    gold = subject.encoded[row].answer_ids
    of_gold = logits(gold)[-len(gold) - 1 : -1].log_softmax(dim=-1)
    return ids, float(of_gold[range(len(gold)), gold].sum())


def assert_reads_as_alone(subject: Subject, vectors_NKD: Tensor, slots: range) -> None:
    edits = put(vectors_NKD, slots)
    decoded = subject.evaluator.decode(subject._prompts(None), edits=edits)
    scores = subject.score(edits=edits)
    for row in range(len(EXAMPLES)):
        # The slots that are not replaced hold what follows from those that are.
        entered_KD = entered_after(subject, row, vectors_NKD, slots)
        ids, score = read_alone(subject, row, entered_KD)
        assert decoded[row].ids == ids
        assert scores[row] == pytest.approx(score, abs=2e-4)


@torch.no_grad()
def entered_after(subject: Subject, row: int, vectors_NKD: Tensor, slots: range) -> Tensor:
    """Find the vectors of all slots of one row one after another, without a cache."""
    evaluator = subject.evaluator
    model, prompt = evaluator.model, subject._prompts(None)[row]
    embeds_1TD = model.get_input_embeddings()(torch.tensor([prompt.input_ids])).clone()
    is_pause = evaluator.layout.slot == "pause"
    for slot in range(prompt.num_slots):
        column = prompt.prefix_length + slot
        if slot in slots:
            embeds_1TD[0, column] = vectors_NKD[row, slot].to(embeds_1TD)
        elif not is_pause:
            output = model.base_model(inputs_embeds=embeds_1TD[:, :column], output_hidden_states=True, use_cache=False)
            embeds_1TD[0, column] = evaluator.feedback(output, embeds_1TD[:, column - 1])[0]
    return embeds_1TD[0, prompt.prefix_length : prompt.prefix_length + prompt.num_slots]


CASES = [
    {"family": "gpt2"},
    {"family": "llama", "markers": True},
    {"family": "qwen2", "thought": "normalised", "c_thought": 2},
    {"family": "gpt2", "thought": "suppressed[-1]"},
    {"family": "llama", "thought": "projection", "c_thought": 2, "markers": True},
    {"family": "gpt2", "method": "pause_as_thought"},
    {"family": "llama", "method": "pause_as_thought", "c_thought": 2, "markers": True},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replaced_slots_give_what_a_row_alone_gives(case: dict) -> None:
    subject = make_subject(**case)
    others = replacements(subject.trace.vectors_NKD)
    for name, slots in (("noise", range(0, 1)), ("other_question", range(subject.num_slots)), ("zero", range(1, 2))):
        assert_reads_as_alone(subject, others[name], slots)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_every_way_to_read_a_batch_replaces_alike(way: str) -> None:
    subject = make_subject("gpt2", c_thought=2, options=WAYS[way])
    assert_reads_as_alone(subject, replacements(subject.trace.vectors_NKD)["noise"], range(1, 3))


def test_with_as_many_rounds_as_thoughts_jacobi_replaces_as_the_sequence_does() -> None:
    one_after_another, together = (make_subject("llama", c_thought=2, rounds=rounds) for rounds in (0, 4))
    assert torch.allclose(one_after_another.trace.vectors_NKD, together.trace.vectors_NKD, atol=1e-5)
    noise_NKD = replacements(one_after_another.trace.vectors_NKD)["noise"]
    for slots in (range(0, 1), range(1, 3), range(4)):
        edits = put(noise_NKD, slots)
        assert together.score(edits=edits) == pytest.approx(one_after_another.score(edits=edits), abs=1e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_slots_that_are_only_watched_change_nothing(case: dict) -> None:
    """An edit that returns what it is given, and none at all: the same tokens, and the evaluation's own."""
    subject = make_subject(**case)
    prompts = subject._prompts(None)
    plain = [row.ids for row in subject.evaluator.decode(prompts)]
    watched = [row.ids for row in subject.evaluator.decode(prompts, edits=lambda _places: lambda _slot, vector: vector)]
    assert watched == plain
    own = put(subject.trace.vectors_NKD, range(subject.num_slots))
    assert [row.ids for row in subject.evaluator.decode(prompts, edits=own)] == plain
    assert subject.score(edits=own) == pytest.approx(subject.score(), abs=1e-4)


def test_the_trace_holds_the_states_that_the_thoughts_are_made_of() -> None:
    subject = make_subject("llama", c_thought=2)
    trace = subject.trace
    assert trace.vectors_NKD.shape == (3, 4, 32)
    assert trace.states_NJD.shape == (3, 5, 32)
    assert torch.allclose(trace.states_NJD[:, :-1], trace.vectors_NKD, atol=1e-6), "hidden[-1] is that state"
    layers = subject.layer_states()
    assert layers.shape == (3, 3, 4, 32)
    assert torch.allclose(layers[-1], trace.states_NJD[:, :-1], atol=1e-4)


def test_pause_slots_hold_one_embedding_and_need_no_question() -> None:
    subject = make_subject(method="pause_as_thought", c_thought=2)
    vectors_NKD = subject.trace.vectors_NKD
    assert torch.equal(vectors_NKD, vectors_NKD[:1, :1].expand_as(vectors_NKD))
    edits = put(replacements(vectors_NKD)["other_question"], range(4))
    assert [o.text for o in subject.ask(edits=edits)] == [o.text for o in subject.outcomes]


def test_a_pause_feedback_is_the_markers_embedding() -> None:
    model = build_tiny_model("gpt2")
    feedback: Feedback = pause_feedback(model, 7)
    output = model.base_model(inputs_embeds=torch.randn(2, 3, 32))
    wanted = model.get_input_embeddings().weight[7].expand(2, -1)
    assert torch.equal(feedback(output, torch.randn(2, 32)), wanted)


def test_no_text_begins_with_a_barred_token() -> None:
    subject = make_subject()
    free = [row.ids[:1] for row in subject.evaluator.decode(subject._prompts(None))]
    barred = {ids[0] for ids in free if ids}
    for row in subject.evaluator.decode(subject._prompts(None), not_first=barred):
        assert not barred & set(row.ids[:1])


def test_other_numbers_of_thoughts_are_the_plans_of_those_numbers() -> None:
    subject = make_subject(c_thought=2)
    for number in (0, 1, 3, 6):
        layout = replace(subject.evaluator.layout, num_latents=number)
        other = Subject(replace(subject.evaluator, layout=layout), subject.examples, subject.encoded, subject.indices)
        assert [o.text for o in subject.ask(num_thoughts=number)] == [o.text for o in other.outcomes]
        assert subject.score(num_thoughts=number) == pytest.approx(other.log_p, abs=1e-5)
