"""Every form of thought equals its definition, recomputed row by row without a cache, in every family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from coconut.checkpoints.feedback import WEIGHTS_FILE, load_feedback, save_feedback
from coconut.checkpoints.folder import load_model
from coconut.config.params import parse_params
from coconut.config.thought import FORMS, find_layer, parse_thought
from coconut.data.collator import collate
from coconut.data.layouts import Layout
from coconut.data.views import IGNORED, MarkerIds, View, build_prompt, build_view
from coconut.model.feedback import Feedback, Projection, States, build_feedback, find_final_norm, suppressed
from coconut.model.generation import generate
from coconut.model.latent import latent_nll
from marks import slow_but
from test_config import shipped_tree
from tiny_models import EOS_ID, FAMILIES, build_tiny_model

MARKERS = MarkerIds(60, 61, 62)

# --- the slow way -----------------------------------------------------------------------------


def final_norm(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    body = model.base_model
    return body.ln_f if hasattr(body, "ln_f") else body.norm  # type: ignore[return-value]


def taken_away(before: Tensor, after: Tensor) -> Tensor:
    """What is gone of each coordinate, by cases."""
    same_sign = before.sign() == after.sign()
    lost = torch.where(same_sign, (before.abs() - after.abs()).clamp(min=0), before.abs())
    return lost * before.sign()


def lens_changes(model: PreTrainedModel, states: tuple[Tensor, ...], layers: list[int]) -> Tensor:
    norm = final_norm(model)
    seen = [norm(state) for state in states[:-1]] + [states[-1]]
    return sum((taken_away(seen[layer - 1], seen[layer]) for layer in layers), torch.zeros(()))


def to_embedding_scale(model: PreTrainedModel, x: Tensor) -> Tensor:
    table = model.get_input_embeddings()(torch.arange(model.config.vocab_size)).detach()
    return x * table.square().mean().sqrt() / x.square().mean(dim=-1, keepdim=True).sqrt()


# The tiny models have two layers, so three states: 0, 1 and 2.
DEFINITIONS: dict[str, Callable[[PreTrainedModel, tuple[Tensor, ...], Tensor], Tensor]] = {
    "hidden[-1]": lambda _model, states, _inputs: states[2],
    "hidden[2]": lambda _model, states, _inputs: states[2],
    "hidden[-2]": lambda _model, states, _inputs: states[1],
    "hidden[0.5]": lambda _model, states, _inputs: states[1],
    "hidden[0]": lambda _model, states, _inputs: states[0],
    "normalised": lambda model, states, _inputs: to_embedding_scale(model, states[2]),
    "normalised(hidden[-2])": lambda model, states, _inputs: to_embedding_scale(model, states[1]),
    "suppressed[-1]": lambda model, states, _inputs: lens_changes(model, states, [2]),
    "suppressed[1]": lambda model, states, _inputs: lens_changes(model, states, [1]),
    "suppressed[0.5:]": lambda model, states, _inputs: lens_changes(model, states, [1, 2]),
    "hidden[-1]+suppressed[0.5:]": lambda model, states, _inputs: states[2] + lens_changes(model, states, [1, 2]),
    "input+suppressed[-1:]": lambda model, states, inputs: inputs + lens_changes(model, states, [2]),
    "normalised(input+suppressed[1:])": lambda model, states, inputs: to_embedding_scale(
        model, inputs + lens_changes(model, states, [1, 2])
    ),
}


def slow_row(model: PreTrainedModel, thought: str, view: View) -> tuple[Tensor, Tensor]:
    """Embeddings with thoughts filled in, and logits, of one row: everything anew for each thought."""
    embeds_TD = model.get_input_embeddings()(torch.tensor(view.input_ids))
    for column in range(view.prefix_length, view.prefix_length + view.num_thoughts):
        before = embeds_TD[:column]
        output = model.base_model(inputs_embeds=before[None], use_cache=False, output_hidden_states=True)
        states = tuple(state[0, -1] for state in output.hidden_states)
        filled = DEFINITIONS[thought](model, states, before[-1])
        embeds_TD = torch.cat([before, filled[None], embeds_TD[column + 1 :]])
    return embeds_TD, model(inputs_embeds=embeds_TD[None], use_cache=False).logits[0]


def slow_nll(model: PreTrainedModel, thought: str, views: list[View]) -> Tensor:
    total = torch.zeros(())
    for view in views:
        logits_TV = slow_row(model, thought, view)[1][:-1]
        targets = torch.tensor(view.labels[1:])
        total = total + functional.cross_entropy(logits_TV, targets, reduction="sum", ignore_index=IGNORED)
    return total


def slow_generate(model: PreTrainedModel, thought: str, prompt: View, num_tokens: int) -> list[int]:
    embeds_TD, logits_TV = slow_row(model, thought, prompt)
    ids: list[int] = []
    for _ in range(num_tokens):
        ids.append(int(logits_TV[-1].argmax()))
        embeds_TD = torch.cat([embeds_TD, model.get_input_embeddings()(torch.tensor(ids[-1:]))])
        logits_TV = model(inputs_embeds=embeds_TD[None], use_cache=False).logits[0]
    return ids


# --- inputs -----------------------------------------------------------------------------------


def make_views(num_latents: tuple[int, ...] = (3, 1, 2)) -> list[View]:
    questions = ([5, 9, 33], [7, 8, 21, 40, 11], [50])
    steps = ([12, 13], [14])
    return [
        build_view(question, steps, [20 + n, EOS_ID], layout=Layout(row % 2, n), markers=MARKERS)
        for row, (question, n) in enumerate(zip(questions, num_latents, strict=True))
    ]


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- equalities -------------------------------------------------------------------------------


@pytest.mark.parametrize("thought", DEFINITIONS)
@pytest.mark.parametrize("family", slow_but(["qwen2"], FAMILIES))
def test_a_form_equals_its_definition_in_loss_and_gradients(family: str, thought: str) -> None:
    model, views = build_tiny_model(family), make_views()
    slow = slow_nll(model, thought, views) / 13
    expected = gradients(model, slow)
    fast, num_tokens = latent_nll(model, build_feedback(thought, model), collate(views, pad_id=0))
    found = gradients(model, fast / 13)
    assert num_tokens == 13
    assert abs((fast / 13 - slow).item()) < 2e-6
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.isfinite(found[name]).all(), name
        assert (found[name] - gradient).abs().max() < 1e-4 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.slow
@pytest.mark.parametrize("thought", DEFINITIONS)
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
def test_a_form_generates_what_its_definition_generates(family: str, thought: str) -> None:
    model = build_tiny_model(family)
    layout = Layout(0, 3)
    prompts = [build_prompt(question, layout=layout, markers=MARKERS) for question in ([5, 9, 33], [7], [8, 2, 40, 11])]
    batch = collate(prompts, pad_id=0)
    feedback = build_feedback(thought, model)
    rows = generate(model, feedback, batch, eos_ids=[999], max_new_tokens=8)
    with torch.no_grad():
        assert [row.ids for row in rows] == [slow_generate(model, thought, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("thought", [*DEFINITIONS, "projection"])
def test_a_row_scores_the_same_alone_and_in_a_padded_batch(tiny_lm: PreTrainedModel, thought: str) -> None:
    feedback, views = build_feedback(thought, tiny_lm), make_views((1, 4, 0))
    together, _ = latent_nll(tiny_lm, feedback, collate(views, pad_id=0))
    alone = [latent_nll(tiny_lm, feedback, collate([view], pad_id=0))[0] for view in views]
    assert abs((together - sum(alone)).item()) < 1e-4


def test_forms_give_different_thoughts(tiny_qwen2: PreTrainedModel) -> None:
    batch = collate(make_views(), pad_id=0)
    losses = {
        thought: round(latent_nll(tiny_qwen2, build_feedback(thought, tiny_qwen2), batch)[0].item(), 4)
        for thought in DEFINITIONS
    }
    assert losses.pop("hidden[2]") == losses["hidden[-1]"]
    assert losses.pop("hidden[0.5]") == losses["hidden[-2]"]
    assert len(set(losses.values())) == len(losses)


# --- layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "num_layers", "number"),
    [
        ("-1", 12, 12),
        ("-2", 12, 11),
        ("0", 12, 0),
        ("-13", 12, 0),
        ("12", 12, 12),
        ("0.5", 12, 6),
        ("0.5", 24, 12),
        ("0.5", 3, 2),
        (".25", 3, 1),
        ("0.99", 12, 12),
        ("0.01", 12, 0),
        ("0.58", 49, 29),
    ],
)
def test_a_layers_name_is_a_number_of_hf(layer: str, num_layers: int, number: int) -> None:
    assert find_layer(layer, num_layers) == number


def test_layer_numbers_are_those_of_the_models_own_hidden_states(tiny_lm: PreTrainedModel) -> None:
    output = tiny_lm.base_model(
        input_ids=torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 3), output_hidden_states=True
    )
    for name, number in (("hidden[0]", 0), ("hidden[1]", 1), ("hidden[-1]", 2)):
        thought = build_feedback(name, tiny_lm)(output, torch.zeros(1, 32))
        assert torch.equal(thought, output.hidden_states[number][:, -1])


@pytest.mark.parametrize("thought", ["hidden[3]", "hidden[-4]", "suppressed[0]", "suppressed[-3]", "suppressed[3:]"])
def test_a_layer_that_the_model_lacks_is_an_error(tiny_gpt2: PreTrainedModel, thought: str) -> None:
    lowest = 1 if "suppressed" in thought else 0
    with pytest.raises(
        ValueError, match=f"the model has 2 layers; wanted {lowest} to 2, {lowest - 3} to -1, or a frac"
    ):
        build_feedback(thought, tiny_gpt2)


@pytest.mark.parametrize(
    "thought",
    [
        "",
        "hidden",
        "hidden[]",
        "hidden[1.5]",
        "hidden[0.0]",
        "hidden[01]",
        "hidden[-0.5]",
        "hidden[0.5:]",
        "hidden[-1] + suppressed[1]",
        "hidden[-1]suppressed[1]",
        "hidden[-1]+",
        "hidden[1]+hidden[2]",
        "input",
        "input+hidden[1]",
        "+suppressed[1]",
        "suppressed",
        "supressed[0.5:]",
        "normalised()",
        "normalised(projection)",
        "projection(projection(hidden[-1]))",
        "normalized",
        " hidden[-1]",
        "hidden[-1]\n",
    ],
)
def test_an_unknown_form_is_an_error_that_lists_the_known_ones(thought: str) -> None:
    with pytest.raises(ValueError, match=r"thought: found .*, wanted one of") as error:
        parse_thought(thought)
    assert all(form in str(error.value) for form in FORMS)


def test_a_wrong_name_is_an_error_when_the_params_are_read() -> None:
    tree = shipped_tree()
    tree["curriculum"]["latent_2"]["thought"] = "hidden"
    with pytest.raises(ValueError, match=r"^curriculum.latent_2.thought: found 'hidden', wanted one of"):
        parse_params(tree)


# --- suppressed -------------------------------------------------------------------------------


def test_suppressed_is_what_a_layer_takes_away_coordinate_by_coordinate() -> None:
    before = torch.tensor([4.0, 4.0, 4.0, -4.0, -4.0, 0.0, 3.0])
    after = torch.tensor([1.0, 9.0, -2.0, -1.0, -7.0, 5.0, 3.0])
    states = States([before, after], after, before)
    taken = suppressed(states, first=1, last=1, read=lambda x: x)
    assert taken.tolist() == [3.0, 0.0, 4.0, -3.0, 0.0, 0.0, 0.0]


def test_taking_the_suppressed_part_away_lowers_the_logits_that_it_spoke_for() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 32, generator=generator)
    head = torch.randn(64, 32, generator=generator)
    taken = suppressed(States([before, after], after, before), first=1, last=1, read=lambda x: x)
    contributions, lost = head * before, head * taken
    speaks_for = contributions > 0
    assert (lost[speaks_for] >= 0).all()
    assert (lost[~speaks_for] <= 0).all()
    assert (lost.abs() <= contributions.abs() + 1e-6).all()
    assert (taken != 0).any()
    assert (taken == 0).any()


def test_the_pseudo_inverse_of_a_full_head_undoes_the_head() -> None:
    """Why the definition needs neither: of the logits' change it only leaves the change of the states."""
    generator = torch.Generator().manual_seed(0)
    head, change = torch.randn(64, 32, generator=generator), torch.randn(32, generator=generator)
    assert (torch.linalg.pinv(head) @ (head @ change) - change).abs().max() < 1e-5


