"""All thoughts together, T rounds (Jacobi): as many rounds as thoughts are the sequential result."""

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from coconut.data.collator import Batch, collate
from coconut.data.layouts import Layout
from coconut.data.views import IGNORED, MarkerIds, View, build_prompt, build_view
from coconut.model.feedback import Feedback, build_feedback
from coconut.model.generation import generate
from coconut.model.latent import latent_nll
from coconut.model.passes import PassOptions, copy_cache
from marks import slow_but
from tiny_models import FAMILIES, build_tiny_model
from ways import hidden_states

MARKERS = MarkerIds(60, 61, 62)


def make_views(num_latents: tuple[int, ...], *, markers: bool = False) -> list[View]:
    questions = ([5, 9, 33], [7, 8, 21, 40, 11], [50, 3])
    return [
        build_view(
            questions[row], ([12, 13], [14]), [20 + n, 1], layout=Layout(row % 2, n, markers=markers), markers=MARKERS
        )
        for row, n in enumerate(num_latents)
    ]


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def hidden(model: PreTrainedModel, batch: Batch, iterations: int, thought: str = "hidden[-1]") -> Tensor:
    feedback = build_feedback(thought, model, parallel_iterations=iterations)
    return hidden_states(model, feedback, batch, PassOptions()) * batch.attention_mask_BT[:, :, None]


