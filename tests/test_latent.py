"""The proof obligations of the mathematics: the fast path equals full recomputation, row by row."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

import oracle
from coconut.data.collator import Batch, collate
from coconut.data.layouts import Layout
from coconut.data.views import IGNORED, MarkerIds, View, build_view
from coconut.model.choice import open_passes
from coconut.model.fast.passes import StorePasses
from coconut.model.feedback import Feedback
from coconut.model.latent import latent_nll, supervised_nll
from coconut.model.passes import PassOptions, PlainPasses
from marks import slow_but
from ways import STORE, WAYS, hidden_states

MARKERS = MarkerIds(60, 61, 62)


@pytest.fixture(params=WAYS)
def options(request: pytest.FixtureRequest) -> PassOptions:
    """Each way to read a batch in turn."""
    return WAYS[request.param]


def make_views(num_latents: tuple[int, ...], *, markers: bool = False, seed: int = 0) -> list[View]:
    """Rows with questions, steps and answers of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(2, 60, (length,), generator=generator).tolist()

    return [
        build_view(
            draw(2, 7),
            [draw(1, 4), draw(1, 4)],
            draw(2, 4),
            layout=Layout(index % 3, n, markers=markers),
            markers=MARKERS,
        )
        for index, n in enumerate(num_latents)
    ]


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_loss_and_gradients(
    model: PreTrainedModel, views: list[View], batch: Batch, options: PassOptions
) -> None:
    slow, slow_count = oracle.nll(model, views)
    slow_gradients = gradients(model, slow / slow_count)
    fast, fast_count = latent_nll(model, Feedback(), batch, options)
    fast_gradients = gradients(model, fast / fast_count)
    assert fast_count == slow_count
    assert abs(float(fast / fast_count - slow / slow_count)) < 1e-6
    assert fast_gradients.keys() == slow_gradients.keys()
    for name, gradient in slow_gradients.items():
        assert (fast_gradients[name] - gradient).abs().max() < 1e-5, name


@pytest.mark.parametrize("markers", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["bare", "markers"])
@pytest.mark.parametrize(
    "num_latents",
    slow_but([(0, 0), (3, 1), (0, 2, 4, 1)], [(0, 0), (1, 1), (2, 2, 2), (3, 1), (0, 2, 4, 1), (6,)]),
    ids=["none", "one", "equal", "ragged", "ragged-with-none", "alone"],
)
def test_cached_forward_equals_full_recomputation(
    tiny_lm: PreTrainedModel, num_latents: tuple[int, ...], markers: bool, options: PassOptions
) -> None:
    views = make_views(num_latents, markers=markers)
    assert_same_loss_and_gradients(tiny_lm, views, collate(views, pad_id=0), options)


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_unaligned_rows_give_the_same_numbers(tiny_lm: PreTrainedModel, side: str, options: PassOptions) -> None:
    views = make_views((2, 3, 0), seed=3)
    alone = [collate([view], pad_id=0)[:5] for view in views]
    width = max(batch[0].shape[1] for batch in alone)

    def pad(row: torch.Tensor, value: int) -> torch.Tensor:
        filler = row.new_full((1, width - row.shape[1]), value)
        return torch.cat([filler, row] if side == "left" else [row, filler], dim=1)

    fillers = (0, 0, 0, 0, IGNORED)
    columns = zip(*alone, strict=True)
    batch = Batch(
        *(torch.cat([pad(row, filler) for row in rows]) for rows, filler in zip(columns, fillers, strict=True))
    )
    assert_same_loss_and_gradients(tiny_lm, views, batch, options)


def test_a_row_scores_the_same_alone_and_in_a_padded_batch(tiny_lm: PreTrainedModel, options: PassOptions) -> None:
    views = make_views((2, 0, 5, 3), seed=1)
    together, _ = latent_nll(tiny_lm, Feedback(), collate(views, pad_id=0), options)
    alone = [latent_nll(tiny_lm, Feedback(), collate([view], pad_id=0), options)[0] for view in views]
    assert abs(float(together - sum(alone))) < 1e-4


def test_without_latents_it_is_the_plain_language_model(tiny_lm: PreTrainedModel, options: PassOptions) -> None:
    views = make_views((0, 0, 0), seed=2)
    batch = collate(views, pad_id=0)
    nll, num_tokens = latent_nll(tiny_lm, Feedback(), batch, options)
    plain = tiny_lm(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        position_ids=batch.position_ids_BT,
        labels=batch.labels_BT,
    )
    assert abs(float(nll / num_tokens - plain.loss)) < 1e-6


