"""The ways in which a batch can be read, as options: each part of the fast path on tiny models too."""

from contextlib import closing
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from coconut.model.batch import Batch
from coconut.model.choice import open_passes
from coconut.model.fast.thresholds import Thresholds
from coconut.model.feedback import Feedback
from coconut.model.latent import read_columns
from coconut.model.passes import PassOptions

_ALWAYS = Thresholds(min_width=0, min_packed_work=0, min_weight_elements=0, min_multiplications=0, min_full=0)
WAYS = {
    "plain": PassOptions(fast=False),
    "narrow": PassOptions(),
    "store, torch's kernel": PassOptions(thresholds=replace(_ALWAYS, max_scores=12, min_full=2)),
    "store, own attention": PassOptions(thresholds=_ALWAYS),
    "store, as on an accelerator": PassOptions(
        thresholds=replace(Thresholds().on("cuda"), min_width=0, min_weight_elements=0, min_multiplications=0)
    ),
}
"""`narrow` is what a model of the default's size takes: our layers on the library's cache. With `max_scores=12` only
passes of one column are attended by our own code. In decoding these read the whole store in the one way, and what is
written of it in the other."""
STORE = WAYS["store, own attention"]


def with_thresholds(options: PassOptions, **values: float) -> PassOptions:
    """The same options with other thresholds."""
    return replace(options, thresholds=replace(options.thresholds, **values))


def hidden_states(model: PreTrainedModel, feedback: Feedback, batch: Batch, options: PassOptions) -> Tensor:
    """Hidden states of all columns, B x T x D."""
    with closing(open_passes(model, batch, feedback, options)) as passes:
        return read_columns(passes, feedback, batch)
