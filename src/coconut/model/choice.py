"""Which way a batch is read: the fast path where it is allowed and gains, the plain one elsewhere."""

from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from coconut.model.batch import Batch
from coconut.model.fast.passes import LayerPasses, StorePasses, can_store
from coconut.model.feedback import Feedback
from coconut.model.passes import PassOptions, PlainPasses

_NOTE = "coconut_passes"


def noted_passes(model: PreTrainedModel) -> str:
    """Return which passes are proved for a model: "fast", or "plain: " and why not the fast ones."""
    return str(getattr(model.config, _NOTE, "fast"))


def is_noted(model: PreTrainedModel) -> bool:
    """Say whether a proof has noted anything in the model's config."""
    return hasattr(model.config, _NOTE)


def note_passes(model: PreTrainedModel, passes: str) -> None:
    """Note it in the model's config, which every checkpoint of the model takes along."""
    setattr(model.config, _NOTE, passes)


def open_passes(
    model: PreTrainedModel,
    batch: Batch,
    feedback: Feedback,
    options: PassOptions,
    *,
    num_further_columns: int = 0,
    keys_B: Tensor | None = None,
    keeps_layers: bool = False,
) -> PlainPasses:
    """Make the passes over a batch.

    * Plain: where `options.fast` is off, or the fast path is not proved for the model.
    * Our layers on the library's cache: for narrow models, for attention that the key-value store does not
      compute, and for Jacobi iteration, which reads columns several times.
    * Our layers on the key-value store: everywhere else.

    Args:
        num_further_columns: room for tokens that are decoded after the batch.
        keys_B: of the rows' dropout; see `model/dropout.py`.
        keeps_layers: keep the hidden states of all layers; see `PlainPasses`.
    """
    options = replace(options, thresholds=options.thresholds.on(batch.input_ids_BT.device.type))
    num_columns = batch.input_ids_BT.shape[1] + num_further_columns
    kind: type[PlainPasses] = PlainPasses
    if options.fast and noted_passes(model).startswith("fast"):
        reads_once = not feedback.parallel_iterations or not bool(batch.host.is_latent_BT.any())
        kind = StorePasses if reads_once and can_store(model, num_columns, options) else LayerPasses
    return kind(
        model,
        batch,
        options,
        all_layers=feedback.needs_all_layers,
        keeps_layers=keeps_layers,
        num_further_columns=num_further_columns,
        keys_B=keys_B,
    )