def test_gradients_through_suppressed_activations_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)

    def of_layers(stacked: Tensor) -> Tensor:
        states = States(list(stacked), stacked[-1], stacked[0])
        return suppressed(states, first=1, last=2, read=lambda x: functional.rms_norm(x, (5,)))

    assert torch.autograd.gradcheck(of_layers, (layers,))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_is_found_in_every_family(family: str) -> None:
    model = build_tiny_model(family)
    assert find_final_norm(model).__self__ is final_norm(model)  # type: ignore[attr-defined]
    assert not any(module._forward_hooks for module in model.modules()), "the watch is taken off again"


def test_a_model_without_a_final_norm_has_no_suppressed_activations(tiny_gpt2: PreTrainedModel) -> None:
    tiny_gpt2.base_model.register_forward_hook(
        lambda _module, _inputs, output: output.__class__(last_hidden_state=output.last_hidden_state + 1)
    )
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel does not end in a final norm.*use hidden\[...\]"):
        build_feedback("suppressed[-1]", tiny_gpt2)


# --- normalised -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_normalised_thought_has_the_scale_of_what_the_model_reads(family: str) -> None:
    """Also where the family scales embeddings inside the module, as Gemma does."""
    model = build_tiny_model(family)
    output = model.base_model(input_ids=torch.tensor([[3, 4, 5]]), output_hidden_states=True, use_cache=False)
    table = model.get_input_embeddings()(torch.arange(64))
    thought = build_feedback("normalised(hidden[-2])", model)(output, table[:1])
    scales = [x.detach().square().mean().sqrt().item() for x in (thought, table)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)


