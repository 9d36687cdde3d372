"""What a model makes of a question: its answer, and the thoughts before it."""

from dataclasses import dataclass

from torch import Tensor

from coconut.evaluation.samples import majority


@dataclass(frozen=True)
class Solution:
    """The model's answer to one question."""

    text: str
    answer: str | None
    """Extracted from the text; None where it holds none."""
    num_generated_tokens: int
    """The end-of-sequence token included."""
    num_thoughts: int
    truncated: bool
    """True if the text was cut off before the model said that it was done."""
    samples: "tuple[Solution, ...]" = ()
    """Further answers to the same question, drawn."""

    @property
    def majority(self) -> str | None:
        """The answer that most samples give, the first of those that are given equally often."""
        return majority([sample.answer for sample in self.samples])


@dataclass(frozen=True)
class Thought:
    """A vector that entered a slot, and how the output head reads the state that it was made of."""

    tokens: list[tuple[str, float]]
    """The most probable tokens, with their probabilities."""
    entropy: float
    """Of the head's distribution, in nats."""
    vector: Tensor
    """D numbers, on the CPU in float32."""


@dataclass(frozen=True)
class Thinking:
    """A question, the thoughts about it, and the answer."""

    question: str
    thoughts: list[Thought]
    solution: Solution
