"""Examples as token ids: the one place that knows the text form.

The contract of an encoded example is its three parts. Each is tokenised on its own, so that cutting
off steps leaves the ids of what remains as they were.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from coconut.data.examples import MARKERS, Example

if TYPE_CHECKING:
    # It takes a while to import, and readers of this module may not need it.
    from transformers import PreTrainedTokenizerBase

ANSWER_MARK = "### "
SPECIAL_TOKEN_COMPLAINT = (
    "holds {}, a special token of the model's tokenizer, wanted plain text; take it out of the text"
)
# Llama's templates put today's date into the prompt unless they are given one.
_TEMPLATE_DATE = "26 Jul 2024"


class EncodedExample(NamedTuple):
    """The token ids of an example's three parts; the answer ends with the end-of-text token."""

    question_ids: list[int]
    steps_ids: list[list[int]]
    answer_ids: list[int]


def example_texts(tokenizer: "PreTrainedTokenizerBase", example: Example, prompt: str = "plain") -> list[str]:
    r"""Write an example as the texts that are tokenised one by one: question, steps, answer.

    >>> example_texts(None, Example("2 + 2 + 1 ?", ["4", "5"], "5"))
    ['2 + 2 + 1 ?\n', '4\n', '5\n', '### 5']
    """
    question = _question_text(tokenizer, example.question, prompt)
    return [question, *(f"{step}\n" for step in example.steps), ANSWER_MARK + example.answer]


def encode_example(tokenizer: "PreTrainedTokenizerBase", example: Example, prompt: str = "plain") -> EncodedExample:
    """Encode one example; see `encode_batch`."""
    return encode_batch(tokenizer, [example], prompt)[0]


def encode_question(tokenizer: "PreTrainedTokenizerBase", question: str, prompt: str = "plain") -> list[int]:
    """Encode a question alone, exactly as `encode_example` does.

    Raises:
        ValueError: if the question holds a special token's text, or the tokenizer has no chat template but needs it.
    """
    _refuse_special_tokens(tokenizer, [Example(question)])
    text = _question_text(tokenizer, question, prompt)
    return bos_ids(tokenizer, prompt) + tokenize_texts(tokenizer, [text])[0]


def encode_batch(
    tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example], prompt: str = "plain"
) -> list[EncodedExample]:
    """Encode examples with one call of the tokenizer.

    Raises:
        ValueError: if a text holds a special token's, or the tokenizer has no chat template but needs it.
    """
    _refuse_special_tokens(tokenizer, examples)
    return encode_texts(tokenizer, [example_texts(tokenizer, example, prompt) for example in examples], prompt)


def find_special_tokens(tokenizer: "PreTrainedTokenizerBase", examples: Iterable[Example]) -> list[str | None]:
    """The first special token that each example's text spells out; None for an example of plain text.

    Such text would become the token itself: `<|endoftext|>` in an answer ends it, `<|im_end|>` in a
    question ends the user's turn. Data is untrusted and must not steer the model.
    """
    added = tokenizer.added_tokens_decoder.values()
    tokens = {str(token) for token in added if token.special} | {*tokenizer.all_special_tokens, *MARKERS}
    # The longest first: of two tokens that start alike, the text's own is named.
    pattern = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=lambda token: (-len(token), token))))
    found = (
        next(filter(None, map(pattern.search, (example.question, *example.steps, example.answer))), None)
        for example in examples
    )
    return [match and match[0] for match in found]


def _refuse_special_tokens(tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example]) -> None:
    for example, token in zip(examples, find_special_tokens(tokenizer, examples), strict=True):
        if token is not None:
            raise ValueError(f"question {example.question[:60]!r}: {SPECIAL_TOKEN_COMPLAINT.format(token)}")


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Sequence[str]], prompt: str
) -> list[EncodedExample]:
    """Encode examples that `example_texts` has written out."""
    ids = iter(tokenize_texts(tokenizer, [text for parts in texts for text in parts]))
    first_ids, eos_id = bos_ids(tokenizer, prompt), tokenizer.eos_token_id
    encoded = []
    for parts in texts:
        question_ids, *steps_ids, answer_ids = [next(ids) for _ in parts]
        encoded.append(EncodedExample(first_ids + question_ids, steps_ids, [*answer_ids, eos_id]))
    return encoded


def tokenize_texts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without the tokens that a tokenizer puts around a whole one."""
    if not texts:
        return []  # transformers' fast tokenizers stumble over an empty batch.
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        # Its warning about long texts counts one part; we count whole views.
        verbose=False,
    )
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def find_unknown_word(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], text: str) -> str | None:
    """The first word of `text`, encoded as `ids`, that became the unknown token, if any did.

    A text may spell that token out (GPT-2's is `<|endoftext|>`): then it is known.
    """
    unknown_id = tokenizer.unk_token_id
    if unknown_id is None or ids.count(unknown_id) <= text.count(tokenizer.unk_token):
        return None
    words = (word for word in text.split() if tokenizer.unk_token not in word)
    return next((word for word in words if unknown_id in tokenize_texts(tokenizer, [word])[0]), text)


def bos_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """The begin-of-text token, if the tokenizer opens texts with one; a chat template writes its own."""
    if prompt == "chat" or tokenizer.bos_token_id is None:
        return []
    opening: list[int] = tokenizer("a")["input_ids"][:1]
    return opening if opening == [tokenizer.bos_token_id] else []


def _question_text(tokenizer: "PreTrainedTokenizerBase", question: str, prompt: str) -> str:
    if prompt == "plain":
        return f"{question}\n"
    if tokenizer.chat_template is None:
        raise ValueError(
            "encode.prompt: found 'chat', but the model's tokenizer has no chat template;"
            " use 'plain', or a model that was tuned for chat"
        )
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=False,
        date_string=_TEMPLATE_DATE,
    )
    return text
