"""Samples: a question is read once, and then thought about, or answered, in several ways.

Answers are drawn token by token at a temperature. Thoughts are drawn by Gaussian noise on every vector that enters a
slot, or by dropout in the passes that form a thought. The rows of a batch are repeated where the first draw happens,
with what the key-value cache holds of the question.

Every draw is a function of the sample's key and of its place, so that a sample does not depend on the batch, on the
order of questions, or on how many samples there are.

Source: dropout in the passes that form thoughts, and noise on thoughts, as in LatentTTS (2025); there, dropout acts on
the whole question too, which then has to be read once for every sample.

Legend: B questions, N samples of each, R = B N rows, T columns, D hidden, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coconut.model.batch import Batch, latent_columns
from coconut.model.choice import open_passes
from coconut.model.draws import normals, uniforms
from coconut.model.dropout import RowDropout
from coconut.model.fast.layers import checkpointable_blocks
from coconut.model.feedback import Feedback
from coconut.model.generation import Decoded, Running, decode
from coconut.model.latent import read_columns
from coconut.model.passes import PassOptions, PlainPasses

Noise = Literal["none", "gaussian", "dropout"]
_THOUGHTS = 1 << 32
"""Purpose of a draw for thoughts, before the number of the slot; answers take the number of the token."""


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    num_samples: int
    temperature: float
    """Of the answers' tokens; 0 takes the most probable ones."""
    noise: Noise = "none"
    """What makes thoughts differ."""
    noise_scale: float = 0.0
    """Standard deviation of every coordinate, or the probability of dropout."""


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    feedback: Feedback,
    batch: Batch,
    keys_BN: Tensor,
    sampling: Sampling,
    *,
    eos_ids: Collection[int],
    max_new_tokens: Sequence[int],
    options: PassOptions | None = None,
) -> list[list[Decoded]]:
    """Decode several continuations of each row of a left-padded batch of prompts.

    Args:
        keys_BN: int64, one for each sample.
        max_new_tokens: a limit for each prompt.

    Returns:
        For each row, its samples in the order of their keys.

    Raises:
        ValueError: thoughts are to be drawn in a way that the model or the feedback does not have.
    """
    num_samples, keys_R = keys_BN.shape[1], keys_BN.to(batch.input_ids_BT.device).flatten()
    rows_R = torch.arange(len(batch.input_ids_BT), device=keys_R.device).repeat_interleave(num_samples)
    num_further = max(0, max(max_new_tokens, default=0) - 1)
    with closing(
        open_passes(model, batch, feedback, options or PassOptions(), num_further_columns=num_further)
    ) as passes:
        last_RD = _Prompts(passes, feedback, batch, rows_R, keys_R, sampling).read()

        def choose(logits_RV: Tensor, rows: Sequence[int], step: int) -> Tensor:
            return draw_tokens(logits_RV, keys_R[list(rows)], step, temperature=sampling.temperature)

        running = Running(passes, batch.position_ids_BT[rows_R, -1], last_RD, choose)
        decoded = decode(running, [limit for limit in max_new_tokens for _ in range(num_samples)], eos_ids)
    return [decoded[start : start + num_samples] for start in range(0, len(decoded), num_samples)]