def test_gradients_reach_the_question_only_through_the_thoughts(tiny_lm: PreTrainedModel, options: PassOptions) -> None:
    """The second thought depends on the question's embeddings; cutting it loose changes their gradient."""
    batch = collate(make_views((2,)), pad_id=0)
    embeddings = tiny_lm.get_input_embeddings()

    class Detached(Feedback):
        def forward(self, output, input_BD):  # type: ignore[no-untyped-def]
            return super().forward(output, input_BD).detach()

    def question_gradient(feedback: Feedback) -> torch.Tensor:
        nll, _ = latent_nll(tiny_lm, feedback, batch, options)
        return gradients(tiny_lm, nll)[_name_of(tiny_lm, embeddings.weight)]

    through, cut = question_gradient(Feedback()), question_gradient(Detached())
    first_token = int(batch.input_ids_BT[0, 0])
    assert (through - cut)[first_token].abs().max() > 1e-4


def _name_of(model: PreTrainedModel, parameter: torch.nn.Parameter) -> str:
    return next(name for name, p in model.named_parameters() if p is parameter)


@pytest.mark.parametrize("num_latents", [(3, 3), (3, 0, 1)], ids=["equal", "ragged"])
def test_every_column_is_computed_once_and_padding_never_where_passes_are_packed(
    tiny_gpt2: PreTrainedModel, num_latents: tuple[int, ...], options: PassOptions
) -> None:
    shapes: list[tuple[int, ...]] = []
    tiny_gpt2.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    batch = collate(make_views(num_latents), pad_id=0)
    latent_nll(tiny_gpt2, Feedback(), batch, options)
    assert len(shapes) == 4
    is_packed = options.thresholds.min_width == options.thresholds.min_packed_work == 0
    num_columns = int(batch.attention_mask_BT.sum()) if is_packed else batch.num_columns
    assert sum(rows * columns for rows, columns in shapes) == num_columns


def test_a_latent_in_column_0_is_refused(tiny_gpt2: PreTrainedModel, options: PassOptions) -> None:
    batch = collate(make_views((1,)), pad_id=0)
    batch.is_latent_BT[0, 0] = True
    with pytest.raises(ValueError, match="column 0"):
        latent_nll(tiny_gpt2, Feedback(), batch, options)


def test_a_config_that_turns_the_cache_off_does_not(tiny_lm: PreTrainedModel, options: PassOptions) -> None:
    views = make_views((3, 2))
    expected, _ = latent_nll(tiny_lm, Feedback(), collate(views, pad_id=0), options)
    tiny_lm.config.use_cache = False
    found, _ = latent_nll(tiny_lm, Feedback(), collate(views, pad_id=0), options)
    assert torch.equal(found, expected)


def test_a_dropped_cache_is_noticed(tiny_lm: PreTrainedModel, options: PassOptions) -> None:
    tiny_lm.gradient_checkpointing_enable()
    tiny_lm.train()
    with pytest.raises(AssertionError, match="dropped the key-value cache"):
        latent_nll(tiny_lm, Feedback(), collate(make_views((3, 2)), pad_id=0), options)


def test_padding_never_changes_a_hidden_state(tiny_lm: PreTrainedModel, options: PassOptions) -> None:
    batch = collate(make_views((2, 4, 0)), pad_id=0)
    before = hidden_states(tiny_lm, Feedback(), batch, options)
    is_padding_BT = batch.attention_mask_BT == 0
    other = batch._replace(input_ids_BT=torch.where(is_padding_BT, 17, batch.input_ids_BT))
    after = hidden_states(tiny_lm, Feedback(), other, options)
    assert torch.isfinite(after).all()
    assert torch.equal(before[~is_padding_BT], after[~is_padding_BT])


@pytest.mark.parametrize("max_logits", [pytest.param(1, marks=pytest.mark.slow), 64 * 3, 1 << 20])
def test_the_chunked_loss_equals_the_whole(tiny_lm: PreTrainedModel, max_logits: int, options: PassOptions) -> None:
    views = make_views((2, 0, 1))
    assert_same_loss_and_gradients(tiny_lm, views, collate(views, pad_id=0), replace(options, max_logits=max_logits))


def test_a_batch_without_supervised_columns_has_loss_0(tiny_gpt2: PreTrainedModel, options: PassOptions) -> None:
    batch = collate(make_views((1,)), pad_id=0)
    passes = open_passes(tiny_gpt2, batch, Feedback(), options)
    nll, num_tokens = supervised_nll(
        passes, torch.zeros(1, 3, 32), batch._replace(labels_BT=torch.full((1, 3), IGNORED))
    )
    assert (float(nll), num_tokens) == (0.0, 0)


def test_the_fast_path_can_be_switched_off(tiny_gpt2: PreTrainedModel) -> None:
    batch = collate(make_views((1,)), pad_id=0)
    assert type(open_passes(tiny_gpt2, batch, Feedback(), PassOptions(fast=False))) is PlainPasses
    assert isinstance(open_passes(tiny_gpt2, batch, Feedback(), STORE), StorePasses)
