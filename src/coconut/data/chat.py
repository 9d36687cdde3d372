"""Renders chat templates, which come with models from elsewhere, in transformers' sandbox.

A template is a program: it can touch nothing outside its sandbox, but one that never ends hangs the stage; Ctrl-C ends
it. The prompts do not depend on the day or on chance: the clock of a template stands still at `PROMPT_DATE`.
"""

import datetime
import functools
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loguru import logger

from coconut.data.examples import fold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_DATE = datetime.datetime(2024, 7, 26)
"""The day that templates show if they ask for the current one."""
MAX_CHARACTERS = 1_000_000
"""Length of a prompt beyond the question. No model has as many positions."""


def render_prompts(tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str]) -> list[str]:
    """Put the tokenizer's chat template around each question, up to where the assistant begins.

    Raises:
        ValueError: There is no template, or it fails, or what it makes is far too long.
    """
    if not questions:
        return []
    if tokenizer.chat_template is None:
        raise ValueError(
            "encode.prompt: found 'chat', but the model's tokenizer has no chat template;"
            " use 'plain', or a model that was tuned for chat"
        )
    place = tokenizer.name_or_path or "the tokenizer"
    state = random.getstate()
    try:
        prompts = [_render(tokenizer, question) for question in questions]
    except ValueError as error:
        raise ValueError(
            f"{place}: its chat template {error}; use encode.prompt: plain, or correct the template"
            " (chat_template.jinja, or chat_template in tokenizer_config.json)"
        ) from error
    finally:
        random.setstate(state)
    if fold(questions[0]) not in fold(prompts[0]):
        _warn_once(f"{place}: its chat template leaves the question out: {prompts[0][:80]!r}")
    return prompts


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("{}", message)


def _render(tokenizer: "PreTrainedTokenizerBase", question: str) -> str:
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    random.seed(0)  # A template may ask for a random choice.
    try:
        # transformers copies what is passed to a template, so a function can only replace the template's global.
        _compile_jinja_template(tokenizer.get_chat_template()).globals["strftime_now"] = PROMPT_DATE.strftime
        prompt: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            tokenize=False,
            date_string=PROMPT_DATE.strftime("%d %b %Y"),
        )
    # The template's expressions are Python's, so they may raise anything.
    except Exception as error:
        is_refusal = isinstance(error, TemplateError)
        kind = "cannot be rendered for a question of the user" if is_refusal else f"fails with {type(error).__name__}"
        raise ValueError(f"{kind}: {' '.join(str(error).split())[:200]!r}") from error
    if len(prompt) > len(question) + MAX_CHARACTERS:
        raise ValueError(f"makes a prompt of {len(prompt):,} characters of a question of {len(question):,}")
    return prompt
