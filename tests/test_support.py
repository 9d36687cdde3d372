"""`base` proves a model on the path that training and decoding take, says which property is missing, and remembers."""

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from coconut.checkpoints.folder import load_model
from coconut.checkpoints.support import check_supported
from coconut.data.collator import collate
from coconut.data.views import IGNORED, View
from coconut.model.choice import noted_passes, open_passes
from coconut.model.fast.passes import LayerPasses, StorePasses
from coconut.model.feedback import Feedback
from coconut.model.head import num_positions
from coconut.model.passes import PassOptions, PlainPasses
from families import build_family

pytestmark = pytest.mark.slow

BATCH = collate([View([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8], 2, 1, 1)], pad_id=0)


def kind_of_passes(model: PreTrainedModel, options: PassOptions) -> type[PlainPasses]:
    return type(open_passes(model, BATCH, Feedback(), options))


@pytest.mark.parametrize("family", ["stablelm", "nemotron", "falcon", "diffllama"])
def test_a_model_that_the_fast_path_cannot_read_takes_the_plain_one(family: str, log_lines: list[str]) -> None:
    """Their attention computes its own mask, or is not called through transformers' interface."""
    model = build_family(family, 256)
    support = check_supported(model)
    assert not support.fast
    assert len(log_lines) == 1
    assert "is read by the plain passes, because the fast path fails" in log_lines[0]
    assert kind_of_passes(model, PassOptions()) is PlainPasses


def test_the_outcome_goes_with_the_model_and_is_found_anew(tmp_path: Path) -> None:
    model = build_family("stablelm", 256)
    check_supported(model)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert noted_passes(loaded) == noted_passes(model)
    assert noted_passes(loaded).startswith("plain: the fast path fails")
    assert kind_of_passes(loaded, PassOptions()) is PlainPasses
    loaded.config.coconut_passes = "plain: noted of another model"
    narrow = build_family("llama", 64)
    narrow.config.coconut_passes = "plain: noted by another version"
    assert check_supported(narrow).fast
    assert noted_passes(narrow) == "fast"


@pytest.mark.parametrize(("width", "kind"), [(64, LayerPasses), (256, StorePasses)])
def test_a_model_that_all_passes_can_read_takes_the_fast_ones(width: int, kind: type[PlainPasses]) -> None:
    model = build_family("llama", width)
    assert check_supported(model).fast
    assert kind_of_passes(model, PassOptions()) is kind
    assert kind_of_passes(model, PassOptions(fast=False)) is PlainPasses


def test_an_operation_in_place_on_a_linear_layers_output_is_right_everywhere() -> None:
    assert check_supported(build_family("olmo", 256, clip_qkv=0.05)).fast


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("bart", "ignores `position_ids` or the attention mask, so padding on the left changes its results"),
        ("qwen3_next", "keeps a recurrent or compressed state"),
        ("bamba", "keeps a recurrent or compressed state"),
        ("mamba", "keeps a recurrent or compressed state"),
        ("cpmant", "does not compute from input embeddings alone"),
        ("gemma3n_text", "does not compute from input embeddings alone"),
        ("ctrl", "does not read on from the library's key-value cache as in one pass"),
        ("modernbert-decoder", "its head turns into logits by a linear map, scaled or capped"),
    ],
)
def test_a_refusal_names_the_property_that_is_missing(family: str, words: str) -> None:
    model = build_family(family, 64)
    with pytest.raises(ValueError, match=rf"model: {type(model).__name__} .*; wanted a decoder-only model") as refusal:
        check_supported(model)
    assert words in str(refusal.value)


def test_rotary_embeddings_that_look_at_the_longest_row_limit_the_positions(log_lines: list[str]) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    original = {"original_max_position_embeddings": 32}
    model = build_family("phi3", 64, rope_parameters=rope | original, **original, partial_rotary_factor=1.0)
    check_supported(model)
    assert num_positions(model) == 32
    assert any("of Phi3ForCausalLM, 32 positions are used" in line for line in log_lines)


@pytest.mark.parametrize(
    "rope", [{"rope_type": "dynamic"}, {"rope_type": "yarn", "original_max_position_embeddings": 32}]
)
def test_other_rotary_embeddings_keep_all_positions(rope: dict[str, object], log_lines: list[str]) -> None:
    model = build_family("llama", 64, rope_parameters={"rope_theta": 1e4, "factor": 4.0} | rope)
    check_supported(model)
    assert num_positions(model) == 128
    assert not log_lines


@pytest.mark.parametrize(
    ("family", "values", "draws_freely"),
    [
        ("gpt2", {}, False),
        ("llama", {"attention_dropout": 0.1}, False),
        ("phimoe", {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3}, True),
        ("opt", {"layerdrop": 0.5, "num_hidden_layers": 8}, True),
    ],
)
def test_draws_that_belong_to_no_row_are_told(
    family: str, values: dict[str, object], draws_freely: bool, log_lines: list[str]
) -> None:
    torch.manual_seed(0)
    check_supported(build_family(family, 64, **values))
    assert any("draws random numbers that belong to no row" in line for line in log_lines) == draws_freely


class CountsColumns(torch.nn.Module):
    """Adds to each column its number in the pass: right for one row without a cache, wrong in later passes."""

    def forward(self, embeds_BSD: Tensor) -> Tensor:
        return embeds_BSD + 0.1 * torch.arange(embeds_BSD.shape[1])[:, None] / embeds_BSD.shape[1]


def test_a_model_that_depends_on_where_passes_end_is_refused() -> None:
    model = build_family("llama", 64)
    inner, counts = model.model.norm.forward, CountsColumns()
    model.model.norm.forward = lambda hidden: counts(inner(hidden))
    with pytest.raises(ValueError, match="does not read on from the library's key-value cache"):
        check_supported(model)


def test_a_gradient_that_is_lost_between_passes_is_found() -> None:
    """Logits alone would not show it."""
    model = build_family("llama", 64)
    inner = model.model.forward

    def forward(**inputs: object) -> object:
        output = inner(**inputs)
        for layer in getattr(inputs.get("past_key_values"), "layers", []):
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return output

    model.model.forward = forward
    with pytest.raises(ValueError, match="changes the gradient of the"):
        check_supported(model)


def test_a_proof_takes_seconds_and_leaves_no_gradients_behind() -> None:
    model = build_family("gpt2", 64)
    started = time.process_time()
    check_supported(model)
    assert time.process_time() - started < 5
    assert all(parameter.grad is None for parameter in model.parameters())
