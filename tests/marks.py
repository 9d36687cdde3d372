"""Which cases of a test run by default, and which with the slow ones."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """All values, as cases of which only some are fast."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
