"""The mathematics: hidden states fed back as inputs, and the loss over what remains as text.

A batch is cut into passes before every latent column. The thought that enters at latent column t comes from the
pass that ended at column t-1: in the paper, the hidden state after the final norm. All passes share one key-value
cache, so every column is computed once:

    columns   q q q L L L s s a         (the first latent column is 3)
    passes   [q q q|L|L|L s s a]         (the last latent needs no pass of its own)

Source: Hao et al. 2024 (arXiv:2412.06769), section 3.

Legend: B rows, T columns, S columns of one pass, N supervised columns, D hidden, V vocabulary.
"""

from contextlib import closing
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from coconut.model.batch import Batch, latent_columns
from coconut.model.choice import open_passes
from coconut.model.feedback import Feedback
from coconut.model.parallel import read_in_parallel
from coconut.model.passes import PassOptions, PlainPasses, cut

IGNORED = -100
"""The label of a column without loss."""


def read_columns(passes: PlainPasses, feedback: Feedback, batch: Batch) -> Tensor:
    """Run the decoder over all columns, each once, feeding thoughts back where `is_latent_BT` says so.

    Rows need not be aligned, nor hold the same number of latents: a row without a latent at some column keeps its
    token's embedding there. Alignment only lowers the number of passes.

    Returns:
        Hidden states after the final norm, B x T x D. Padded columns hold arbitrary finite values.

    Raises:
        ValueError: if a row has a latent in column 0, which nothing could feed.
    """
    thinking = latent_columns(batch)
    if thinking and thinking[0] == 0:
        raise ValueError("a latent stands in column 0, where no column before it can feed it; give it a question")
    embeds_BTD = passes.embed(batch.input_ids_BT)
    if thinking and feedback.parallel_iterations:
        return read_in_parallel(passes, feedback, batch, embeds_BTD)
    hidden_parts: list[Tensor] = []
    thought_BD: Tensor | None = None
    num_columns = embeds_BTD.shape[1]
    for start, stop in pairwise([0, *cut(thinking, num_columns, passes.options.num_passes), num_columns]):
        embeds_BSD = embeds_BTD[:, start:stop]
        if thought_BD is not None:
            embeds_BSD = _put_first(embeds_BSD, thought_BD, where_B=batch.is_latent_BT[:, start])
        output = passes.read(embeds_BSD)
        hidden_parts.append(output.last_hidden_state)
        thought_BD = feedback(output, embeds_BSD[:, -1]) if stop < num_columns else None
    return torch.cat(hidden_parts, dim=1)


def _put_first(embeds_BSD: Tensor, thought_BD: Tensor, *, where_B: Tensor) -> Tensor:
    """Replace the first column's embedding by the thought in the rows that have a latent there."""
    first_BD = torch.where(where_B[:, None], thought_BD.to(embeds_BSD.dtype), embeds_BSD[:, 0])
    return torch.cat([first_BD[:, None], embeds_BSD[:, 1:]], dim=1)


def supervised_nll(passes: PlainPasses, hidden_BTD: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Sum the next-token loss over supervised columns; the head sees no other column.

    A sum and a count, not a mean: micro-batches hold different numbers of supervised tokens, so the caller divides
    once, after adding them all up. At most `PassOptions.max_logits` logits exist at a time.

    Returns:
        (nll, num_tokens): nats summed over tokens; how many there were.

    Source: Hao et al. 2024 (arXiv:2412.06769), section 3: no loss on question or thoughts.
    """
    labels_BT = batch.host.labels_BT
    # A column predicts the next one's token. Places are found on the CPU, so that no accelerator is waited for.
    is_supervised_BT = functional.pad(labels_BT[:, 1:] != IGNORED, (0, 1))
    places_N = is_supervised_BT.flatten().nonzero().flatten().to(hidden_BTD.device, non_blocking=True)
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, places_N)
    targets_N = batch.labels_BT.flatten().index_select(0, places_N + 1)
    chunk_size = max(1, passes.options.max_logits // passes.model.config.get_text_config().vocab_size)
    nll = hidden_BTD.new_zeros((), dtype=torch.float32)
    for chunk in zip(hidden_ND.split(chunk_size), targets_N.split(chunk_size), strict=True):
        if len(targets_N) > chunk_size and torch.is_grad_enabled():
            # Recomputed in the backward pass, so that one chunk's logits are all that is ever held.
            nll = nll + checkpoint(_chunk_nll, passes, *chunk, use_reentrant=False)
        else:
            nll = nll + _chunk_nll(passes, *chunk)
    return nll, len(targets_N)


def _chunk_nll(passes: PlainPasses, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    return functional.cross_entropy(passes.logits(hidden_ND).float(), targets_N, reduction="sum")


def latent_nll(
    model: PreTrainedModel,
    feedback: Feedback,
    batch: Batch,
    options: PassOptions | None = None,
    *,
    keys_B: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Sum the loss of a batch of views, thoughts fed back; see `read_columns` and `supervised_nll`.

    Args:
        keys_B: of the rows' dropout; see `model/dropout.py`.
    """
    with closing(open_passes(model, batch, feedback, options or PassOptions(), keys_B=keys_B)) as passes:
        hidden_BTD = read_columns(passes, feedback, batch)
        return supervised_nll(passes, hidden_BTD, batch)
