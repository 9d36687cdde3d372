"""Properties that a model needs in order to be read in passes, and the words for a model that lacks one.

Legend: B rows, T columns, D hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from coconut.checkpoints.proof import TOLERANCE
from coconut.config.messages import first_line
from coconut.devices import is_out_of_memory
from coconut.model.head import num_positions, output_logits

_MAX_COLUMNS = 8
_NUM_PADDING = 3
_KNOWN_CACHES = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


class Trial:
    """A model that reads a few tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        num_columns = min(_MAX_COLUMNS, num_positions(model))
        self.columns_BT = torch.arange(num_columns, device=model.device)[None]
        self.ids_BT = (3 + 7 * self.columns_BT) % model.config.get_text_config().vocab_size
        self.embeds_BTD: Tensor = model.get_input_embeddings()(self.ids_BT)
        with _Lookups(self.ids_BT) as lookups:
            self.logits_BTV: Tensor = model(input_ids=self.ids_BT, use_cache=False).logits
        self.num_lookups = lookups.count

    def differs(self, logits_BTV: Tensor) -> bool:
        """Say whether these differ from the logits that the model gives for the tokens at once."""
        wanted_BTV = self.logits_BTV[:, : logits_BTV.shape[1]]
        difference = float((logits_BTV - wanted_BTV).abs().max())
        return not difference <= TOLERANCE * float(wanted_BTV.abs().max())

    def read(self, embeds_BTD: Tensor, **inputs: Any) -> Tensor:
        """Return the logits by body and head."""
        return output_logits(self.model, self.model.base_model(inputs_embeds=embeds_BTD, **inputs).last_hidden_state)


class _Lookups(TorchFunctionMode):
    """Counts the tables in which these ids are looked up."""

    def __init__(self, ids_BT: Tensor) -> None:
        super().__init__()
        self.ids_BT, self.count = ids_BT, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.embedding and torch.equal(args[0], self.ids_BT):
            self.count += 1
        return func(*args, **(kwargs or {}))


def _gives_numbers(trial: Trial) -> bool:
    return bool(trial.logits_BTV.isfinite().all())


def _takes_embeddings(trial: Trial) -> bool:
    trial.model(inputs_embeds=trial.embeds_BTD.flip(-1), use_cache=False)  # No token's embeddings, as thoughts are.
    # What other tables give may count for nothing in fresh weights, and for something later.
    return trial.num_lookups == 1 and not trial.differs(
        trial.model(inputs_embeds=trial.embeds_BTD, use_cache=False).logits
    )


def _keeps_keys_and_values(trial: Trial) -> bool:
    return all(type(layer) in _KNOWN_CACHES for layer in DynamicCache(config=trial.model.config).layers)


def _is_causal(trial: Trial) -> bool:
    ids_BT = trial.ids_BT.clone()
    ids_BT[:, -1] = ids_BT[:, 0]
    return not trial.differs(trial.model(input_ids=ids_BT, use_cache=False).logits[:, :-1])


def _has_a_known_head(trial: Trial) -> bool:
    return not trial.differs(trial.read(trial.embeds_BTD, use_cache=False))


def _reads_on_from_a_cache(trial: Trial) -> bool:
    cache, cut = DynamicCache(config=trial.model.config), trial.ids_BT.shape[1] // 2
    inputs = {"past_key_values": cache, "use_cache": True}
    parts = [
        trial.read(trial.embeds_BTD[:, columns], position_ids=trial.columns_BT[:, columns], **inputs)
        for columns in (slice(0, cut), slice(cut, None))
    ]
    cache.batch_select_indices(torch.zeros(1, dtype=torch.long, device=trial.model.device))
    return cache.get_seq_length() == trial.ids_BT.shape[1] and not trial.differs(torch.cat(parts, dim=1))


def _counts_given_positions(trial: Trial) -> bool:
    """A model that takes positions from `position_ids` gives the same for a padded row as for the row alone."""
    padding = (_NUM_PADDING, 0)
    embeds_BTD = functional.pad(trial.embeds_BTD[:, :-_NUM_PADDING], (0, 0, *padding))
    mask_BT, position_ids_BT = (
        functional.pad(tensor[:, :-_NUM_PADDING], padding) for tensor in (trial.columns_BT * 0 + 1, trial.columns_BT)
    )
    logits_BTV = trial.read(embeds_BTD, attention_mask=mask_BT, position_ids=position_ids_BT, use_cache=False)
    return not trial.differs(logits_BTV[:, _NUM_PADDING:])


Property = tuple[Callable[[Trial], bool], str]
DAMAGED = "gives logits that are not finite: its weights are damaged, fetch them again"
"""Of a model of any kind."""
NEEDED: Sequence[Property] = (
    (_gives_numbers, DAMAGED),
    (
        _takes_embeddings,
        "does not compute from input embeddings alone what it computes from token ids, so no vector can be fed back",
    ),
    (
        _keeps_keys_and_values,
        "keeps a recurrent or compressed state instead of the keys and values of each column; padding"
        " cannot be hidden from it, and rows cannot leave it",
    ),
)
"""What the proof takes for granted."""
EXPLAINING: Sequence[Property] = (
    (_is_causal, "attends to later columns (it reads in both directions)"),
    (
        _has_a_known_head,
        "has no `base_model` whose last hidden states its head turns into logits by a linear map, scaled or capped",
    ),
    (_reads_on_from_a_cache, "does not read on from the library's key-value cache as in one pass"),
    (
        _counts_given_positions,
        "ignores `position_ids` or the attention mask, so padding on the left changes its results",
    ),
)
"""Why the proof failed, the most general reason first."""


@torch.no_grad()
def find_missing(model: PreTrainedModel, properties: Sequence[Property]) -> str | None:
    """Return the words for the first of these properties that the model lacks; they follow "the model"."""
    words = "cannot read a few token ids"
    try:
        trial = Trial(model)
        for has_property, words in properties:
            if not has_property(trial):
                return words
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{words} ({first_line(error)})"
    return None
