"""Turns examples into token ids. No other module knows the text form.

An encoded example has three parts: question, steps, answer. Each is tokenised on its own, so that
cutting off steps does not change the ids of the rest.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from coconut.data.chat import render_prompts
from coconut.data.examples import ANSWER_MARK, MARKERS, Example

if TYPE_CHECKING:
    # The import takes a second, and many users of this module do not need it.
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKEN_COMPLAINT = (
    "holds {}, a special token of the model's tokenizer, wanted plain text; take it out of the text"
)


class EncodedExample(NamedTuple):
    """The token ids of an example's three parts; the answer ends with the end-of-text token."""

    question_ids: list[int]
    steps_ids: list[list[int]]
    answer_ids: list[int]


def example_texts(tokenizer: "PreTrainedTokenizerBase", example: Example, prompt: str = "plain") -> list[str]:
    r"""Write an example as the texts that are tokenised separately: question, steps, answer.

    >>> example_texts(None, Example("2 + 2 + 1 ?", ["4", "5"], "5"))
    ['2 + 2 + 1 ?\n', '4\n', '5\n', '### 5']
    """
    return write_texts(tokenizer, [example], prompt)[0]


def write_texts(tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example], prompt: str) -> list[list[str]]:
    """Write examples as `example_texts` does, at once."""
    questions = _question_texts(tokenizer, [example.question for example in examples], prompt)
    return [
        [question, *(f"{step}\n" for step in example.steps), f"{ANSWER_MARK} {example.answer}"]
        for question, example in zip(questions, examples, strict=True)
    ]


def encode_example(tokenizer: "PreTrainedTokenizerBase", example: Example, prompt: str = "plain") -> EncodedExample:
    """Encode one example; see `encode_batch`."""
    return encode_batch(tokenizer, [example], prompt)[0]


def encode_question(tokenizer: "PreTrainedTokenizerBase", question: str, prompt: str = "plain") -> list[int]:
    """Encode one question; see `encode_questions`."""
    return encode_questions(tokenizer, [question], prompt)[0]


def encode_questions(
    tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str], prompt: str = "plain"
) -> list[list[int]]:
    """Encode questions alone, with the same ids as `encode_batch`.

    Raises:
        ValueError: A question holds a special token's text, or `prompt` is "chat" and the chat template fails.
    """
    _refuse_special_tokens(tokenizer, [Example(question) for question in questions])
    ids = tokenize_texts(tokenizer, _question_texts(tokenizer, questions, prompt))
    first_ids = bos_ids(tokenizer, prompt)
    return [first_ids + question_ids for question_ids in ids]


def question_offsets(
    tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str], prompt: str = "plain"
) -> list[list[tuple[int, int]]] | None:
    """Return where in its question each token of `encode_questions` stands, as the first character and the one after.

    Tokens of the prompt around the question stand outside of it: before 0, or after its end.

    Returns:
        None if the tokenizer does not say so.
    """
    if not tokenizer.is_fast:
        return None
    num_first, found = len(bos_ids(tokenizer, prompt)), []
    for question, text in zip(questions, _question_texts(tokenizer, questions, prompt), strict=True):
        begin = text.find(question)
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        found.append([(-1, -1)] * num_first + [(start - begin, end - begin) for start, end in offsets])
    return found


def encode_batch(
    tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example], prompt: str = "plain"
) -> list[EncodedExample]:
    """Encode examples with one call of the tokenizer.

    Raises:
        ValueError: A text holds a special token's text, or `prompt` is "chat" and the chat template fails.
    """
    _refuse_special_tokens(tokenizer, examples)
    return encode_texts(tokenizer, write_texts(tokenizer, examples, prompt), prompt)


