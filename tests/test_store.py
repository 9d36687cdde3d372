"""The store of keys and values equals the library's cache, in every family, with dropout, and however backward runs."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import oracle
from coconut.data.collator import Batch, collate
from coconut.model.choice import open_passes
from coconut.model.fast.attention import LayerColumns
from coconut.model.fast.passes import can_store
from coconut.model.fast.store import ColumnStore, CurrentPass
from coconut.model.feedback import Feedback
from coconut.model.latent import latent_nll, read_columns
from coconut.model.passes import PassOptions
from test_generation import make_prompts
from test_latent import gradients, make_views
from tiny_models import FAMILIES, build_tiny_model
from ways import STORE, WAYS, with_thresholds


@pytest.fixture(params=["store, torch's kernel", "store, own attention"])
def options(request: pytest.FixtureRequest) -> PassOptions:
    """Passes of several columns through torch's kernel and through ours."""
    return WAYS[request.param]


@pytest.fixture
def stores() -> Iterator[list["weakref.ref[ColumnStore]"]]:
    """Of the stores that were made; the garbage collector does not run, so a cycle is a leak."""
    made: list[weakref.ref[ColumnStore]] = []
    begin = ColumnStore.begin

    def watched(store: ColumnStore, start: int, stop: int) -> CurrentPass:
        if start == 0:
            made.append(weakref.ref(store))
        return begin(store, start, stop)

    ColumnStore.begin = watched
    gc.collect()
    gc.disable()
    yield made
    gc.enable()
    ColumnStore.begin = begin


def buffers_alive() -> int:
    return sum(isinstance(thing, LayerColumns) for thing in gc.get_objects())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_full_recomputation(family: str, options: PassOptions) -> None:
    model = build_tiny_model(family)
    views = make_views((3, 0, 2, 3), seed=4)
    slow, num_tokens = oracle.nll(model, views)
    expected = gradients(model, slow / num_tokens)
    fast, _ = latent_nll(model, Feedback(), collate(views, pad_id=0), options)
    found = gradients(model, fast / num_tokens)
    assert abs((fast - slow).item()) / num_tokens < 1e-6
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * max(1.0, gradient.abs().max().item()), name


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_every_family_but_the_one_with_capped_scores_uses_the_store(family: str) -> None:
    assert can_store(build_tiny_model(family), 100, STORE)


def test_a_sequence_that_leaves_the_sliding_window_uses_the_librarys_cache(options: PassOptions) -> None:
    model = build_tiny_model("mistral", sliding_window=8)
    assert (can_store(model, 7, STORE), can_store(model, 8, STORE)) == (True, False)
    views = make_views((3, 0, 2), seed=4)
    slow, _ = oracle.nll(model, views)
    fast, _ = latent_nll(model, Feedback(), collate(views, pad_id=0), options)
    assert abs((fast - slow).item()) < 1e-4


def test_other_attention_than_the_default_uses_the_librarys_cache(tiny_gpt2: PreTrainedModel) -> None:
    tiny_gpt2.set_attn_implementation("eager")
    assert not can_store(tiny_gpt2, 8, STORE)


def read(model: PreTrainedModel, batch: Batch, options: PassOptions, **changes: Any) -> Tensor:
    nll, _ = latent_nll(model, Feedback(), batch, replace(options, **changes))
    return nll


def test_the_config_is_as_before_even_after_an_error(tiny_gpt2: PreTrainedModel, options: PassOptions) -> None:
    batch = collate(make_views((2, 1)), pad_id=0)

    def fail(*_: object) -> None:
        raise KeyError

    handle = tiny_gpt2.transformer.h[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        read(tiny_gpt2, batch, options)
    handle.remove()
    assert tiny_gpt2.config._attn_implementation == "sdpa"
    assert torch.isfinite(read(tiny_gpt2, batch, options))


def test_a_second_backward_through_the_same_graph_gives_the_same_again(
    tiny_lm: PreTrainedModel, options: PassOptions
) -> None:
    batch = collate(make_views((3, 1, 2)), pad_id=0)
    nll = read(tiny_lm, batch, options)
    tiny_lm.zero_grad()
    nll.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in tiny_lm.named_parameters() if p.grad is not None}
    second = gradients(tiny_lm, nll)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_backward_that_stopped_on_the_way_leaves_nothing_behind(
    tiny_lm: PreTrainedModel, options: PassOptions
) -> None:
    batch = collate(make_views((3, 1, 2)), pad_id=0)
    expected = gradients(tiny_lm, read(tiny_lm, batch, options))
    seen: list[Tensor] = []
    handle = tiny_lm.base_model.register_forward_hook(lambda _m, _i, output: seen.append(output.last_hidden_state))
    nll = read(tiny_lm, batch, options)
    handle.remove()
    torch.autograd.grad(nll, seen[2], retain_graph=True)
    found = gradients(tiny_lm, nll)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5, name


