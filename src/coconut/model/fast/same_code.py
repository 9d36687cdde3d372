"""Recognising what transformers writes into each model family anew."""

from collections.abc import Callable
from types import FunctionType
from typing import Any


def is_same_code(one: Any, other: Callable[..., Any]) -> bool:
    """Say whether these are two functions that run the same instructions on the same names and constants.

    What they call by name may differ, and so may their docstrings.
    """
    if not isinstance(one, FunctionType) or not isinstance(other, FunctionType):
        return False
    first, second = (
        (function.__code__.co_code, function.__code__.co_consts[1:], function.__code__.co_names, function.__defaults__)
        for function in (one, other)
    )
    return first == second
