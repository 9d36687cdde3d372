"""The answer at once, without steps and without thoughts."""

from coconut.data.layouts import ALL_STEPS
from coconut.methods import Layout, Method, State


class NoChainOfThought(Method):
    """All steps are removed, and nothing stands in their place."""

    paper_arm = "No-CoT"
    shows_steps = False

    def layout(self, stage: int, *, num_steps: int | None = None, state: State | None = None) -> Layout:
        return Layout(ALL_STEPS)
