"""Renders chat templates, which come with models from elsewhere, in a child process with limits.

A template is a program. It may never end or ask for more memory than there is, and only the system can stop
it then. So a copy of this process (a fork, which needs no import) renders the prompts, and the system ends it
when it has used its share of processor time or memory.

The prompts do not depend on the day or on chance: the clock of a template stands still at `PROMPT_DATE`.
"""

import datetime
import functools
import gc
import json
import os
import random
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from loguru import logger

from coconut.data.examples import fold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_DATE = datetime.datetime(2024, 7, 26)
"""The day that templates show if they ask for the current one."""
MAX_SECONDS = 10
"""Processor time for up to 1,000 prompts. Common templates take a tenth of a second."""
MAX_BYTES = 1 << 30
"""Memory that a template may use in addition to what the process has."""
MAX_CHARACTERS = 1_000_000
"""Length of a prompt beyond the question. No model has as many positions."""


def render_prompts(tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str]) -> list[str]:
    """Put the tokenizer's chat template around each question, up to where the assistant begins.

    Raises:
        ValueError: There is no template, or it fails, takes too long, or asks for too much memory.
    """
    if not questions:
        return []
    if tokenizer.chat_template is None:
        raise ValueError(
            "encode.prompt: found 'chat', but the model's tokenizer has no chat template;"
            " use 'plain', or a model that was tuned for chat"
        )
    # tokenizers warns of forks after it has used threads, unless the variable says that they are wanted.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    answer = _in_child(tokenizer, questions)
    place = tokenizer.name_or_path or "the tokenizer"
    if "prompts" in answer:
        prompts: list[str] = answer["prompts"]
        if fold(questions[0]) not in fold(prompts[0]):
            _warn_once(f"{place}: its chat template leaves the question out: {prompts[0][:80]!r}")
        return prompts
    raise ValueError(
        f"{place}: its chat template {answer['failure']}; use encode.prompt: plain, or correct the template"
        " (chat_template.jinja, or chat_template in tokenizer_config.json)"
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("{}", message)


def _in_child(tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str]) -> dict[str, Any]:
    source, sink = os.pipe()
    process = os.fork()
    if process == 0:
        _render_and_exit(tokenizer, questions, sink)
    os.close(sink)
    with os.fdopen(source, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(process, 0)
    if status:
        return {"failure": f"does not end within {MAX_SECONDS} s of processor time, or fails outright"}
    answer: dict[str, Any] = json.loads(content)
    return answer


def _render_and_exit(tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str], sink: int) -> NoReturn:
    """Render in the child and end at once: the libraries of this process must not be cleaned up twice."""
    try:
        gc.disable()
        _limit(MAX_SECONDS * (1 + len(questions) // 1000))
        try:
            answer: dict[str, Any] = {"prompts": _render(tokenizer, questions)}
        except ValueError as error:
            answer = {"failure": str(error)}
        with os.fdopen(sink, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
        os._exit(0)
    finally:
        os._exit(1)


def _limit(num_seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (num_seconds, num_seconds + 1))
    if sys.platform == "linux":
        num_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        num_bytes = num_pages * resource.getpagesize() + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def _render(tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str]) -> list[str]:
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    prompts = []
    try:
        # transformers copies what is passed to a template, so a function can only replace the template's global.
        _compile_jinja_template(tokenizer.get_chat_template()).globals["strftime_now"] = PROMPT_DATE.strftime
        for question in questions:
            random.seed(0)  # A template may ask for a random choice.
            prompt: str = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                tokenize=False,
                date_string=PROMPT_DATE.strftime("%d %b %Y"),
            )
            prompts.append(prompt)
    except TemplateError as error:
        raise ValueError(f"cannot be rendered for a question of the user: {_shown(error)}") from error
    except MemoryError:
        raise ValueError(f"needs more than {MAX_BYTES >> 20} MB of memory") from None
    # The template's expressions are Python's, so they may raise anything.
    except Exception as error:
        raise ValueError(f"fails with {type(error).__name__}: {_shown(error)}") from error
    longest, question = max(zip(prompts, questions, strict=True), key=lambda pair: len(pair[0]) - len(pair[1]))
    if len(longest) > len(question) + MAX_CHARACTERS:
        raise ValueError(f"makes a prompt of {len(longest):,} characters of a question of {len(question):,}")
    return prompts


def _shown(error: Exception) -> str:
    return repr(" ".join(str(error).split())[:200])