def find_special_tokens(tokenizer: "PreTrainedTokenizerBase", examples: Iterable[Example]) -> list[str | None]:
    """Find the first special token that each example's text spells out, or None in plain text.

    Such text would become the token itself: `<|endoftext|>` in an answer would end it, and `<|im_end|>` in
    a question would end the user's turn. Data is untrusted and must not control the model.
    """
    added = tokenizer.added_tokens_decoder.values()
    tokens = {str(token) for token in added if token.special} | {*tokenizer.all_special_tokens, *MARKERS}
    # The longest token comes first: if one token is the beginning of another, the message names the right one.
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
    """Encode examples that `write_texts` has written."""
    ids = iter(tokenize_texts(tokenizer, [text for parts in texts for text in parts]))
    first_ids, eos_id = bos_ids(tokenizer, prompt), tokenizer.eos_token_id
    encoded = []
    for parts in texts:
        question_ids, *steps_ids, answer_ids = [next(ids) for _ in parts]
        encoded.append(EncodedExample(first_ids + question_ids, steps_ids, [*answer_ids, eos_id]))
    return encoded


def tokenize_texts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, without the tokens that a tokenizer puts around a whole text."""
    if not texts:
        return []  # transformers' fast tokenizers fail on an empty batch.
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        # Its warning about long texts would count one part, but the limit holds for whole views.
        verbose=False,
    )
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def answer_start(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the first id of the answer's mark, with which a text begins that says no step."""
    return tokenize_texts(tokenizer, [ANSWER_MARK])[0][:1]


@functools.lru_cache(maxsize=1 << 16)
def reword_answer(tokenizer: "PreTrainedTokenizerBase", answer_ids: tuple[int, ...], wording: str) -> list[int]:
    """Write an encoded answer with another text in place of the answer's mark, `The answer is: 5` for `### 5`.

    Returns:
        Its ids, with the end-of-text token. The list is shared between calls.

    Raises:
        ValueError: The tokenizer does not know a word of the text.
    """
    *text_ids, eos_id = answer_ids
    answer = _decode(tokenizer, text_ids).strip().removeprefix(ANSWER_MARK).strip()
    text = f"{wording} {answer}"
    ids = tokenize_texts(tokenizer, [text])[0]
    if (word := find_unknown_word(tokenizer, ids, text)) is not None:
        raise ValueError(
            f"answer_wording: found {wording!r:.80}, but {word!r:.40} is unknown to the model's tokenizer, wanted words"
            f" of its vocabulary, or {ANSWER_MARK!r}, which every vocabulary holds"
        )
    return [*ids, eos_id]


@functools.lru_cache(maxsize=1 << 16)
def count_opening(tokenizer: "PreTrainedTokenizerBase", answer_ids: tuple[int, ...], wording: str) -> int:
    """Count the tokens of an encoded answer that stand before the first token of the answer's own text.

    A token belongs to the answer's own text if it holds any of its characters; one that holds only the blank before
    it does not. So the count is right for tokenizers that write the blank with the word, and for those that do not.
    """
    num_characters = len("".join(wording.split()))
    for count in range(1, len(answer_ids)):
        text = "".join(_decode(tokenizer, answer_ids[:count]).split())
        if len(text) > num_characters:
            return count - 1
    return len(answer_ids) - 1


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def find_unknown_word(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], text: str) -> str | None:
    """Return the first word of `text`, encoded as `ids`, that became the unknown token, or None.

    If the text itself spells out the unknown token (GPT-2's is `<|endoftext|>`), that word is known.
    """
    unknown_id = tokenizer.unk_token_id
    if unknown_id is None or ids.count(unknown_id) <= text.count(tokenizer.unk_token):
        return None
    words = (word for word in text.split() if tokenizer.unk_token not in word)
    return next((word for word in words if unknown_id in tokenize_texts(tokenizer, [word])[0]), text)


def bos_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Return the begin-of-text token if the tokenizer begins texts with one. A chat template writes its own."""
    if prompt == "chat" or tokenizer.bos_token_id is None:
        return []
    opening: list[int] = tokenizer("a")["input_ids"][:1]
    return opening if opening == [tokenizer.bos_token_id] else []


def _question_texts(tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str], prompt: str) -> list[str]:
    if prompt == "chat":
        return render_prompts(tokenizer, questions)
    return list(questions) if prompt == "bare" else [f"{question}\n" for question in questions]
