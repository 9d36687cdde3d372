"""Splits prose into sentences."""

import regex as re  # type: ignore[import-untyped]

# The end of a sentence is a line break, or punctuation: of ASCII, where white space follows it; of other scripts in any
# case, because some write no blank. Full stops of other widths also stand in decimals.
_CLOSING = r"[\"'\p{Close_Punctuation}\p{Final_Punctuation}]*"
_END = re.compile(
    rf"(?V1)[.!?]+{_CLOSING}\s+|[\p{{Sentence_Terminal}}--[.!?]]+(?<![\u2024\ufe52\uff0e](?=\d))[.!?]*{_CLOSING}\s*|\s*\n\s*"
)
_ABBREVIATIONS = frozenset(
    ["mr.", "mrs.", "ms.", "dr.", "st.", "prof.", "no.", "nos.", "vs.", "e.g.", "i.e.", "approx.", "fig.", "eq."]
)
_INITIAL = re.compile(r"[A-Z]\.")
_LIST_NUMBER = re.compile(r"\(?\d+[.)]")


def split_sentences(text: str) -> list[str]:
    r"""Split prose after full stops, question marks, exclamation marks and line breaks.

    Abbreviations, initials, decimal points and the numbers of a list do not end a sentence.

    >>> split_sentences("Mr. Lee pays 2 * $3.50 = $7.00. So he has $3 left.\n1. That is all!")
    ['Mr. Lee pays 2 * $3.50 = $7.00.', 'So he has $3 left.', '1. That is all!']
    """
    sentences = []
    start = 0
    for end in _END.finditer(text):
        if "\n" in end[0] or _ends_sentence(text[start : end.end()].strip(), text[end.end() : end.end() + 1]):
            sentences.append(text[start : end.end()].strip())
            start = end.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


def _ends_sentence(sentence: str, next_character: str) -> bool:
    last_word = sentence.split()[-1]
    return not (
        next_character.islower()
        or last_word.lower() in _ABBREVIATIONS
        or _INITIAL.fullmatch(last_word)
        or _LIST_NUMBER.fullmatch(sentence)
    )
