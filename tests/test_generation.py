"""Batched, cached decoding equals uncached decoding of one row, token for token."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import oracle
from coconut.data.collator import collate
from coconut.data.layouts import Layout
from coconut.data.views import MarkerIds, View, build_prompt
from coconut.model.feedback import Feedback
from coconut.model.generation import Decoded, generate
from marks import slow_but
from ways import WAYS

MARKERS = MarkerIds(60, 61, 62)
EOS_ID = 1


def make_prompts(num_latents: int, lengths: tuple[int, ...], *, markers: bool = False, seed: int = 0) -> list[View]:
    generator = torch.Generator().manual_seed(seed)
    layout = Layout(0, num_latents, markers=markers)
    questions = [torch.randint(2, 60, (length,), generator=generator).tolist() for length in lengths]
    return [build_prompt(question, layout=layout, markers=MARKERS) for question in questions]


def decode(
    model: PreTrainedModel, prompts: list[View], *, max_new_tokens: int | list[int], eos_id: int = EOS_ID, **ways: Any
) -> list[Decoded]:
    batch = collate(prompts, pad_id=EOS_ID)
    return generate(model, Feedback(), batch, eos_ids=[eos_id], max_new_tokens=max_new_tokens, **ways)


@pytest.fixture(params=WAYS)
def ways(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each way to read a batch in turn."""
    return {"options": WAYS[request.param]}


@pytest.fixture(
    params=[1.0, pytest.param(0.6, marks=pytest.mark.slow)], ids=["done-rows-leave", "done-rows-stay-a-while"]
)
def share_kept(request: pytest.FixtureRequest) -> float:
    return float(request.param - 1e-9)


def make_talkative(model: PreTrainedModel) -> None:
    """Larger weights: a random model's greedy text is one token repeated, which would test little."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)


@pytest.mark.parametrize("markers", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["bare", "markers"])
@pytest.mark.parametrize("num_latents", slow_but([4], [0, 1, 4]))
def test_batched_cached_decoding_equals_uncached_decoding_of_one_row(
    tiny_lm: PreTrainedModel, num_latents: int, markers: bool, ways: dict[str, Any], share_kept: float
) -> None:
    make_talkative(tiny_lm)
    prompts = make_prompts(num_latents, (1, 9, 4, 2, 4, 7), markers=markers)
    texts = [oracle.generate(tiny_lm, prompt, eos_id=EOS_ID, max_new_tokens=24) for prompt in prompts]
    # A token that really occurs, at different places, ends the rows at different times.
    eos_id = texts[1][5]
    expected = [oracle.generate(tiny_lm, prompt, eos_id=eos_id, max_new_tokens=24) for prompt in prompts]
    found = decode(tiny_lm, prompts, max_new_tokens=24, eos_id=eos_id, max_share_kept=share_kept, **ways)
    assert [row.ids + [eos_id] * (not row.truncated) for row in found] == expected
    assert [row.num_tokens for row in found] == [len(ids) for ids in expected]
    assert len({len(ids) for ids in expected}) > 1, "the rows must stop at different times to test anything"


def test_a_row_stops_at_its_own_limit(tiny_gpt2: PreTrainedModel, ways: dict[str, Any]) -> None:
    make_talkative(tiny_gpt2)
    prompts = make_prompts(2, (3, 5))
    never = 999
    rows = decode(tiny_gpt2, prompts, max_new_tokens=[2, 6], eos_id=never, **ways)
    longer = decode(tiny_gpt2, prompts, max_new_tokens=6, eos_id=never, **ways)
    assert [row.num_tokens for row in rows] == [2, 6]
    assert rows[0].ids == longer[0].ids[:2]
    assert rows[1].ids == longer[1].ids
    assert all(row.truncated for row in rows)


def test_no_work_is_done_after_the_last_stop(tiny_gpt2: PreTrainedModel, ways: dict[str, Any]) -> None:
    prompts = make_prompts(0, (3, 5))
    first = decode(tiny_gpt2, prompts[:1], max_new_tokens=1, eos_id=63)[0].ids[0]
    passes: list[int] = []
    tiny_gpt2.base_model.register_forward_hook(lambda *_: passes.append(1))
    rows = decode(tiny_gpt2, prompts[:1], max_new_tokens=8, eos_id=first, **ways)
    assert (rows[0].ids, rows[0].num_tokens, rows[0].truncated) == ([], 1, False)
    assert len(passes) == 1


def test_a_done_row_that_stays_does_not_run_out_of_positions(tiny_gpt2: PreTrainedModel, ways: dict[str, Any]) -> None:
    make_talkative(tiny_gpt2)
    prompts = make_prompts(0, (120, 3))
    rows = decode(tiny_gpt2, prompts, max_new_tokens=[8, 40], eos_id=999, max_share_kept=0.0, **ways)
    assert [row.num_tokens for row in rows] == [8, 40]
    assert rows[1].ids == oracle.generate(tiny_gpt2, prompts[1], eos_id=999, max_new_tokens=40)