def draw_tokens(logits_RV: Tensor, keys_R: Tensor, step: int, *, temperature: float) -> Tensor:
    """Draw a token for each row by the inverse of its distribution; R ids."""
    if temperature == 0:
        return logits_RV.argmax(dim=-1)
    sums_RV = (logits_RV.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    wanted_R1 = uniforms(keys_R, step, 1) * sums_RV[:, -1:]
    return torch.searchsorted(sums_RV, wanted_R1, right=True)[:, 0].clamp(max=logits_RV.shape[1] - 1)


@dataclass
class _Prompts:
    """Reads prompts, whose rows are repeated on the way."""

    passes: PlainPasses
    feedback: Feedback
    batch: Batch
    rows_R: Tensor
    keys_R: Tensor
    sampling: Sampling

    def read(self) -> Tensor:
        """Return the hidden state of each row's last column, R x D."""
        slots = latent_columns(self.batch)
        if self.sampling.noise == "none" or not slots:
            last_BD = read_columns(self.passes, self.feedback, self.batch)[:, -1]
            self.passes.select(self._rows_on_cpu())
            return last_BD[self.rows_R]
        if self.feedback.parallel_iterations:
            raise ValueError(
                "noise on thoughts is drawn thought by thought, but this entry computes them all at once"
                " (parallel_iterations above 0); take none, so that only answers are drawn"
            )
        assert bool(self.batch.host.is_latent_BT[:, slots[0] : slots[-1] + 1].all()), (
            "rows have their slots in the same columns"
        )
        return self._think(slots)

    def _rows_on_cpu(self) -> Tensor:
        return torch.arange(len(self.batch.input_ids_BT)).repeat_interleave(self.sampling.num_samples)

    def _think(self, slots: list[int]) -> Tensor:
        embeds_BTD = self.passes.embed(self.batch.input_ids_BT)
        drops = self.sampling.noise == "dropout"
        # The pass that forms the first thought is the first one that dropout acts in: the column before the slots.
        shared = slots[0] - 1 if drops else slots[0]
        read = self.passes.read(embeds_BTD[:, :shared]) if shared else None
        thought_RD: Tensor | None = None
        if read is not None and not drops:
            thought_RD = self.feedback(read, embeds_BTD[:, shared - 1])[self.rows_R]
        self.passes.select(self._rows_on_cpu())
        embeds_RTD, positions_RT = embeds_BTD[self.rows_R], self.batch.position_ids_BT[self.rows_R]
        with self._dropping(positions_RT) if drops else ExitStack():
            for start in [shared, *slots[:-1]] if drops else slots[:-1]:
                inputs_R1D = (
                    embeds_RTD[:, start : start + 1] if thought_RD is None else thought_RD[:, None].to(embeds_RTD)
                )
                if start in slots:
                    inputs_R1D = self._with_noise(inputs_R1D, slots.index(start))
                output = self.passes.read(inputs_R1D, positions_RT[:, start : start + 1])
                thought_RD = self.feedback(output, inputs_R1D[:, -1])
        assert thought_RD is not None
        last = self._with_noise(thought_RD[:, None].to(embeds_RTD), len(slots) - 1)
        rest_RSD = torch.cat([last, embeds_RTD[:, slots[-1] + 1 :]], dim=1)
        hidden_RSD: Tensor = self.passes.read(rest_RSD, positions_RT[:, slots[-1] :]).last_hidden_state
        return hidden_RSD[:, -1]

    def _with_noise(self, vectors_R1D: Tensor, slot: int) -> Tensor:
        if self.sampling.noise != "gaussian":
            return vectors_R1D
        noise_RD = normals(self.keys_R, _THOUGHTS + slot, vectors_R1D.shape[-1])
        return vectors_R1D + (self.sampling.noise_scale * noise_RD[:, None]).to(vectors_R1D.dtype)

    @contextmanager
    def _dropping(self, positions_RT: Tensor) -> Iterator[None]:
        """Let the dropout modules of the decoder's layers drop, by draws that belong to the samples."""
        model = self.passes.model
        modules = find_dropouts(model)
        before = [(module, module.p, module.training) for module in modules]
        self.passes.dropout = RowDropout(model, self.keys_R, positions_RT)
        try:
            for module in modules:
                module.p, module.training = self.sampling.noise_scale, True
            yield
        finally:
            self.passes.dropout = None
            for module, probability, training in before:
                module.p, module.training = probability, training


def find_dropouts(model: PreTrainedModel) -> list[nn.Dropout]:
    """List the dropout modules of the decoder's layers.

    Raises:
        ValueError: there are none, as in most families since GPT-2.
    """
    found = [
        module for block in checkpointable_blocks(model) for module in block.modules() if isinstance(module, nn.Dropout)
    ]
    if not found:
        raise ValueError(
            f"noise dropout: the layers of {type(model).__name__} have no dropout modules; take gaussian noise, or"
            " draw answers only"
        )
    return found
