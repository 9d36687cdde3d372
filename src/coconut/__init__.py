"""Train language models to reason in continuous thoughts, and use them.

    from coconut import Example, Reasoner

Names are imported on first use: pipeline stages that need no torch do not wait for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coconut.data.examples import Example
    from coconut.evaluation.answers import same_answer
    from coconut.reasoner import Reasoner
    from coconut.solutions import Solution, Thinking, Thought
    from coconut.training.method_check import check_method

__version__ = "0.2.0"
__all__ = ["Example", "Reasoner", "Solution", "Thinking", "Thought", "__version__", "check_method", "same_answer"]

_HOMES = {"Example": "coconut.data.examples", "Reasoner": "coconut.reasoner"} | dict.fromkeys(
    ("Solution", "Thinking", "Thought"), "coconut.solutions"
)
_HOMES["same_answer"] = "coconut.evaluation.answers"
_HOMES["check_method"] = "coconut.training.method_check"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'coconut' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