def test_thoughts_that_are_cut_loose_pass_no_gradient_but_their_keys_do(
    tiny_lm: PreTrainedModel, options: PassOptions
) -> None:
    class Detached(Feedback):
        def forward(self, output, input_BD):  # type: ignore[no-untyped-def]
            return super().forward(output, input_BD).detach()

    batch = collate(make_views((3, 3)), pad_id=0)
    nll, _ = latent_nll(tiny_lm, Detached(), batch, options)
    found = gradients(tiny_lm, nll)
    nll, _ = latent_nll(tiny_lm, Detached(), batch, PassOptions(fast=False))
    expected = gradients(tiny_lm, nll)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * max(1.0, gradient.abs().max().item()), name


def test_gradients_with_dropout_are_those_of_the_same_function(tiny_lm: PreTrainedModel, options: PassOptions) -> None:
    """Central differences along a random direction, with the same draws each time; the loss is a float32 sum."""
    model = tiny_lm.double()
    for module in model.modules():
        if hasattr(module, "attn_dropout"):
            module.attn_dropout.p = 0.3
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    model.train()
    batch = collate(make_views((2, 1)), pad_id=0)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return read(model, batch, options)

    found = gradients(model, loss())
    generator = torch.Generator().manual_seed(0)
    directions = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in model.named_parameters()
    }

    @torch.no_grad()
    def moved(size: float) -> float:
        for name, parameter in model.named_parameters():
            parameter.add_(directions[name], alpha=size)
        with torch.enable_grad():  # The same kernels, and so the same draws.
            value = loss().item()
        for name, parameter in model.named_parameters():
            parameter.sub_(directions[name], alpha=size)
        return value

    model.eval()
    without = loss().item()
    model.train()
    slope = (moved(3e-4) - moved(-3e-4)) / 6e-4
    expected = sum((found[name] * directions[name]).sum().item() for name in found)
    assert abs(loss().item() - without) > 1e-3, "dropout must do something"
    assert abs(slope - expected) < 2e-3 * abs(slope)


def test_bf16_autocast_is_as_close_to_float32_as_the_librarys_cache(
    tiny_lm: PreTrainedModel, options: PassOptions
) -> None:
    batch = collate(make_views((3, 1, 2)), pad_id=0)
    exact = gradients(tiny_lm, read(tiny_lm, batch, options))

    def errors(way: PassOptions) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            nll = read(tiny_lm, batch, way)
        found = gradients(tiny_lm, nll)
        return sum((found[name] - exact[name]).norm().item() ** 2 for name in exact) ** 0.5

    assert errors(options) < 1.5 * errors(PassOptions(fast=False))


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
@pytest.mark.parametrize("way", WAYS)
def test_checkpointed_activations_give_the_same_gradients(tiny_lm: PreTrainedModel, dropout: float, way: str) -> None:
    options = WAYS[way]
    for module in tiny_lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    tiny_lm.train()
    batch = collate(make_views((3, 1, 2)), pad_id=0)

    def run(checkpoint_activations: bool) -> tuple[float, dict[str, Tensor]]:
        torch.manual_seed(7)
        nll = read(tiny_lm, batch, options, checkpoint_activations=checkpoint_activations)
        return nll.item(), gradients(tiny_lm, nll)

    expected, wanted = run(False)
    found, got = run(True)
    assert found == expected
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() < 1e-5 * max(1.0, gradient.abs().max().item()), name


def test_checkpointed_activations_run_every_pass_again_but_those_of_one_column(
    tiny_gpt2: PreTrainedModel, options: PassOptions
) -> None:
    passes: list[int] = []
    tiny_gpt2.transformer.h[0].attn.register_forward_pre_hook(lambda *_: passes.append(1))
    nll = read(tiny_gpt2, collate(make_views((3, 3)), pad_id=0), options, checkpoint_activations=True)
    assert len(passes) == 4
    nll.backward()
    assert len(passes) == 6


