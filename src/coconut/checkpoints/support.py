"""Which models can be trained and asked in passes, and whether the fast path may read them."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from loguru import logger
from transformers import PreTrainedModel

from coconut.checkpoints.proof import MIN_POSITIONS, Proof, Results, find_difference
from coconut.checkpoints.properties import DAMAGED, EXPLAINING, NEEDED, find_missing
from coconut.config.messages import first_line
from coconut.config.positions import rope_limit
from coconut.devices import is_out_of_memory
from coconut.model.choice import note_passes
from coconut.model.dropout import has_dropout
from coconut.model.fast.thresholds import Thresholds
from coconut.model.head import num_positions
from coconut.model.passes import PassOptions

_PLAIN = (PassOptions(fast=False), PassOptions(fast=False, checkpoint_activations=True))
_ALL = Thresholds(min_packed_work=0, min_weight_elements=0, min_multiplications=0)
_STORE = (
    PassOptions(thresholds=_ALL),
    PassOptions(thresholds=dataclasses.replace(_ALL, min_packed_work=1 << 60)),  # Padding is computed, not packed.
    # Passes of several columns are attended by torch's kernel, as those of long rows are.
    PassOptions(thresholds=dataclasses.replace(_ALL, max_scores=12), checkpoint_activations=True),
)
_NARROW = dataclasses.replace(_ALL, min_width=1 << 30)
_LAYERS = (PassOptions(thresholds=_NARROW), PassOptions(thresholds=_NARROW, checkpoint_activations=True))


@dataclass(frozen=True)
class Support:
    """Which passes may read a model."""

    fast: bool
    reason: str = ""
    """Why not the fast path."""

    def __str__(self) -> str:
        return "fast" if self.fast else f"plain: {self.reason}"


def check_supported(model: PreTrainedModel) -> Support:
    """Prove that a model gives the same in passes over a padded batch as one row at a time without a cache.

    Compared are the loss, its gradients and the logits of decoded tokens; see `coconut.checkpoints.proof`. The plain
    passes must agree. If the fast ones do not, the model is read by the plain ones. The outcome is noted in the
    model's config, and so in every checkpoint that comes from it; see `coconut.model.choice`.

    Raises:
        ValueError: naming the model's class and the property that it lacks.
    """
    was_training = model.training
    model.eval()
    note_passes(model, "fast")  # Of the same model, another version of this package may have noted something else.
    try:
        support = _prove(model)
        note_passes(model, str(support))
        return support
    finally:
        model.train(was_training)


def _prove(model: PreTrainedModel) -> Support:
    name, room = type(model).__name__, num_positions(model)
    if room < MIN_POSITIONS:
        raise ValueError(f"model: {name} has {room} positions, wanted at least {MIN_POSITIONS}; take another model")
    if (limit := rope_limit(model.config.get_text_config().to_dict())) is not None:
        logger.warning(
            "base: of {}, {} positions are used: beyond them, the rotary embeddings of a row depend on the longest row"
            " of its batch",
            name,
            limit,
        )
    if problem := find_missing(model, NEEDED):
        raise _refused(name, problem)
    proof = Proof(model, room)
    try:
        wanted = proof.read_alone()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = find_missing(model, EXPLAINING) or f"cannot be read row by row ({first_line(error)})"
        raise _refused(name, problem) from error
    if not all(bool(tensor.isfinite().all()) for tensors in wanted.values() for tensor in tensors):
        raise ValueError(
            f"model: {name} gives logits or gradients that are not finite; its weights are damaged, fetch them again"
        )
    if problem := _find_problem(proof, wanted, _PLAIN):
        raise _refused(name, find_missing(model, EXPLAINING) or problem)
    if not proof.is_large or has_dropout(model):
        _warn_of_draws(proof, name)
    is_wide = model.get_input_embeddings().weight.shape[1] >= _ALL.min_width
    if problem := _find_problem(proof, wanted, _LAYERS + _STORE if is_wide else _LAYERS):
        logger.warning("base: {} is read by the plain passes, because the fast path {}", name, problem)
        return Support(fast=False, reason=f"the fast path {problem}")
    logger.info("base: passes of {} give the same as rows read one at a time without a cache", name)
    return Support(fast=True)


def _warn_of_draws(proof: Proof, name: str) -> None:
    """Say so if the gradient of an update depends on how it is cut, by draws that do not belong to a row."""
    at_once, one_by_one = (partial(proof.read_in_training, micro_batch=size) for size in (len(proof.views), 1))
    if problem := _tried(lambda: find_difference(at_once(), one_by_one())):
        logger.warning(
            "base: in training, {} draws random numbers that belong to no row (layers that are left out, a router's"
            " jitter), so its results depend on runtime.micro_batch, on retries and on the number of processes; set"
            " these probabilities to 0 in its config.json ({})",
            name,
            problem,
        )


def _refused(name: str, problem: str) -> ValueError:
    # Damaged weights say nothing about the kind of model.
    wanted = "" if problem == DAMAGED else "; wanted a decoder-only model with causal attention in every layer"
    return ValueError(f"model: {name} {problem}{wanted}")


def _find_problem(proof: Proof, wanted: Results, ways: Sequence[PassOptions]) -> str | None:
    """Say what goes wrong when the model is read in one of these ways; of a large model, in the last one."""
    reads = (partial(proof.read_in_passes, options) for options in ways[-1 if proof.is_large else 0 :])
    problems = (_tried(lambda read=read: find_difference(read(), wanted)) for read in reads)  # type: ignore[misc]
    return next((problem for problem in problems if problem), None)


def _tried(compare: Callable[[], str | None]) -> str | None:
    """Return the difference that is found, or the words for an error of the model's own code."""
    try:
        return compare()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"fails over several passes ({first_line(error)})"
