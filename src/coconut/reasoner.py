"""The Python interface: ask a trained model, or score it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coconut.config import LatentConfig
from coconut.data.collator import collate
from coconut.data.encoding import encode_example, encode_question, find_unknown_word, tokenize_texts
from coconut.data.examples import MARKERS, Example
from coconut.data.views import MarkerIds, build_prompt, build_view
from coconut.evaluation.answers import extract_answer
from coconut.evaluation.evaluator import Evaluator
from coconut.model.base import add_markers, load_checkpoint
from coconut.model.feedback import Feedback, build_feedback, load_feedback
from coconut.model.latent import latent_nll
from coconut.model.meta import CheckpointMeta


@dataclass(frozen=True)
class Solution:
    """What the model made of one question."""

    text: str
    answer: str | None
    """Extracted from the text; None where it holds none."""
    num_generated_tokens: int
    """The end-of-sequence token included."""
    num_thoughts: int
    truncated: bool
    """True if the text was cut off before the model said that it was done."""


class Reasoner:
    """A language model that reasons in continuous thoughts.

    ```python
    reasoner = Reasoner.from_pretrained("outputs/latent_4/checkpoint")
    reasoner.solve(["10 - 10 - 5 + 8 - 5 ?"])[0].answer
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        meta: CheckpointMeta,
        feedback: Feedback | None = None,
    ) -> None:
        """Put the parts together; `feedback` is needed where it was trained, as `projection` is."""
        self.model = model
        self.tokenizer = tokenizer
        self.meta = meta
        iterations = meta.parallel_iterations
        self.feedback = feedback or build_feedback(meta.thought, model, parallel_iterations=iterations)
        self.markers = MarkerIds(*tokenizer.convert_tokens_to_ids(list(MARKERS)))

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        c_thought: int | None = None,
        max_latent_stage: int | None = None,
        markers: bool | None = None,
        device: str = "cpu",
    ) -> "Reasoner":
        """Open a checkpoint of this pipeline, or a plain Hugging Face folder.

        A checkpoint says itself how many thoughts it was trained with; what is given here wins.
        For a plain folder all three must be given. Markers that its vocabulary holds are kept.

        Raises:
            ValueError: for a plain folder, if one of the three is missing.
        """
        model, tokenizer, meta = load_checkpoint(Path(folder), device=device)
        given = {"c_thought": c_thought, "max_latent_stage": max_latent_stage, "markers": markers}
        if meta is None:
            missing = [name for name, value in given.items() if value is None]
            if missing:
                raise ValueError(
                    f"{folder}: a plain model folder, without our coconut.json; give {', '.join(missing)} too"
                )
            add_markers(model, tokenizer)
            paper = LatentConfig(0, 0, True, False, uniform_prob=0.0, thought="hidden[-1]", parallel_iterations=0)
            meta = CheckpointMeta.of("coconut", max_latent_stage or 0, paper, prompt="plain")
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        iterations = meta.parallel_iterations
        feedback = load_feedback(Path(folder), meta.thought, model, parallel_iterations=iterations)
        return cls(model.eval(), tokenizer, replace(meta, **changes), feedback)

    def solve(
        self,
        questions: Sequence[str],
        num_thoughts: int | None = None,
        max_new_tokens: int | None = None,
        *,
        batch_size: int = 64,
    ) -> list[Solution]:
        """Answer the questions, greedily.

        Args:
            num_thoughts: vectors fed back before the answer; as many as in training when None.
            max_new_tokens: limit of each answer; 256 when None.
        """
        plan = self.meta.plan()
        if num_thoughts is not None:
            if num_thoughts < 0:
                raise ValueError(f"num_thoughts: found {num_thoughts}, wanted at least 0")
            plan = replace(plan, num_latents=num_thoughts)
        evaluator = Evaluator(
            self.model,
            self.feedback,
            self.tokenizer,
            plan,
            self.markers,
            max_new_tokens=256 if max_new_tokens is None else max_new_tokens,
            batch_size=batch_size,
        )
        ids = [encode_question(self.tokenizer, question, self.meta.prompt) for question in questions]
        for question, words in zip(questions, tokenize_texts(self.tokenizer, questions), strict=True):
            word = find_unknown_word(self.tokenizer, words, question)
            if word is not None:
                logger.warning("{!r}: {!r} is unknown to the model's tokenizer", question[:80], word[:80])
        rows = evaluator.decode([build_prompt(row, plan=plan, markers=self.markers) for row in ids])
        texts = [self.tokenizer.decode(row.ids, skip_special_tokens=True) for row in rows]
        return [
            Solution(text, extract_answer(text), row.num_tokens, plan.num_latents, row.truncated)
            for row, text in zip(rows, texts, strict=True)
        ]

    def nll(self, examples: Sequence[Example], latent_stage: int) -> tuple[Tensor, int]:
        """Sum of the negative log-likelihood of what is text at `latent_stage`; differentiable.

        Returns:
            (nll, num_tokens): nats summed over the supervised tokens; how many there were.
        """
        views = []
        for example in examples:
            encoded = encode_example(self.tokenizer, example, self.meta.prompt)
            views.append(build_view(*encoded, plan=self.meta.plan_at(latent_stage), markers=self.markers))
        batch = collate(views, pad_id=int(self.tokenizer.pad_token_id or 0)).to(self.model.device)
        return latent_nll(self.model, self.feedback, **batch._asdict())