@pytest.mark.slow
def test_a_batch_leaves_nothing_behind(
    tiny_lm: PreTrainedModel, stores: list["weakref.ref[ColumnStore]"], options: PassOptions
) -> None:
    batch = collate(make_views((3, 1, 2)), pad_id=0)
    before = buffers_alive()
    for checkpoint_activations in (False, True):
        nll = read(tiny_lm, batch, options, checkpoint_activations=checkpoint_activations)
        nll.backward()
        del nll
        read(tiny_lm, batch, options, checkpoint_activations=checkpoint_activations)  # No backward.
        nll = read(tiny_lm, batch, options, checkpoint_activations=checkpoint_activations)
        torch.autograd.grad(nll, tiny_lm.get_output_embeddings().weight, retain_graph=True)  # Half a backward.
        del nll
    assert len(stores) == 6
    assert [reference() for reference in stores] == [None] * 6
    assert buffers_alive() == before


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_activations", [False, True], ids=["kept", "checkpointed"])
def test_a_pass_that_fails_leaves_nothing_behind(
    tiny_lm: PreTrainedModel,
    stores: list["weakref.ref[ColumnStore]"],
    checkpoint_activations: bool,
    options: PassOptions,
) -> None:
    batch = collate(make_views((3, 1, 2)), pad_id=0)
    before = buffers_alive()
    passes: list[int] = []

    def run_out_of_memory(*_: object) -> None:
        passes.append(1)
        if len(passes) == 3:
            raise RuntimeError("out of memory")

    mlp = next(module for name, module in tiny_lm.named_modules() if name.endswith("mlp"))
    hook = mlp.register_forward_pre_hook(run_out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        read(tiny_lm, batch, options, checkpoint_activations=checkpoint_activations)
    hook.remove()
    gc.collect()
    assert [reference() for reference in stores] == [None]
    assert buffers_alive() == before


def test_selected_rows_read_on_as_if_alone(tiny_lm: PreTrainedModel, options: PassOptions) -> None:
    batch = collate(make_views((2, 2, 2)), pad_id=0)
    passes = open_passes(tiny_lm, batch, Feedback(), options, num_further_columns=1)
    with torch.no_grad():
        read_columns(passes, Feedback(), batch)
        passes.select(torch.tensor([2, 0]))
    assert isinstance(passes.cache, ColumnStore)
    assert passes.cache.layers_read[1].keys_BKCd.shape[0] == 2
    assert torch.equal(passes.cache.is_real_BC[:, :-1], batch.attention_mask_BT[[2, 0]].bool())


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """Memory that is allocated and not filled holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("is_bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [(3, 9, 4), (5, 5, 5)], ids=["padded", "even"])
def test_decoding_that_reads_the_whole_store_sees_what_is_written(
    tiny_lm: PreTrainedModel, lengths: tuple[int, ...], is_bf16: bool
) -> None:
    batch = collate(make_prompts(2, lengths), pad_id=0)
    ids_TB = torch.randint(2, 60, (9, len(lengths)), generator=torch.Generator().manual_seed(3))
    num_columns = batch.input_ids_BT.shape[1] + len(ids_TB)

    def hidden(min_full: float) -> Tensor:
        options = with_thresholds(STORE, min_full=min_full)
        passes = open_passes(tiny_lm, batch, Feedback(), options, num_further_columns=len(ids_TB))
        seen, rows = [read_columns(passes, Feedback(), batch)[:, -1]], [0, 1, 2]
        for step, ids_B in enumerate(ids_TB):
            if step == 5:
                rows = [2, 0]
                passes.select(torch.tensor(rows))
            positions_B = batch.position_ids_BT[rows, -1] + step + 1
            output = passes.read(passes.embed(ids_B[rows][:, None]), positions_B[:, None])
            seen.append(output.last_hidden_state[:, -1])
        assert passes.cache.begin(0, 1).num_attended == (num_columns if min_full == 0 else 1)
        return torch.cat(seen)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        expected, found = hidden(2), hidden(0)
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= (1e-2 if is_bf16 else 1e-5) * expected.abs().max()
