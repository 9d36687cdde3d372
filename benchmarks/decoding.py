"""Rows per second of generation: batched and cached against one row at a time without a cache."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coconut.data.collator import collate
from coconut.data.views import View
from coconut.model.feedback import Feedback
from coconut.model.generation import generate
from coconut.model.passes import PassOptions
from workload import alternate, build_gpt2, make_views, matrix_rates

NUM_QUESTIONS = 64
NUM_THOUGHTS = 6
NUM_TOKENS = 32
NUM_SLOW = 2
"""Questions that are decoded without a cache; each takes as long as any other."""


def compare(*, device: str, repeats: int, **_: Any) -> dict[str, Any]:
    """64 questions, 6 thoughts and 32 new tokens each, in float32 and in bf16 autocast: one batch of an evaluation."""
    model = build_gpt2(device).eval()
    options = PassOptions()
    prompts = [_without_target(view) for view in make_views(NUM_QUESTIONS, num_latents=NUM_THOUGHTS)]
    steps = {
        "uncached, one row": lambda: [decode_without_cache(model, prompt) for prompt in prompts[:NUM_SLOW]],
        "ours, fp32": lambda: decode(model, prompts, options),
        "ours, bf16": lambda: decode(model, prompts, options, is_bf16=True),
    }
    seconds = alternate(steps, repeats=repeats)
    seconds["uncached, one row"] *= NUM_QUESTIONS / NUM_SLOW
    rates = {name: matrix_rates(device, dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    num_operations = count_operations(model, prompts)
    floors = {
        f"{precision} / floor at {library} rate": seconds[f"ours, {precision}"] / (num_operations / rate)
        for precision, by_library in rates.items()
        for library, rate in by_library.items()
    }
    return {
        "rows_per_s": {name: NUM_QUESTIONS / value for name, value in seconds.items()},
        "fp32 / uncached": seconds["uncached, one row"] / seconds["ours, fp32"],
        "bf16 / uncached": seconds["uncached, one row"] / seconds["ours, bf16"],
        "operations": num_operations,
        "operations_per_s": rates,
        **floors,
    }


def _without_target(view: View) -> View:
    length = view.prefix_length + view.num_slots
    return View(view.input_ids[:length], view.labels[:length], view.prefix_length, view.num_slots, view.num_thoughts)


def decode(model: PreTrainedModel, prompts: list[View], options: PassOptions, *, is_bf16: bool = False) -> int:
    """All prompts in one batch; no token ends a row."""
    batch = collate(prompts, pad_id=0).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=is_bf16):
        rows = generate(model, Feedback(), batch, eos_ids=[], max_new_tokens=NUM_TOKENS, options=options)
    return sum(row.num_tokens for row in rows)


@torch.no_grad()
def decode_without_cache(model: PreTrainedModel, prompt: View) -> list[int]:
    """One row; the whole sequence anew for every thought and every token."""
    embed = model.get_input_embeddings()
    embeds_TD: Tensor = embed(torch.tensor(prompt.input_ids[: prompt.prefix_length], device=model.device))
    for _ in range(NUM_THOUGHTS):
        hidden_TD = model.base_model(inputs_embeds=embeds_TD[None], use_cache=False).last_hidden_state[0]
        embeds_TD = torch.cat([embeds_TD, hidden_TD[-1:]])
    ids: list[int] = []
    for _ in range(NUM_TOKENS):
        ids.append(int(model(inputs_embeds=embeds_TD[None], use_cache=False).logits[0, -1].argmax()))
        embeds_TD = torch.cat([embeds_TD, embed(torch.tensor(ids[-1:], device=model.device))])
    return ids


def count_operations(model: PreTrainedModel, prompts: list[View]) -> float:
    """Multiplications and additions that generation cannot do without: each column once, the head once a token.

    The last token is chosen, and not read.
    """
    embeddings = {id(p) for module in (model.transformer.wte, model.transformer.wpe) for p in module.parameters()}
    num_weights = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in embeddings)
    width, num_layers = model.config.n_embd, model.config.n_layer
    total = 0.0
    for prompt in prompts:
        num_columns = len(prompt.input_ids) + NUM_TOKENS - 1
        total += 2 * num_columns * num_weights + 2 * NUM_TOKENS * width * model.config.vocab_size
        total += 4 * num_layers * width * num_columns * (num_columns + 1) / 2
    return total