def test_the_scale_follows_the_weights_as_they_train(tiny_gpt2: PreTrainedModel) -> None:
    feedback = build_feedback("normalised", tiny_gpt2)
    output = tiny_gpt2.base_model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    before = feedback(output, torch.zeros(1, 32))
    tiny_gpt2.get_input_embeddings().weight.data.mul_(2)
    assert torch.allclose(feedback(output, torch.zeros(1, 32)), 2 * before)


def test_a_zero_vector_stays_zero_with_finite_gradients(tiny_gpt2: PreTrainedModel) -> None:
    feedback = build_feedback("normalised", tiny_gpt2)
    x = torch.zeros(1, 32, requires_grad=True)
    assert feedback.finish is not None
    thought = feedback.finish(x)
    thought.sum().backward()
    assert (thought == 0).all()
    assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]


# --- projection -------------------------------------------------------------------------------


def train_a_little(model: PreTrainedModel, feedback: Feedback) -> None:
    optimizer = torch.optim.AdamW([*model.parameters(), *feedback.parameters()], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        latent_nll(model, feedback, collate(make_views(), pad_id=0))[0].backward()
        optimizer.step()


@pytest.mark.parametrize("inner", ["hidden[-1]", "hidden[-2]", "input+suppressed[1:]"])
def test_a_projection_starts_as_the_form_inside_it(tiny_lm: PreTrainedModel, inner: str) -> None:
    batch = collate(make_views(), pad_id=0)
    plain, _ = latent_nll(tiny_lm, build_feedback(inner, tiny_lm), batch)
    projected, _ = latent_nll(tiny_lm, build_feedback(f"projection({inner})", tiny_lm), batch)
    assert torch.equal(plain, projected)


def test_a_projection_trains(tiny_lm: PreTrainedModel) -> None:
    feedback = build_feedback("projection", tiny_lm)
    before = {name: p.detach().clone() for name, p in feedback.named_parameters()}
    train_a_little(tiny_lm, feedback)
    names = ["finish.norm.weight", "finish.norm.bias", "finish.inner.weight", "finish.inner.bias"]
    assert [*before] == [*names, "finish.outer.weight", "finish.outer.bias"]
    for name, parameter in feedback.named_parameters():
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, before[name]), name


