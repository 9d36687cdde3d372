"""Explicit chain of thought: all steps are written out. The warm-up of every curriculum."""

from coconut.methods import Layout, Method, State


class ChainOfThought(Method):
    """No text is removed, and nothing stands in its place."""

    role = "words"
    paper_arm = "CoT"

    def layout(self, stage: int, *, num_steps: int | None = None, state: State | None = None) -> Layout:
        return Layout()
