"""A model read on the very path of training and decoding, and the same rows read one at a time without a cache.

The path: rows of different lengths, padded on both sides; vectors fed back in columns where another row has a token;
the gradient of the loss; rows that leave the batch; tokens that are decoded after that.

Legend: B rows, T columns, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from coconut.data.collator import Batch, collate
from coconut.data.views import IGNORED, View
from coconut.model.choice import open_passes
from coconut.model.dropout import has_dropout
from coconut.model.feedback import Feedback
from coconut.model.latent import latent_nll, read_columns
from coconut.model.passes import PassOptions

Results = Mapping[str, Sequence[Tensor]]
"""What a model gave for the rows, by the words in which a difference is reported."""

MIN_POSITIONS = 4
_LENGTHS = ((5, 2, 4), (2, 2, 2), (3, 1, 5))
"""Question, thoughts and target of each row. Where the others have their last thought, the last row has a token."""
_SHORT_LENGTHS = ((2, 1, 1), (1, 1, 1), (1, 0, 2))
"""For models with fewer positions than the others take."""
_STAYING = (2, 0)
"""The rows that are decoded on when the others have left, in their new order."""
TOLERANCE = 1e-4
"""Of the largest value of its kind. Rounding stays below 1e-5; a wrong mask or position gives 1e-2 and more."""
_GRADIENT_TOLERANCE = 2e-3
"""Rounding comes to 8e-4 in models that divide by very small norms; a wrong mask or position gives 1e-2 and more."""
_LARGE = 1 << 28
_MAX_WEIGHTS = 1 << 24
"""Gradients are compared for the smallest weights, up to this many elements: there may be no room for a second copy
of a large model's weights."""


