"""Weight gradients formed once are those that autograd forms pass by pass, however backward is called."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from coconut.data.collator import collate
from coconut.data.views import IGNORED, View
from coconut.model.fast import gates, layers
from coconut.model.fast.gates import GatedLinear
from coconut.model.fast.layers import BatchLayers
from coconut.model.fast.tied import Rows
from coconut.model.feedback import Feedback
from coconut.model.latent import latent_nll
from coconut.model.passes import PassOptions
from marks import slow_but
from tiny_models import FAMILIES, VOCAB_SIZE, build_tiny_model
from ways import STORE, hidden_states, with_thresholds

ALWAYS = STORE.thresholds
NARROW = with_thresholds(STORE, min_width=1 << 30)
"""Our layers on the library's cache, every weight counting as large."""


def batch_layers_of(model: nn.Module, **options: bool) -> BatchLayers:
    return BatchLayers(model, thresholds=ALWAYS, **options)


class Chain(nn.Module):
    """Linear layers of both kinds, read several times over, like a decoder in passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.second = Conv1D(5, 6)
        self.third = nn.Linear(5, 4, bias=False)
        nn.init.normal_(self.second.bias)

    def get_output_embeddings(self) -> None:
        return None

    def get_input_embeddings(self) -> None:
        return None

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(input)))))
        return output


def read_in_passes(chain: Chain, batch_layers: BatchLayers | None) -> Tensor:
    """Each pass reads what the one before has left; rows and columns differ from pass to pass."""
    generator = torch.Generator().manual_seed(1)
    carried, total = torch.zeros(4), torch.zeros(())
    for shape in [(3, 7, 4), (3, 1, 4), (3, 1, 4), (2, 5, 4)]:
        input = torch.randn(shape, generator=generator) + carried
        if batch_layers is None:
            output = chain(input)
        else:
            with batch_layers.active():
                output = chain(input)
        carried = output.mean(dim=(0, 1))
        total = total + output.square().sum()
    return total


def gradients(chain: Chain, loss: Tensor) -> dict[str, Tensor]:
    chain.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in chain.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= tolerance * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("saves_memory", [False, True])
def test_gradients_are_those_of_the_plain_layers(saves_memory: bool) -> None:
    chain = Chain()
    expected = gradients(chain, read_in_passes(chain, None))
    found = gradients(chain, read_in_passes(chain, batch_layers_of(chain, saves_memory=saves_memory)))
    assert len(expected) == 5
    assert_close(found, expected)


def test_a_weight_is_multiplied_once_for_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain()
    shapes: list[tuple[int, int]] = []

    def counting(input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: int) -> Tensor:
        product = functional.linear(input, weight, bias)
        shapes.append(tuple(product.shape))
        return product

    loss = read_in_passes(chain, batch_layers_of(chain))
    monkeypatch.setattr(gates, "linear", counting)
    loss.backward()
    assert [shapes.count(tuple(weight.shape)) for weight in chain.parameters() if weight.ndim == 2] == [1, 1, 1]


def test_gradients_of_several_batches_add_up() -> None:
    chain = Chain()
    expected = {name: 2 * g for name, g in gradients(chain, read_in_passes(chain, None)).items()}
    chain.zero_grad()
    for _ in range(2):
        read_in_passes(chain, batch_layers_of(chain)).backward()
    assert_close({name: p.grad for name, p in chain.named_parameters()}, expected)


def test_a_second_backward_through_the_same_graph_gives_the_same_again() -> None:
    chain = Chain()
    expected = gradients(chain, read_in_passes(chain, None))
    loss = read_in_passes(chain, batch_layers_of(chain))
    loss.backward(retain_graph=True)
    assert_close(gradients(chain, loss), expected)


def test_a_backward_that_stops_short_of_the_weights_leaves_nothing_behind() -> None:
    chain = Chain()
    batch_layers = batch_layers_of(chain)
    input = torch.randn(2, 3, 4, requires_grad=True)
    with batch_layers.active():
        loss = chain(input).square().sum() + chain(input[:, :1]).sum()
    partial, *_ = torch.autograd.grad(loss, input, retain_graph=True)
    found = gradients(chain, loss)
    plain = chain(input).square().sum() + chain(input[:, :1]).sum()
    assert_close(found, gradients(chain, plain))
    whole, *_ = torch.autograd.grad(chain(input).square().sum() + chain(input[:, :1]).sum(), input)
    assert (partial - whole).abs().max() < 1e-5


def test_gradients_can_be_asked_for_without_being_accumulated() -> None:
    chain = Chain()
    expected = gradients(chain, read_in_passes(chain, None))
    chain.zero_grad()
    found = torch.autograd.grad(read_in_passes(chain, batch_layers_of(chain)), list(chain.parameters()))
    assert_close(dict(zip(expected, found, strict=True)), expected)
    assert all(p.grad is None for p in chain.parameters())


@pytest.mark.parametrize("frozen", ["first.weight", "first.bias", "second.weight", "second.bias", "third.weight"])
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(frozen: str) -> None:
    chain = Chain()
    dict(chain.named_parameters())[frozen].requires_grad_(False)
    expected = gradients(chain, read_in_passes(chain, None))
    assert frozen not in expected
    assert_close(gradients(chain, read_in_passes(chain, batch_layers_of(chain))), expected)


def test_a_weight_that_two_layers_share_gets_both_shares() -> None:
    chain = Chain()
    tied = Chain()
    for model in (chain, tied):
        model.third = nn.Linear(5, 4, bias=False)
        torch.manual_seed(3)
        model.first.weight = nn.Parameter(torch.randn(6, 4))
        model.third.weight = nn.Parameter(torch.randn(4, 5))
        model.fourth = nn.Linear(4, 4, bias=False)
        model.fifth = nn.Linear(4, 4, bias=False)
        model.fifth.weight = model.fourth.weight
    input = torch.randn(2, 3, 4)
    expected = gradients(chain, chain.fifth(chain.fourth(input).tanh()).square().sum())
    batch_layers = batch_layers_of(tied)
    tied.load_state_dict(chain.state_dict())
    with batch_layers.active():
        loss = tied.fifth(tied.fourth(input).tanh()).square().sum()
    assert_close(gradients(tied, loss), expected)


def test_hooks_of_a_weight_see_its_whole_gradient_once() -> None:
    chain = Chain()
    expected = gradients(chain, read_in_passes(chain, None))
    seen: list[Tensor] = []
    chain.second.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    read_in_passes(chain, batch_layers_of(chain)).backward()
    assert len(seen) == 1
    assert (seen[0] - expected["second.weight"]).abs().max() < 1e-4


def test_autocast_computes_in_bf16_and_gives_gradients_in_float32() -> None:
    chain = Chain()
    exact = gradients(chain, read_in_passes(chain, None))
    with torch.autocast("cpu", torch.bfloat16):
        plain = read_in_passes(chain, None)
        expected = gradients(chain, plain)
        loss = read_in_passes(chain, batch_layers_of(chain))
    found = gradients(chain, loss)
    assert abs(loss.item() - plain.item()) < 0.02 * abs(plain.item())
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        scale = float(gradient.abs().max())
        ours, theirs = (float((g[name] - gradient).abs().max()) / scale for g in (found, expected))
        assert ours < max(0.03, 1.5 * theirs), name


def test_a_gradient_with_a_graph_is_the_same_and_a_second_derivative_is_refused() -> None:
    """The factors are kept without the graph that leads to them: a second derivative would be wrong in silence."""
    chain = Chain()
    input = torch.randn(3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(chain(input).square().sum(), input)
    with batch_layers_of(chain).active():
        loss = chain(input).square().sum()
    (found,) = torch.autograd.grad(loss, input, create_graph=True)
    assert (found - expected).abs().max() < 1e-5
    with pytest.raises(RuntimeError, match="differentiate twice"):
        found.sum().backward()


def test_a_weight_that_changes_before_the_backward_pass_is_noticed() -> None:
    chain = Chain()
    with batch_layers_of(chain).active():
        loss = chain(torch.randn(3, 4)).sum()
    with torch.no_grad():
        chain.second.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified inplace|modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("max_kept", [1, 40, 60, 200])
def test_no_more_is_kept_than_was_allowed(max_kept: int) -> None:
    torch.manual_seed(0)
    chain = Chain()
    factors = GatedLinear(chain.first, max_kept, ALWAYS).factors
    passes = [(torch.randn(rows, 4), torch.randn(rows, 6)) for rows in (1, 3, 2, 7, 1, 1, 4)]
    for input, gradient in passes:
        factors.add(input, gradient)
        assert sum(kept.numel() for kept in (*factors.inputs, *factors.gradients)) <= max_kept
    weight, bias = factors.take()
    inputs, gradients = (torch.cat(parts) for parts in zip(*passes, strict=True))
    assert (weight - gradients.T @ inputs).abs().max() < 1e-5
    assert (bias - gradients.sum(dim=0)).abs().max() < 1e-5
    assert factors.take() is None


def some_views() -> list[View]:
    """Thoughts, repeated tokens, padding, and a question that holds the id of padding as well."""
    views = []
    for length, target in ((7, 4), (3, 2), (7, 6)):
        ids = [(5 * i) % 13 for i in range(length)] + [2, 2, 2] + [7] * target
        labels = [IGNORED] * (length + 3) + [7] * target
        views.append(View(ids, labels, prefix_length=length, num_slots=3, num_thoughts=3))
    return views


def loss_of(model: PreTrainedModel, options: PassOptions = NARROW, **changes: Any) -> Tensor:
    nll, num_tokens = latent_nll(model, Feedback(), collate(some_views(), pad_id=0), replace(options, **changes))
    return nll / num_tokens


def tied_model(family: str) -> PreTrainedModel:
    model = build_tiny_model(family, tie_word_embeddings=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return model


def of_the_librarys_layers(model: PreTrainedModel) -> dict[str, Tensor]:
    return gradients(model, loss_of(model, PassOptions(fast=False)))


@pytest.mark.parametrize("chunk", [1 << 25, 3 * VOCAB_SIZE], ids=["at-once", "in-chunks"])
@pytest.mark.parametrize("checkpoint_activations", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "family", slow_but(["gpt2", "gemma3_text"], ["gpt2", "llama", "qwen2", "gemma", "gemma3_text"])
)
def test_tied_embeddings_get_the_gradient_of_both_uses(family: str, checkpoint_activations: bool, chunk: int) -> None:
    model = tied_model(family)
    expected = of_the_librarys_layers(model)
    changes = {"checkpoint_activations": checkpoint_activations, "max_logits": chunk}
    for _ in range(2):
        found = gradients(model, loss_of(model, STORE, **changes))
        assert_close(found, expected)


def test_an_embedding_of_padding_gets_no_gradient_of_its_own() -> None:
    model = tied_model("llama")
    model.get_input_embeddings().padding_idx = 5  # A token of the questions.
    expected = of_the_librarys_layers(model)
    assert_close(gradients(model, loss_of(model)), expected)
    model.get_input_embeddings().padding_idx = None
    with pytest.raises(AssertionError, match="embed_tokens"):
        assert_close(gradients(model, loss_of(model)), expected)


def test_tied_embeddings_in_bf16_autocast() -> None:
    model = tied_model("gpt2")
    exact = of_the_librarys_layers(model)["transformer.wte.weight"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    found = gradients(model, loss)["transformer.wte.weight"]
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_tied_embeddings_whose_head_is_not_asked_for_a_loss() -> None:
    model = tied_model("gpt2")
    batch = collate(some_views(), pad_id=0)
    hidden = hidden_states(model, Feedback(), batch, NARROW)
    found = gradients(model, hidden[:, -1].square().sum())
    hidden = hidden_states(model, Feedback(), batch, PassOptions(fast=False))
    assert_close(found, gradients(model, hidden[:, -1].square().sum()))


def test_tied_embeddings_give_the_same_again_and_their_hooks_see_one_gradient() -> None:
    model = tied_model("gpt2")
    name, weight = "transformer.wte.weight", model.transformer.wte.weight
    expected = of_the_librarys_layers(model)[name]
    loss = loss_of(model)
    torch.autograd.grad(loss, model.transformer.wpe.weight, retain_graph=True)  # Stops short of the gate.
    model.zero_grad()
    seen: list[Tensor] = []
    weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    loss.backward(retain_graph=True)
    (asked_for,) = torch.autograd.grad(loss, weight)
    for gradient in (weight.grad, asked_for):
        assert_close({name: gradient}, {name: expected})
    assert len(seen) == 2


@pytest.mark.parametrize("checkpoint_activations", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_graph_can_be_asked_again(family: str, checkpoint_activations: bool) -> None:
    model = tied_model(family)
    expected = of_the_librarys_layers(model)
    model.zero_grad()
    loss = loss_of(model, STORE, checkpoint_activations=checkpoint_activations)
    middle = next(parameter for name, parameter in model.named_parameters() if "mlp" in name)
    torch.autograd.grad(loss, middle, retain_graph=True)  # Not as far as the embeddings.
    loss.backward(retain_graph=True)
    assert_close({name: p.grad.clone() for name, p in model.named_parameters()}, expected)
    assert_close(gradients(model, loss), expected)


def test_what_a_failed_backward_has_left_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tied_model("gpt2")
    expected = of_the_librarys_layers(model)
    loss = loss_of(model)
    failing = {"now": True}
    add_to = Rows.add_to

    def fail_once(rows: Rows, gradient: Tensor) -> None:
        if failing.pop("now", False):
            raise RuntimeError("out of memory")
        add_to(rows, gradient)

    monkeypatch.setattr(Rows, "add_to", fail_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.backward(retain_graph=True)
    assert_close(gradients(model, loss), expected)


def test_the_gradient_of_repeated_tokens_is_the_same_to_the_bit_on_two_threads() -> None:
    rows = Rows(padding_idx=None)
    torch.manual_seed(0)
    ids, given = torch.randint(0, 8, (4000,)), torch.randn(4000, 256)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sums = []
        for _ in range(20):
            rows.kept = [(ids, given)]
            sums.append(torch.zeros(500, 256))
            rows.add_to(sums[-1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(total, sums[0]) for total in sums)
    expected = torch.zeros(500, 256, dtype=torch.float64).index_add_(0, ids, given.double())
    assert (sums[0] - expected).abs().max() < 1e-4


def test_a_model_without_layers_to_checkpoint_runs_its_passes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "GradientCheckpointingLayer", type(None))
    model = tied_model("gpt2")
    expected = of_the_librarys_layers(model)
    runs: list[int] = []
    model.transformer.h[0].attn.register_forward_pre_hook(lambda *_: runs.append(1))
    loss = loss_of(model, STORE, checkpoint_activations=True)
    num_passes = len(runs)
    assert_close(gradients(model, loss), expected)
    assert len(runs) == 2 * num_passes


def test_frozen_tied_embeddings_get_none() -> None:
    model = tied_model("gpt2")
    model.transformer.wte.weight.requires_grad_(False)
    expected = of_the_librarys_layers(model)
    found = gradients(model, loss_of(model))
    assert "transformer.wte.weight" not in found
    assert_close(found, expected)


def test_one_gradient_stands_for_tied_embeddings_and_head() -> None:
    """Counted among the allocations, for that is what it is for; autograd makes three of this size."""
    model = build_tiny_model("gpt2", vocab_size=5003)
    loss_of(model).backward()
    loss = loss_of(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss.backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    num_bytes = 4 * model.transformer.wte.weight.numel()
    assert sum(event.nbytes() == num_bytes for event in events) == 1


def test_nothing_is_kept_when_backward_is_never_called() -> None:
    chain = Chain()
    batch_layers = batch_layers_of(chain)
    loss = read_in_passes(chain, batch_layers)
    factors = [weakref.ref(forward.factors) for _, forward in batch_layers.forwards]
    gc.disable()
    try:
        del batch_layers, loss
        assert [reference() for reference in factors] == [None] * 3
    finally:
        gc.enable()


def test_nothing_is_kept_after_a_backward_that_stopped_short() -> None:
    chain = Chain()
    batch_layers = batch_layers_of(chain)
    input = torch.randn(2, 3, 4, requires_grad=True)
    with batch_layers.active():
        loss = chain(input).sum()
    torch.autograd.grad(loss, input)
    factors = [weakref.ref(forward.factors) for _, forward in batch_layers.forwards]
    gc.disable()
    try:
        del batch_layers, loss
        assert [reference() for reference in factors] == [None] * 3
    finally:
        gc.enable()


def test_a_model_is_as_before_when_the_block_ends_even_by_an_error() -> None:
    chain = Chain()
    is_replaced: list[bool] = []

    def fail() -> None:
        with batch_layers_of(chain).active():
            is_replaced.append("forward" in chain.first.__dict__)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert is_replaced == [True]
    assert all("forward" not in module.__dict__ for module in chain.modules())


def test_a_forward_that_somebody_else_has_replaced_stays() -> None:
    chain = Chain()
    chain.first.forward = lambda input: input.new_ones(*input.shape[:-1], 6)
    with batch_layers_of(chain).active():
        assert torch.equal(chain.first(torch.zeros(1, 4)), torch.ones(1, 6))
    assert "forward" in chain.first.__dict__


def test_gpt2s_activation_is_the_same_function_in_one_operation() -> None:
    input = torch.linspace(-8, 8, 999, dtype=torch.float64, requires_grad=True)
    expected, found = NewGELUActivation()(input), layers.fused_gelu(input)
    assert (found - expected).abs().max() < 1e-14
    slopes = [torch.autograd.grad(output.sum(), input)[0] for output in (expected, found)]
    assert (slopes[0] - slopes[1]).abs().max() < 1e-14


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_logits_with_them(family: str) -> None:
    model: PreTrainedModel = build_tiny_model(family)
    input_ids = torch.arange(2, 14).view(2, 6)
    expected = model(input_ids=input_ids).logits
    batch_layers = batch_layers_of(model)
    assert len(batch_layers.forwards) >= 8, "the family's linear layers must be among them"
    with batch_layers.active():
        found = model(input_ids=input_ids).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_query_key_and_value_convert_their_input_once() -> None:
    """And again where it was written to, or was converted without a graph."""
    torch.manual_seed(0)
    conversion, weights = gates.Conversion(), [nn.Linear(8, 8) for _ in range(3)]
    ours = [GatedLinear(weight, None, ALWAYS, conversion) for weight in weights]
    input = torch.randn(4, 8).requires_grad_() * 1  # No leaf: torch would take it for a weight.
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            conversion.of(input)
        found = [layer(input) for layer in ours]
        assert conversion.of(input) is conversion.of(input)
        (gradient,) = torch.autograd.grad(sum(one.float().square().sum() for one in found), input)
        expected = [weight(input) for weight in weights]
        (wanted,) = torch.autograd.grad(sum(one.float().square().sum() for one in expected), input)
        assert torch.equal(torch.stack(found), torch.stack(expected))
        assert gradient.dtype == torch.float32
        assert (gradient - wanted).abs().max() < 0.02 * wanted.abs().max()
        with torch.no_grad():
            input.add_(1)
            assert torch.equal(ours[0](input), weights[0](input))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 1, 8), (2, 3, 4, 8)])
def test_what_a_layer_returns_may_be_written_to(shape: tuple[int, ...], has_bias: bool) -> None:
    """As some models do. The input may have any number of dimensions, and lie in memory as it likes."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 5, bias=has_bias)
    for min_multiplications in (0, 1 << 60):
        thresholds = replace(ALWAYS, min_multiplications=min_multiplications)
        for input in (torch.randn(shape), torch.randn(*shape[:-1], 16)[..., ::2]):
            input.requires_grad_()
            found = GatedLinear(linear, None, thresholds)(input * 1)
            found += 1
            found.clamp_(min=0)
            wanted = (linear(input * 1) + 1).clamp(min=0)
            assert found.shape == wanted.shape
            for ours, theirs in zip(
                *(torch.autograd.grad(one.sum(), [input, *linear.parameters()]) for one in (found, wanted)), strict=True
            ):
                assert (ours - theirs).abs().max() < 1e-5