def test_a_projections_weights_are_a_function_of_the_seed() -> None:
    weights = [Projection(32, seed).inner.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_drawing_a_projection_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    Projection(32, 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("thought", [thought for thought in DEFINITIONS if thought != "hidden[2]"])
def test_other_forms_hold_no_weights_of_their_own(tiny_gpt2: PreTrainedModel, thought: str) -> None:
    assert not [*build_feedback(thought, tiny_gpt2).parameters()]


# --- files ------------------------------------------------------------------------------------


def test_a_trained_projection_comes_back_from_its_folder(tmp_path: Path, tiny_lm: PreTrainedModel) -> None:
    feedback = build_feedback("projection", tiny_lm)
    train_a_little(tiny_lm, feedback)
    save_feedback(tmp_path, feedback)
    tiny_lm.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    batch = collate(make_views(), pad_id=0)
    expected, _ = latent_nll(tiny_lm, feedback, batch)
    found, _ = latent_nll(model, load_feedback(tmp_path, "projection", model), batch)
    assert torch.equal(found, expected)
    assert oct((tmp_path / WEIGHTS_FILE).stat().st_mode)[-3:] == "644"


def test_forms_without_weights_write_no_file(tmp_path: Path, tiny_gpt2: PreTrainedModel) -> None:
    save_feedback(tmp_path, build_feedback("hidden[-1]", tiny_gpt2))
    assert not [*tmp_path.iterdir()]
    assert load_feedback(tmp_path, "hidden[-1]", tiny_gpt2).source is Feedback().source


def test_a_parent_without_a_projection_leaves_a_fresh_one_from_the_seed(
    tmp_path: Path, tiny_gpt2: PreTrainedModel
) -> None:
    fresh = load_feedback(tmp_path, "projection", tiny_gpt2, seed=3)
    assert torch.equal(fresh.finish.inner.weight, Projection(32, 3).inner.weight)  # type: ignore[union-attr]


def test_missing_damaged_or_foreign_weights_are_errors(tmp_path: Path, tiny_gpt2: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"thought.safetensors: the weights of thought 'projection' cannot be read"):
        load_feedback(tmp_path, "projection", tiny_gpt2)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="restores the checkpoint"):
        load_feedback(tmp_path, "projection", tiny_gpt2, seed=0)
    save_feedback(tmp_path, build_feedback("projection", build_tiny_model("gpt2", n_embd=16)))
    with pytest.raises(ValueError, match=r"not the weights of thought 'projection' with this model"):
        load_feedback(tmp_path, "projection", tiny_gpt2)


def test_bfloat16_weights_give_bfloat16_projections(tiny_gpt2: PreTrainedModel) -> None:
    model = tiny_gpt2.to(torch.bfloat16)
    feedback = build_feedback("projection", model)
    assert {p.dtype for p in feedback.parameters()} == {torch.bfloat16}
    nll, _ = latent_nll(model, feedback, collate(make_views(), pad_id=0))
    nll.backward()
    assert torch.isfinite(nll)


@pytest.mark.parametrize("thought", ["hidden[-2]", "normalised", "projection", "input+suppressed[0.5:]"])
def test_forms_work_under_autocast(tiny_lm: PreTrainedModel, thought: str) -> None:
    feedback = build_feedback(thought, tiny_lm)
    batch = collate(make_views(), pad_id=0)
    exact, _ = latent_nll(tiny_lm, feedback, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = latent_nll(tiny_lm, feedback, batch)
    rounded.backward()
    assert rounded.item() == pytest.approx(exact.item(), rel=0.1)