def slow_hidden(model: PreTrainedModel, view: View, iterations: int) -> Tensor:
    """One row, everything anew in each round; the slots start as the embeddings of their tokens."""
    own_TD = model.get_input_embeddings()(torch.tensor(view.input_ids))
    slots = range(view.prefix_length, view.prefix_length + view.num_thoughts)
    embeds_TD = own_TD
    for _ in range(iterations):
        hidden_TD = model.base_model(inputs_embeds=embeds_TD[None], use_cache=False).last_hidden_state[0]
        embeds_TD = torch.stack(
            [hidden_TD[column - 1] if column in slots else own_TD[column] for column in range(len(own_TD))]
        )
    return model.base_model(inputs_embeds=embeds_TD[None], use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("num_latents", [(1, 1), (3, 3), (4, 1, 2), (0, 3)], ids=["one", "equal", "ragged", "none"])
@pytest.mark.parametrize("markers", [False, True], ids=["bare", "markers"])
def test_as_many_rounds_as_thoughts_are_the_sequential_result(
    tiny_lm: PreTrainedModel, num_latents: tuple[int, ...], markers: bool
) -> None:
    batch = collate(make_views(num_latents, markers=markers), pad_id=0)
    expected, _ = latent_nll(tiny_lm, Feedback(), batch)
    wanted = gradients(tiny_lm, expected)
    found, _ = latent_nll(tiny_lm, Feedback(parallel_iterations=max(num_latents)), batch)
    assert abs((found - expected).item()) < 1e-5
    for name, gradient in gradients(tiny_lm, found).items():
        assert (gradient - wanted[name]).abs().max() < 1e-5 * max(1.0, wanted[name].abs().max().item()), name


@pytest.mark.parametrize("thought", ["hidden[-2]", "normalised", "projection", "input+suppressed[0.5:]"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_sequential_result_with_every_form_in_every_family(family: str, thought: str) -> None:
    model = build_tiny_model(family)
    batch = collate(make_views((3, 1, 2)), pad_id=0)
    difference = hidden(model, batch, 3, thought) - hidden(model, batch, 0, thought)
    assert difference[batch.attention_mask_BT == 1].abs().max() < 2e-5


@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_each_number_of_rounds_is_what_recomputing_row_by_row_gives(tiny_lm: PreTrainedModel, iterations: int) -> None:
    views = make_views((4, 2, 3))
    batch = collate(views, pad_id=0)
    found = hidden(tiny_lm, batch, iterations)
    for row, view in enumerate(views):
        expected = slow_hidden(tiny_lm, view, min(iterations, view.num_thoughts))
        assert (found[row][batch.attention_mask_BT[row] == 1] - expected).abs().max() < 1e-5


def test_fewer_rounds_than_thoughts_make_a_difference(tiny_lm: PreTrainedModel) -> None:
    batch = collate(make_views((4, 4)), pad_id=0)
    sequential = hidden(tiny_lm, batch, 0)
    differences = [(hidden(tiny_lm, batch, rounds) - sequential).abs().max().item() for rounds in (1, 2, 3, 4)]
    assert min(differences[:3]) > 1e-3
    assert differences[3] < 1e-5


def test_more_rounds_than_thoughts_change_nothing_and_cost_nothing(tiny_gpt2: PreTrainedModel) -> None:
    batch = collate(make_views((2, 2)), pad_id=0)
    passes: list[int] = []
    tiny_gpt2.base_model.register_forward_hook(lambda *_: passes.append(1))
    enough = hidden(tiny_gpt2, batch, 2)
    num_passes = len(passes)
    assert torch.equal(hidden(tiny_gpt2, batch, 99), enough)
    assert len(passes) == 2 * num_passes


def test_rounds_read_the_span_of_the_thoughts_and_the_question_is_read_once(tiny_gpt2: PreTrainedModel) -> None:
    widths: list[int] = []
    tiny_gpt2.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    batch = collate(make_views((6, 6)), pad_id=0)
    hidden(tiny_gpt2, batch, 2)
    num_columns = batch.input_ids_BT.shape[1]
    assert widths == [5, 5, 5, num_columns - 5]


def test_rows_that_are_not_aligned_give_the_same_numbers(tiny_lm: PreTrainedModel) -> None:
    views = make_views((2, 3))
    alone = [collate([view], pad_id=0)[:5] for view in views]
    width = max(batch[0].shape[1] for batch in alone)

    def pad(row: Tensor, value: int) -> Tensor:
        return torch.cat([row, row.new_full((1, width - row.shape[1]), value)], dim=1)

    fillers = (0, 0, 0, 0, IGNORED)
    rows = zip(*alone, strict=True)
    batch = Batch(
        *(torch.cat([pad(part, filler) for part in parts]) for parts, filler in zip(rows, fillers, strict=True))
    )
    sequential, parallel = hidden(tiny_lm, batch, 0), hidden(tiny_lm, batch, 3)
    assert (parallel - sequential)[batch.attention_mask_BT == 1].abs().max() < 1e-5


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_generation_goes_on_from_the_same_thoughts(tiny_lm: PreTrainedModel, iterations: int) -> None:
    prompts = [build_prompt(question, layout=Layout(0, 4), markers=MARKERS) for question in ([5, 9, 33], [7, 2])]
    batch = collate(prompts, pad_id=0)
    feedback = Feedback(parallel_iterations=iterations)
    together = generate(tiny_lm, feedback, batch, eos_ids=[999], max_new_tokens=6)
    for row, prompt in zip(together, prompts, strict=True):
        ids: list[int] = []
        with torch.no_grad():
            while len(ids) < 6:
                view = dataclasses.replace(prompt, input_ids=prompt.input_ids + ids)
                logits = tiny_lm.get_output_embeddings()(slow_hidden(tiny_lm, view, iterations)[-1])
                ids.append(int(logits.argmax()))
        assert row.ids == ids


def test_a_batch_without_thoughts_is_read_as_it_is(tiny_lm: PreTrainedModel) -> None:
    batch = collate(make_views((0, 0)), pad_id=0)
    assert torch.equal(hidden(tiny_lm, batch, 3), hidden(tiny_lm, batch, 0))


def test_a_copied_cache_grows_alone(tiny_lm: PreTrainedModel) -> None:
    cache = DynamicCache(config=tiny_lm.config)
    tiny_lm.base_model(input_ids=torch.tensor([[3, 4]]), past_key_values=cache, use_cache=True)
    twin = copy_cache(cache)
    keys = cache.layers[0].keys.clone()
    tiny_lm.base_model(input_ids=torch.tensor([[5]]), past_key_values=twin, use_cache=True)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (2, 3)
    assert torch.equal(cache.layers[0].keys, keys)


@pytest.mark.parametrize("thought", ["hidden[-1]", "normalised(input+suppressed[0.5:])", "projection"])
@pytest.mark.parametrize("iterations", slow_but([0, 3], [0, 1, 3]))
def test_running_passes_again_in_the_backward_pass_changes_no_gradient(
    tiny_lm: PreTrainedModel, iterations: int, thought: str
) -> None:
    batch = collate(make_views((3, 1, 2)), pad_id=0)
    feedback = build_feedback(thought, tiny_lm, parallel_iterations=iterations)
    kept, _ = latent_nll(tiny_lm, feedback, batch)
    wanted = gradients(tiny_lm, kept)
    again, _ = latent_nll(tiny_lm, feedback, batch, PassOptions(checkpoint_activations=True))
    found = gradients(tiny_lm, again)
    assert abs((again - kept).item()) < 1e-5
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * max(1.0, gradient.abs().max().item()), name
