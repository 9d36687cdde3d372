"""The model card of a checkpoint: its README.md, in the form that model hubs show."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from coconut.checkpoints.meta import CheckpointMeta
from coconut.config.schema import Entry
from coconut.data.encoding import bos_ids
from coconut.data.views import MarkerIds

CARD_FILE = "README.md"
_HEAD = """---
{use}tags: [latent-reasoning, coconut, continuous-thought]
{base}---

# {title}

A language model that reasons in continuous thoughts: hidden states that are fed back as inputs in place of written
steps (Coconut, [arXiv 2412.06769](https://arxiv.org/abs/2412.06769)). It was trained with `continuous-thought`.
"""
_PIPELINE = "library_name: transformers\npipeline_tag: text-generation\n"
"""By these a hub offers a pipeline of transformers, which would leave the thoughts out."""
_OWN = "library_name: continuous-thought\n"
_WITH_PACKAGE = """
## With the package

```python
from coconut import Reasoner

reasoner = Reasoner.from_pretrained("FOLDER")
print(reasoner.solve(["QUESTION"])[0].text)
```
"""
_PLAIN = """
## Without the package

`AutoModelForCausalLM.from_pretrained` opens the folder. By itself it does not feed thoughts back, and nor does a
pipeline of `transformers`: it answers without them, and nothing in this folder can make it say so; {rest}
"""
_LOOP = """this does, for one question:

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER").eval()
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
embed = model.get_input_embeddings()
ids = tokenizer("QUESTION\\n", add_special_tokens={special}, return_tensors="pt").input_ids
with torch.no_grad():
    inputs = embed({first})
    for _ in range({num_thoughts}):
        thought = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1:]
{scale}        inputs = torch.cat([inputs, thought], dim=1)
{last}    tokens = []
    while len(tokens) < 64 and tokenizer.eos_token_id not in tokens:
        tokens.append(int(model(inputs_embeds=inputs, use_cache=False).logits[0, -1].argmax()))
        inputs = torch.cat([inputs, embed(torch.tensor([tokens[-1:]]))], dim=1)
print(tokenizer.decode(tokens, skip_special_tokens=True))
```"""
_SCALE = """        thought = thought * (embed.weight.square().mean() / thought.square().mean()).sqrt()
"""
_END = """    inputs = torch.cat([inputs, embed(torch.tensor([[{end}]]))], dim=1)
"""


def write_card(
    title: str,
    meta: CheckpointMeta,
    tokenizer: PreTrainedTokenizerBase,
    *,
    training: Mapping[str, object],
    results: Sequence[tuple[str, str]] = (),
    base_model: str = "",
) -> str:
    """Write what a checkpoint is, how it was trained, what it reached, and how it is loaded.

    Args:
        title: the first heading.
        training: names and values of the settings that it was trained with.
        results: names and texts of its figures; left out where there are none.
        base_model: hub id of the model that it was trained from, if it is one.
    """
    num_thoughts = meta.layout().num_latents
    method = f"{meta.method}, latent stage {meta.latent_stage} of {meta.max_latent_stage}"
    properties = {
        "method": method,
        "thoughts before the answer": num_thoughts,
        "what is fed back": meta.thought,
        "markers around the thoughts": "yes" if meta.layout().markers else "no",
        "prompt": "the tokenizer's chat template" if meta.prompt == "chat" else "the question and a line break",
        "form of an answer": f"steps on lines of their own, then `{meta.layout().wording} answer`",
    }
    base = f"base_model: {base_model}\n" if base_model else ""
    head = _HEAD.format(title=title, base=base, use=_OWN if num_thoughts else _PIPELINE)
    parts = [head, "\n## What it is\n\n", _table(properties)]
    parts += ["\n## How it was trained\n\n", _table(training)]
    if results:
        parts += ["\n## What it reached\n\n", _table(dict(results))]
    return "".join([*parts, _WITH_PACKAGE, _PLAIN.format(rest=_loop(meta, tokenizer))])


def describe_entry(entry: Entry) -> dict[str, object]:
    """Return the settings of a curriculum entry that a card shows."""
    train = entry.train
    return {
        "started from": entry.parent,
        "epochs": entry.epochs,
        "learning rate": f"{entry.lr:g}, {train.schedule}, {train.warmup_updates} updates of warm-up",
        "examples per update": train.batch_size,
        "optimizer": f"{train.optimizer}, betas {train.beta1:g} and {train.beta2:g}, decay {train.weight_decay:g}",
        "precision": train.precision,
        "examples shown at a random stage": f"{entry.latent.uniform_prob:g}",
    }


def _table(rows: Mapping[str, object]) -> str:
    lines = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |\n" for name, value in rows.items())
    return "| | |\n|---|---|\n" + "".join(lines)


def _loop(meta: CheckpointMeta, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write the loop over thoughts in a few lines, where they can say it."""
    layout = meta.layout()
    is_simple = meta.thought in ("hidden[-1]", "normalised") and not meta.parallel_iterations
    if not is_simple or meta.prompt == "chat" or layout.slot != "thought":
        return "take the package for that."
    markers = MarkerIds.of(tokenizer)
    return _LOOP.format(
        special=bool(bos_ids(tokenizer, meta.prompt)),
        first=f"torch.cat([ids, torch.tensor([[{markers.start}]])], dim=1)" if layout.markers else "ids",
        num_thoughts=layout.num_latents,
        scale=_SCALE if meta.thought == "normalised" else "",
        last=_END.format(end=markers.end) if layout.markers else "",
    )
