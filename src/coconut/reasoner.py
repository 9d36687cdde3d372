"""The Python interface: ask a trained model, or score it."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coconut.arguments import as_list, check_device, check_example, check_not_blank, check_number, check_sampling
from coconut.checkpoints.card import CARD_FILE, write_card
from coconut.checkpoints.feedback import load_feedback, save_feedback
from coconut.checkpoints.folder import load_checkpoint, save_checkpoint
from coconut.checkpoints.markers import add_markers
from coconut.checkpoints.meta import META_FILE, CheckpointMeta
from coconut.checkpoints.origin import find_folder
from coconut.checkpoints.released import find_released
from coconut.checkpoints.support import check_supported
from coconut.config.schema import LatentConfig
from coconut.data.collator import Batch, collate
from coconut.data.encoding import (
    EncodedExample,
    answer_start,
    encode_example,
    encode_questions,
    find_unknown_word,
    tokenize_texts,
)
from coconut.data.examples import Example
from coconut.data.layouts import Layout
from coconut.data.views import IGNORED, MarkerIds, ViewWriter, prompt_length
from coconut.evaluation.answers import same_answer
from coconut.evaluation.evaluator import Evaluator
from coconut.evaluation.outcomes import read_answer
from coconut.files import replace_file
from coconut.layout import checkpoint_dir
from coconut.methods import DEFAULT
from coconut.model.choice import is_noted, open_passes
from coconut.model.feedback import Feedback, build_feedback
from coconut.model.generation import Decoded
from coconut.model.head import num_positions
from coconut.model.latent import latent_nll, read_columns
from coconut.model.passes import PassOptions
from coconut.model.sampling import Noise
from coconut.model.thoughts import Edit
from coconut.probing.decoding import entropies, top_tokens
from coconut.probing.subject import Subject
from coconut.solutions import Solution, Thinking, Thought

Intervention = Callable[[int, Tensor, Sequence[int]], Tensor]
"""(slot, counted from 0; the vectors that are about to enter it, B x D; the places of their questions) -> B x D."""


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
        self.writer = ViewWriter.of(tokenizer)

    def __repr__(self) -> str:
        num_weights = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"Reasoner({type(self.model).__name__}, {num_weights:,} weights on {self.model.device}, method"
            f" {self.meta.method}, {self.meta.layout().num_latents} thoughts)"
        )

    def to(self, device: str) -> "Reasoner":
        """Move the model to a device, as torch names it, and return this reasoner."""
        check_device(device)
        self.model.to(device)
        self.feedback.to(device)
        return self

    @property
    def markers(self) -> MarkerIds:
        """Ids of `<|start-latent|>`, `<|end-latent|>` and `<|latent|>`."""
        return self.writer.markers

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        c_thought: int | None = None,
        max_latent_stage: int | None = None,
        markers: bool | None = None,
        device: str = "cpu",
        prove: bool = True,
    ) -> "Reasoner":
        """Open a checkpoint of this pipeline, a plain Hugging Face folder, or a model of the hub by its id.

        A checkpoint says itself how many thoughts it was trained with; what is given here wins. In a work tree, the
        name of an entry stands for its checkpoint.
        For a plain folder all three must be given. Markers that its vocabulary holds are kept.

        Args:
            prove: whether a model that no stage `base` has seen is tried first, as `base` does: whether it gives the
                same in passes over a padded batch as one row at a time. It takes seconds.

        Raises:
            ValueError: for a plain folder, if one of the three is missing; for a value of the wrong kind; for a model
                that cannot be read in passes.
        """
        if c_thought is not None:
            check_number("c_thought", c_thought, at_least=0)
        if max_latent_stage is not None:
            check_number("max_latent_stage", max_latent_stage, at_least=0)
        if markers is not None and not isinstance(markers, bool):
            raise ValueError(f"markers: found {markers!r}, wanted True or False")
        check_device(device)
        path = checkpoint_dir(str(folder)) if _is_entry(str(folder)) else find_folder(folder)
        model, tokenizer, meta = load_checkpoint(path, device=device)
        meta = meta or find_released(str(folder))
        given = {"c_thought": c_thought, "max_latent_stage": max_latent_stage, "markers": markers}
        if meta is None:
            if missing := [name for name, value in given.items() if value is None]:
                raise ValueError(
                    f"{folder}: a plain model folder, without our coconut.json; give {', '.join(missing)} too"
                )
            add_markers(model, tokenizer)
            paper = LatentConfig(0, 0, True, False, uniform_prob=0.0, thought="hidden[-1]", parallel_iterations=0)
            meta = CheckpointMeta.of(DEFAULT, max_latent_stage or 0, paper, prompt="plain")
        if prove and not is_noted(model):
            try:
                check_supported(model)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        feedback = load_feedback(path, meta.thought, model, parallel_iterations=meta.parallel_iterations)
        return cls(model.eval(), tokenizer, replace(meta, **changes), feedback)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a checkpoint that `from_pretrained` opens: a Hugging Face folder, with a model card.

        Raises:
            ValueError: if the folder is there and is no checkpoint, or transformers refuses to save the model.
            OSError: if it cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / META_FILE).is_file():
            raise ValueError(
                f"{folder}: found something that is no checkpoint of ours; name a folder that is not there"
            )
        save_checkpoint(folder, self.model, self.tokenizer, self.meta)
        save_feedback(folder, self.feedback)
        replace_file(folder / CARD_FILE, write_card(folder.name, self.meta, self.tokenizer, training={}))

    def solve(
        self,
        questions: Sequence[str],
        num_thoughts: int | None = None,
        max_new_tokens: int | None = None,
        *,
        batch_size: int = 64,
        in_words: bool = False,
        intervene: Intervention | None = None,
        num_samples: int = 0,
        temperature: float = 0.7,
        thought_noise: Noise = "none",
        noise_scale: float = 0.0,
        seed: int = 0,
    ) -> list[Solution]:
        """Answer the questions, greedily; and several times more, at random, where samples are asked for.

        Args:
            num_thoughts: vectors fed back before the answer; as many as in training when None.
            max_new_tokens: limit of each answer; 256 when None. An answer also ends with the model's positions.
            in_words: no text may begin with the answer's mark, so that with fewer thoughts than in training the model
                says aloud what it does not think.
            intervene: what enters the slots instead of the thoughts, of the greedy answer.
            num_samples: further answers, in `Solution.samples`; each depends on the seed, the question and its number
                alone.
            temperature: of the samples' tokens; 0 takes the most probable ones.
            thought_noise: "gaussian" or "dropout", which makes the thoughts of samples differ.
            noise_scale: standard deviation of every coordinate, or the probability of dropout.

        Raises:
            ValueError: for a value of the wrong kind, or a question that leaves no position for an answer.
        """
        sampling = check_sampling(num_samples, temperature, thought_noise, noise_scale, seed)
        questions = as_list("questions", questions, str)
        for i, question in enumerate(questions):
            check_not_blank(f"questions[{i}]", question)
        layout = self.meta.layout()
        if num_thoughts is not None:
            check_number("num_thoughts", num_thoughts, at_least=0)
            layout = replace(layout, num_latents=num_thoughts)
        if max_new_tokens is not None:
            check_number("max_new_tokens", max_new_tokens, at_least=1)
        check_number("batch_size", batch_size, at_least=1)
        evaluator = self._evaluator(layout, max_new_tokens, batch_size)
        ids = encode_questions(self.tokenizer, questions, self.meta.prompt)
        for i, row in enumerate(ids):
            self._check_fits(f"questions[{i}]", prompt_length(row, layout) + 1, layout)
        self._warn_of_unknown_words(questions, questions)
        prompts = evaluator.prompts(ids)
        rows = evaluator.decode(
            prompts,
            edits=None if intervene is None else partial(_edit, intervene),
            not_first=answer_start(self.tokenizer) if in_words else (),
        )
        drawn = evaluator.sample(prompts, sampling, seed) if num_samples else [[] for _ in prompts]
        return [
            replace(self._solution(row, layout), samples=tuple(self._solution(one, layout) for one in samples))
            for row, samples in zip(rows, drawn, strict=True)
        ]

    def _solution(self, row: Decoded, layout: Layout) -> Solution:
        text = self.tokenizer.decode(row.ids, skip_special_tokens=True)
        return Solution(text, read_answer(text, self.meta.answer), row.num_tokens, layout.num_latents, row.truncated)

    def think(
        self,
        questions: Sequence[str],
        num_thoughts: int | None = None,
        max_new_tokens: int | None = None,
        *,
        top: int = 5,
        batch_size: int = 64,
    ) -> list[Thinking]:
        """Answer the questions as `solve` does, and return what was thought on the way.

        With fewer thoughts than in training the rest is said in words.

        Args:
            top: most probable tokens of each thought that are returned.

        Raises:
            ValueError: as `solve`.
        """
        check_number("top", top, at_least=1)
        trained = self.meta.layout()
        layout = trained if num_thoughts is None else replace(trained, num_latents=num_thoughts)
        solutions = self.solve(
            questions,
            num_thoughts,
            max_new_tokens,
            batch_size=batch_size,
            in_words=layout.num_latents < trained.num_latents,
        )
        if not solutions or layout.num_latents == 0:
            return [Thinking(question, [], solution) for question, solution in zip(questions, solutions, strict=True)]
        ids = encode_questions(self.tokenizer, questions, self.meta.prompt)
        encoded = [EncodedExample(row, [], []) for row in ids]
        examples = [Example(question) for question in questions]
        subject = Subject(
            self._evaluator(layout, max_new_tokens, batch_size),
            examples,
            encoded,
            range(len(examples)),
            self.meta.prompt,
        )
        probs_NKV = subject.decoded(subject.trace.states_NJD[:, :-1])
        return [
            Thinking(question, self._read_thoughts(probs_KV, vectors_KD, top), solution)
            for question, probs_KV, vectors_KD, solution in zip(
                questions, probs_NKV, subject.trace.vectors_NKD, solutions, strict=True
            )
        ]

    @torch.no_grad()
    def embedding(self, words: Sequence[str]) -> Tensor:
        """Return the mean of the input embeddings of words, D numbers, to put it into a slot with `intervene`.

        A word of several tokens stands for its first one, as in the probes.

        Raises:
            ValueError: if there is no word, one is empty, or the tokenizer does not know it.
        """
        words = as_list("words", words, str)
        if not words:
            raise ValueError("words: found none, wanted at least one; a mean over nothing has no value")
        for i, word in enumerate(words):
            check_not_blank(f"words[{i}]", word)
        rows = tokenize_texts(self.tokenizer, words)
        for i, (word, ids) in enumerate(zip(words, rows, strict=True)):
            if not ids or find_unknown_word(self.tokenizer, ids, word) is not None:
                raise ValueError(f"words[{i}]: found {word!r:.60}, which the model's tokenizer does not know")
        first = torch.tensor([ids[0] for ids in rows], device=self.model.device)
        mean_D: Tensor = self.model.get_input_embeddings()(first).float().mean(dim=0)
        return mean_D

    def _evaluator(self, layout: Layout, max_new_tokens: int | None, batch_size: int) -> Evaluator:
        return Evaluator(
            self.model,
            self.feedback,
            self.tokenizer,
            layout,
            max_new_tokens=256 if max_new_tokens is None else max_new_tokens,
            batch_size=batch_size,
        )

    def _read_thoughts(self, probs_KV: Tensor, vectors_KD: Tensor, top: int) -> list[Thought]:
        return [
            Thought(top_tokens(self.tokenizer, probs_V, top), float(entropies(probs_V)), vector_D)
            for probs_V, vector_D in zip(probs_KV, vectors_KD, strict=True)
        ]

    def nll(self, examples: Sequence[Example], latent_stage: int) -> tuple[Tensor, int]:
        """Sum of the negative log-likelihood of what is text at `latent_stage`; differentiable.

        Returns:
            (nll, num_tokens): nats summed over the supervised tokens; how many there were.

        Raises:
            ValueError: for a value of the wrong kind, no example at all, or one that does not fit the model.
        """
        return latent_nll(self.model, self.feedback, self._batch(examples, latent_stage))

    def _batch(self, examples: Sequence[Example], latent_stage: int) -> Batch:
        """Lay the examples out at a latent stage."""
        examples = as_list("examples", examples, Example)
        if not examples:
            raise ValueError("examples: found none, wanted at least one; a loss over nothing has no mean")
        for i, example in enumerate(examples):
            check_example(f"examples[{i}]", example)
        check_number("latent_stage", latent_stage, at_least=0)
        layout = self.meta.layout_at(latent_stage)
        views = []
        for i, example in enumerate(examples):
            encoded = encode_example(self.tokenizer, example, self.meta.prompt)
            # Before the view is built: a million thoughts would be a list of a million ids.
            self._check_fits(f"examples[{i}]", prompt_length(encoded.question_ids, layout) + 1, layout)
            views.append(self.writer.view(encoded, layout))
            self._check_fits(f"examples[{i}]", len(views[-1].input_ids), layout)
        texts = ["\n".join((example.question, *example.steps, example.answer)) for example in examples]
        self._warn_of_unknown_words([example.question for example in examples], texts)
        return collate(views, pad_id=int(self.tokenizer.pad_token_id or 0)).to(self.model.device)

    @torch.no_grad()
    def logits(self, examples: Sequence[Example], latent_stage: int) -> list[Tensor]:
        """Return the logits of what is text at `latent_stage`, by which `nll` judges it: tokens x V for each example.

        Raises:
            ValueError: as `nll`.
        """
        batch = self._batch(examples, latent_stage)
        with closing(open_passes(self.model, batch, self.feedback, PassOptions())) as passes:
            hidden_BTD = read_columns(passes, self.feedback, batch)
            is_judged_BT = (batch.labels_BT != IGNORED)[:, 1:]
            return [
                passes.logits(row_TD[:-1][is_judged_T])
                for row_TD, is_judged_T in zip(hidden_BTD, is_judged_BT, strict=True)
            ]

    def score(
        self,
        examples: Sequence[Example],
        num_thoughts: int | None = None,
        max_new_tokens: int | None = None,
        *,
        batch_size: int = 64,
    ) -> float:
        """Return the share of questions that are answered right, as the stage `evaluate` judges them.

        Args:
            max_new_tokens: `evaluate.max_new_tokens` of params.yaml, to get the accuracy of `metrics.json`.

        Raises:
            ValueError: as `solve`; if there is no example.
        """
        examples = as_list("examples", examples, Example)
        if not examples:
            raise ValueError("examples: found none, wanted at least one; an accuracy over nothing has no value")
        questions = [example.question for example in examples]
        solutions = self.solve(questions, num_thoughts, max_new_tokens, batch_size=batch_size)
        pairs = zip(solutions, examples, strict=True)
        return sum(same_answer(solution.answer, example.answer) for solution, example in pairs) / len(examples)

    def _check_fits(self, place: str, num_tokens: int, layout: Layout) -> None:
        if num_tokens > (room := num_positions(self.model)):
            raise ValueError(
                f"{place}: found {num_tokens} tokens, {layout.num_latents} of them thoughts and at least 1 the"
                f" answer's, wanted at most {room}, the model's positions; shorten the text, or take fewer thoughts"
            )

    def _warn_of_unknown_words(self, questions: Sequence[str], texts: Sequence[str]) -> None:
        for question, text, ids in zip(questions, texts, tokenize_texts(self.tokenizer, texts), strict=True):
            if (word := find_unknown_word(self.tokenizer, ids, text)) is not None:
                logger.warning("{!r}: {!r} is unknown to the model's tokenizer", question[:80], word[:80])


def _is_entry(name: str) -> bool:
    """Say whether a name is that of a trained entry of the work tree around us, and of no folder."""
    return "/" not in name and not Path(name).exists() and checkpoint_dir(name).is_dir()


def _edit(intervene: Intervention, places: Sequence[int]) -> Edit:
    def edit(slot: int, vector_BD: Tensor) -> Tensor:
        entering = intervene(slot, vector_BD, places)
        if not isinstance(entering, Tensor) or entering.shape != vector_BD.shape:
            found = f"a tensor of shape {tuple(entering.shape)}" if isinstance(entering, Tensor) else repr(entering)
            raise ValueError(f"intervene: returned {found:.80}, wanted a tensor of shape {tuple(vector_BD.shape)}")
        if not entering.is_floating_point() or not bool(entering.isfinite().all()):
            raise ValueError(f"intervene: returned {entering.dtype} that are not all finite, in slot {slot}")
        return entering.to(vector_BD)

    return edit
