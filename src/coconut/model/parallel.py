"""All thoughts at once: a few rounds of fixed-point iteration instead of one pass per thought (Jacobi).

A thought depends on those before it, so thoughts are read one after another. Here every slot starts from the
embedding of `<|latent|>`, and a round reads all slots in one pass and replaces all thoughts together by what their
columns gave:

    question  |  L  L  L   ...       round 1: thought 1 is final, it depends on the question alone
                 1  L  L   ...       round 2: thoughts 1 and 2 are final
                 1  2  3   ...       round 3: all are; it equals the sequential result

With fewer rounds than thoughts the later ones are approximations, to which training adapts: 2 rounds over 6 thoughts
cost 3 passes instead of 7 (the question, 2 rounds, of which the last also reads on).

Source: Wu et al. 2025 (arXiv:2506.18582), parallel continuous chain-of-thought with Jacobi iteration.

Legend: B rows, T columns, S columns of one pass, D hidden.
"""

import torch
from torch import Tensor

from coconut.model.batch import Batch, latent_columns
from coconut.model.feedback import Feedback
from coconut.model.passes import PlainPasses


def read_in_parallel(passes: PlainPasses, feedback: Feedback, batch: Batch, embeds_BTD: Tensor) -> Tensor:
    """Read all columns, with `feedback.parallel_iterations` rounds over the span of the latent ones.

    Rows need not be aligned; a column of the span that is no latent in some row keeps its own embedding there.
    Rounds beyond a row's number of thoughts would change nothing, and are not made.

    Args:
        embeds_BTD: of all columns' own tokens.

    Returns:
        Hidden states of all columns after the final norm, B x T x D.
    """
    thinking = latent_columns(batch)
    first, last = thinking[0], thinking[-1]
    num_rounds = min(feedback.parallel_iterations, int(batch.host.is_latent_BT.sum(dim=1).max()))
    is_latent_BS1 = batch.is_latent_BT[:, first : last + 1, None]
    own_BSD = embeds_BTD[:, first : last + 1]
    prefix = passes.read(embeds_BTD[:, :first])
    first_thought_B1D = feedback(prefix, embeds_BTD[:, first - 1])[:, None].to(embeds_BTD.dtype)
    inputs_BSD = own_BSD
    for _ in range(num_rounds):
        thoughts_BSD = first_thought_B1D
        if first < last:
            read_BSD = inputs_BSD[:, :-1]
            output = passes.fork().read(read_BSD)
            later_BSD = feedback.of_columns(output, read_BSD).to(embeds_BTD.dtype)
            thoughts_BSD = torch.cat([first_thought_B1D, later_BSD], dim=1)
        inputs_BSD = torch.where(is_latent_BS1, thoughts_BSD, own_BSD)
    rest = passes.read(torch.cat([inputs_BSD, embeds_BTD[:, last + 1 :]], dim=1))
    return torch.cat([prefix.last_hidden_state, rest.last_hidden_state], dim=1)
