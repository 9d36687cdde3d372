"""CODI: the loss and its gradients equal a slow version written from the formula; the column comes from token ids."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from coconut.config.schema import LatentConfig
from coconut.data.encoding import EncodedExample, encode_example, reword_answer
from coconut.data.examples import MARKERS, Example
from coconut.data.views import MarkerIds, ViewWriter
from coconut.methods import Row
from coconut.methods.codi import Codi, Keys
from coconut.model.feedback import Feedback, build_feedback
from coconut.model.passes import PassOptions
from coconut.ranks import BatchTooLargeError, Ranks
from coconut.training.objective import Objective
from coconut.training.rows import TrainingRow
from tiny_models import build_tiny_model

LATENT = LatentConfig(1, 1, True, True, 0.0, "projector", 0)
IDS = MarkerIds(60, 61, 62)
ROWS = [
    EncodedExample([5, 6, 7], [[8, 9], [10], [11, 12]], [3, 4, 20, 21, 1]),
    EncodedExample([5, 9], [[13]], [3, 4, 22, 1]),
    EncodedExample([14, 15, 16, 17, 18], [[19, 8], [30, 31]], [3, 4, 23, 24, 25, 1]),
]


class TwoTokensBefore(ViewWriter):
    """Answers begin with two tokens of wording."""

    def column_before_answer(self, view, example, _layout):  # type: ignore[no-untyped-def, override]
        return len(view.input_ids) - len(example.answer_ids) + 1


def rows_of(method: Codi, examples: Sequence[EncodedExample] = ROWS) -> list[TrainingRow]:
    writer = TwoTokensBefore(None, IDS)  # type: ignore[arg-type]
    return [TrainingRow(one, method.views(Row(one, random.Random(0), {}, writer)), 0) for one in examples]


def slow_loss(model: PreTrainedModel, feedback: Feedback, keys: Keys, examples: Sequence[EncodedExample]) -> Tensor:
    """Row by row, without a cache, padding or masks: every thought is computed from the whole sequence before it."""
    embed = model.get_input_embeddings()

    def states(embeds: Tensor) -> Sequence[Tensor]:
        return model.base_model(inputs_embeds=embeds, output_hidden_states=True, use_cache=False).hidden_states

    def nll(embeds: Tensor, target: Sequence[int]) -> Tensor:
        hidden = states(embeds)[-1][0, -len(target) - 1 : -1]
        return functional.cross_entropy(model.lm_head(hidden), torch.tensor(target), reduction="sum")

    teacher_nll, student_nll, targets, found, num_teacher, num_student = 0.0, 0.0, [], [], 0, 0
    for question, steps, answer in examples:
        chain = [token for step in steps[:-1] for token in step]
        embeds = embed(torch.tensor([question + chain + answer]))
        teacher_nll = teacher_nll + nll(embeds, chain + answer)
        num_teacher += len(chain + answer)
        targets.append(torch.stack([layer[0, -len(answer) + 1] for layer in states(embeds)]).detach())
        embeds = embed(torch.tensor([[*question, IDS.start]]))
        for _ in range(keys.num_thoughts):
            thought = feedback.finish(states(embeds)[-1][:, -1:])  # type: ignore[misc]
            embeds = torch.cat([embeds, thought], dim=1)
        embeds = torch.cat([embeds, embed(torch.tensor([[IDS.end, *answer]]))], dim=1)
        student_nll = student_nll + nll(embeds, answer)
        num_student += len(answer)
        found.append(torch.stack([layer[0, -len(answer) + 1] for layer in states(embeds)]))
    deviation = torch.stack(targets).std(dim=(0, 2))
    distances = functional.smooth_l1_loss(torch.stack(found), torch.stack(targets), reduction="none").mean(dim=2)
    distill = (distances / deviation).mean()
    return student_nll / num_student + keys.teacher_weight * teacher_nll / num_teacher + keys.distill_weight * distill


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("micro_batch", [3, 2, 1])
@pytest.mark.parametrize("fast", [True, False])
def test_loss_and_gradients_equal_a_slow_version(family: str, micro_batch: int, fast: bool) -> None:
    keys = Keys(num_thoughts=3, distill_weight=7.0, teacher_weight=0.5)
    model, method = build_tiny_model(family).train(), Codi(0, LATENT, keys)
    feedback = build_feedback("projector", model)
    parameters = dict(model.named_parameters()) | {f"feedback.{name}": p for name, p in feedback.named_parameters()}
    wanted = slow_loss(model, feedback, keys, ROWS)
    gradients = torch.autograd.grad(wanted, list(parameters.values()))
    objective = Objective(
        model, feedback, Accelerator(cpu=True), 0, micro_batch, method, options=PassOptions(fast=fast)
    )
    cost = objective.accumulate(rows_of(method), parameters)
    assert cost.loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert list(cost.parts) == ["teacher", "nll", "distill"]
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=5e-5 * largest, msg=name)


class Pair(Ranks):
    """The first of two processes; the other one has found nothing."""

    def gather(self, value: object) -> list[object]:
        return [value, value]

    def sum_(self, tensors: object) -> None:
        pass


@pytest.mark.parametrize("ranks", [Ranks(), Pair(rank=0, count=2)], ids=["one", "two"])
def test_out_of_memory_makes_all_of_several_processes_begin_again(ranks: Ranks) -> None:
    """One of them alone would tell the others once more what it had kept."""
    method, model = Codi(0, LATENT, Keys(num_thoughts=2)), build_tiny_model("gpt2").train()
    feedback = build_feedback("projector", model)
    objective = Objective(model, feedback, Accelerator(cpu=True), 0, 3, method, ranks=ranks)

    def refuse_two_rows_with_thoughts(_module: object, _args: object, kwargs: dict[str, Tensor]) -> None:
        rows, columns, _ = kwargs["inputs_embeds"].shape
        if columns == 1 and rows > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.base_model.register_forward_pre_hook(refuse_two_rows_with_thoughts, with_kwargs=True)
    shown, parameters = rows_of(method, [*ROWS, *ROWS]), dict(model.named_parameters())
    if ranks.count == 1:
        assert objective.accumulate(shown, parameters).loss > 0
        assert objective.micro_batch == 1
    else:
        with pytest.raises(BatchTooLargeError):
            objective.accumulate(shown, parameters)


def test_the_rows_of_the_markers_are_trained() -> None:
    method, model = Codi(0, LATENT, Keys(num_thoughts=2)), build_tiny_model("gpt2").train()
    feedback = build_feedback("projector", model)
    parameters = dict(model.named_parameters())
    objective = Objective(model, feedback, Accelerator(cpu=True), 0, 3, method)
    objective.accumulate(rows_of(method), parameters)
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert all(float(gradient[marker].abs().max()) > 0 for marker in (IDS.start, IDS.end))


def test_the_teachers_states_carry_no_gradient() -> None:
    """With the distance alone, the teacher's view reaches no weight: the chain's own tokens have no gradient."""
    method = Codi(0, LATENT, Keys(num_thoughts=2, teacher_weight=0.0))
    model = build_tiny_model("llama", tie_word_embeddings=False).train()
    objective = Objective(model, build_feedback("projector", model), Accelerator(cpu=True), 0, 3, method)
    objective.accumulate(rows_of(method), dict(model.named_parameters()))
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert float(gradient[[8, 10, 19]].abs().max()) == 0 < float(gradient[5].abs().max())


def test_only_the_named_layers_are_compared() -> None:
    states = torch.arange(24.0).reshape(2, 4, 3)
    assert torch.equal(Codi(0, LATENT, Keys(distill_layers=(1, 2))).compared(states), states[:, 1:3])
    assert torch.equal(Codi(0, LATENT, Keys()).compared(states), states)
    with pytest.raises(ValueError, match="found layer 4, but the model has 3 layers"):
        Codi(0, LATENT, Keys(distill_layers=(1, 4))).check_model(3)


# --- the column before the answer -----------------------------------------------------------


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    letters = [*"abcdefghijklmnopqrstuvwxyzT0123456789:.?#\n", "Ġ", "▁", " "]
    words = ["<unk>", "<eos>", *letters, "ĠA", "Ġ1", "Ġ18", "18", "###", "The", "Ġanswer", "Ġis", "▁18", "▁is", "Ċ"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if kind == "letters":  # Every blank is a token of its own.
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
    elif kind == "blank with the word":
        merges = [("1", "8"), ("Ġ", "18"), ("#", "#"), ("##", "#")]
        vocabulary |= {"##": len(vocabulary)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:  # Words: blanks are no tokens at all.
        words = ["<unk>", "<eos>", "The", "answer", "is:", "18", "###", "Q", "?"]
        tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", additional_special_tokens=list(MARKERS)
    )


@pytest.mark.parametrize("wording", ["###", "The answer is:"])
@pytest.mark.parametrize("kind", ["letters", "blank with the word", "words"])
def test_the_column_predicts_the_first_token_of_the_answer_itself(kind: str, wording: str) -> None:
    tokenizer = _tokenizer(kind)
    writer, method = ViewWriter.of(tokenizer), Codi(0, LATENT, Keys(num_thoughts=2, answer_wording=wording))
    example = encode_example(tokenizer, Example("Q", ["1", "18"], "18"))
    for view in method.views(Row(example, random.Random(0), {}, writer)).values():
        column = view.columns["answer"]
        after = tokenizer.decode(view.input_ids[column + 1 : -1]).strip()
        first = tokenizer.decode([view.input_ids[column + 1]])
        before = tokenizer.decode(
            [i for i in view.input_ids[: column + 1] if i < tokenizer.added_tokens_encoder[MARKERS[0]]]
        )
        assert after.replace(" ", "") == "18"
        assert first.strip(), "the token is more than a blank"
        assert before.replace(" ", "").endswith(wording.replace(" ", ""))


def test_an_answer_is_worded_anew_and_read_back() -> None:
    tokenizer = _tokenizer("words")
    ids = encode_example(tokenizer, Example("Q", [], "18")).answer_ids
    found = reword_answer(tokenizer, tuple(ids), "The answer is:")
    assert tokenizer.decode(found) == "The answer is: 18 <eos>"
    with pytest.raises(ValueError, match="'So' is unknown to the model's tokenizer"):
        reword_answer(tokenizer, tuple(ids), "So it is:")


def test_questions_are_asked_with_the_thoughts_and_read_by_the_wording() -> None:
    method = Codi(0, replace(LATENT, markers=False), Keys(num_thoughts=4, answer_wording="The answer is:"))
    layout = method.layout(0)
    assert (layout.num_latents, layout.slot, layout.markers) == (4, "thought", False)
    assert method.answer_rule() == "after The answer is:"
    assert Codi(0, LATENT, Keys()).answer_rule() == "marked"