class Proof:
    """The rows that a model is tried with.

    Args:
        num_positions: of the model, at least `MIN_POSITIONS`.
    """

    def __init__(self, model: PreTrainedModel, num_positions: int) -> None:
        self.model, self.feedback = model, Feedback()
        self.embed: nn.Module = model.get_input_embeddings()
        lengths = _LENGTHS if num_positions >= max(map(sum, _LENGTHS)) else _SHORT_LENGTHS
        vocab_size = model.config.get_text_config().vocab_size
        self.views = [_view(row, *of_row, vocab_size) for row, of_row in enumerate(lengths)]
        self.prompts = [_prompt(view, num_slots=lengths[0][1]) for view in self.views]
        self.num_decoded = min(len(self.views[row].input_ids) - len(self.prompts[row].input_ids) for row in _STAYING)
        self.weights = _smallest_weights(model)
        self.is_large = model.num_parameters() > _LARGE
        """Whether each way of reading takes many seconds."""

    def read_alone(self) -> Results:
        """Read each row without padding and without a cache: everything again for every thought."""
        rows = [self._read_row(view) for view in self.views]
        nll = torch.stack([_nll(logits_TV, view) for (_, logits_TV), view in zip(rows, self.views, strict=True)]).sum()
        own_columns = [len(self.prompts[row].input_ids) + torch.arange(self.num_decoded) for row in _STAYING]
        logits = [rows[row][1].detach()[columns] for row, columns in zip(_STAYING, own_columns, strict=True)]
        return self._results(nll, [embeds_TD for embeds_TD, _ in rows], torch.stack(logits))

    def read_in_passes(self, options: PassOptions) -> Results:
        """Read the rows as training and decoding do."""
        batch = self._collate(self.views)
        with _outputs_of(self.embed) as looked_up:
            nll, _ = latent_nll(self.model, self.feedback, batch, options)
        is_real_BT = batch.attention_mask_BT.bool()
        return self._results(nll, looked_up, self._decode(options), is_real_BT)

    def read_in_training(self, *, micro_batch: int) -> Results:
        """Read the rows by plain passes in training mode, with the masks of dropout that belong to each row."""
        keys_B = torch.arange(len(self.views)) if has_dropout(self.model) else None
        nll = torch.zeros((), device=self.model.device)
        self.model.train()
        try:
            for start in range(0, len(self.views), micro_batch):
                rows = slice(start, start + micro_batch)
                batch, keys = self._collate(self.views[rows]), None if keys_B is None else keys_B[rows]
                nll = nll + latent_nll(self.model, self.feedback, batch, PassOptions(fast=False), keys_B=keys)[0]
        finally:
            self.model.eval()
        gradients = torch.autograd.grad(nll, self.weights, allow_unused=True)
        return {"the loss": [nll.detach()], "the gradient of the weights": [g for g in gradients if g is not None]}

    def _read_row(self, view: View) -> tuple[Tensor, Tensor]:
        own_1TD = self.embed(torch.tensor([view.input_ids], device=self.model.device))
        embeds_1TD = own_1TD
        for column in range(view.prefix_length, view.prefix_length + view.num_thoughts):
            hidden_1TD = self.model.base_model(inputs_embeds=embeds_1TD[:, :column], use_cache=False).last_hidden_state
            embeds_1TD = torch.cat([embeds_1TD[:, :column], hidden_1TD[:, -1:], own_1TD[:, column + 1 :]], dim=1)
        return own_1TD, self.model(inputs_embeds=embeds_1TD, use_cache=False).logits[0].float()

    @torch.no_grad()
    def _decode(self, options: PassOptions) -> Tensor:
        """Return the logits that each token of the staying rows gives, rows x tokens x V."""
        batch, device = self._collate(self.prompts), self.model.device
        logits_parts = []
        with closing(
            open_passes(self.model, batch, self.feedback, options, num_further_columns=self.num_decoded)
        ) as passes:
            read_columns(passes, self.feedback, batch)
            passes.select(torch.tensor(_STAYING))
            for number in range(self.num_decoded):
                places = [(row, len(self.prompts[row].input_ids) + number) for row in _STAYING]
                ids_B1 = torch.tensor([[self.views[row].input_ids[place]] for row, place in places]).to(device)
                positions_B1 = torch.tensor([[place] for _, place in places], device=device)
                logits_parts.append(passes.logits(passes.read(passes.embed(ids_B1), positions_B1).last_hidden_state))
        return torch.cat(logits_parts, dim=1).float()

    def _collate(self, views: Sequence[View]) -> Batch:
        return collate(views, pad_id=0).to(self.model.device)

    def _results(
        self, nll: Tensor, embeds: Sequence[Tensor], logits: Tensor, is_real_BT: Tensor | None = None
    ) -> Results:
        inputs = [*embeds, *self.weights]
        found = torch.autograd.grad(nll, inputs, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
        of_embeds, of_weights = gradients[: len(embeds)], gradients[len(embeds) :]
        rows = [of_row_BTD.flatten(0, 1) for of_row_BTD in of_embeds]
        if is_real_BT is not None:
            rows = [of_embeds[0][is_real_BT]]
        return {
            "the loss": [nll.detach()],
            "the gradient of the input embeddings": [torch.cat(rows)],
            "the gradient of the weights": of_weights,
            "the logits of tokens that are decoded after rows have left the batch": [logits],
        }


def find_difference(found: Results, wanted: Results) -> str | None:
    """Say which kind of result differs by more than rounding, and how much, or return None."""
    for words, tensors in wanted.items():
        difference = _difference(found[words], tensors)
        if not difference <= (_GRADIENT_TOLERANCE if "gradient" in words else TOLERANCE):
            return f"changes {words} by {difference:.1%}"
    return None


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    scale = max((float(tensor.abs().max()) for tensor in wanted), default=0.0)
    differences = [(one - other).abs().max() for one, other in zip(found, wanted, strict=True)]
    # Unlike Python's, torch's maximum does not lose a NaN.
    return float(torch.stack(differences).max()) / max(scale, torch.finfo(torch.float32).tiny)


def _view(row: int, num_question: int, num_thoughts: int, num_target: int, vocab_size: int) -> View:
    length = num_question + num_thoughts + num_target
    ids = [(3 + 11 * row + 7 * column) % vocab_size for column in range(length)]
    labels = [IGNORED] * (length - num_target) + ids[length - num_target :]
    return View(ids, labels, prefix_length=num_question, num_slots=num_thoughts, num_thoughts=num_thoughts)


def _prompt(view: View, *, num_slots: int) -> View:
    length = view.prefix_length + num_slots
    return View(
        view.input_ids[:length], [IGNORED] * length, view.prefix_length, view.num_slots, num_thoughts=view.num_thoughts
    )


def _nll(logits_TV: Tensor, view: View) -> Tensor:
    targets_T = torch.tensor(view.labels[1:], device=logits_TV.device)
    return functional.cross_entropy(logits_TV[:-1], targets_T, reduction="sum", ignore_index=IGNORED)


def _smallest_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    weights = sorted((weight for weight in model.parameters() if weight.requires_grad), key=torch.numel)
    totals = accumulate(map(torch.numel, weights))
    return [weight for weight, total in zip(weights, totals, strict=True) if total <= _MAX_WEIGHTS]


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module returns within the block."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
