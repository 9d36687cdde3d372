"""Published sets that `format: fields` reads: one or more maps for each name, and nothing else.

A set that is published in several forms has a map for each; the rows decide which one fits. docs/data.md says what each
preset takes, and from where.
"""

import dataclasses
from collections.abc import Mapping

from coconut.config.field_map import Fields, IsNot
from coconut.config.schema import Preset, Source

_GSM8K = Fields(question="question", steps="answer", split_steps="notes", answer="answer", answer_after="####")
_ASDIV = Fields(question="{body} {question}", answer="answer", answer_before=" (")
_CHAIN_OF_SENTENCES = Fields(question="question", steps="cot", split_steps="sentences", answer="answer")

PRESETS: Mapping[Preset, tuple[Fields, ...]] = {
    "aqua": (
        Fields(question="question", choices="options", steps="rationale", split_steps="sentences", answer="correct"),
    ),
    "asdiv": (
        _ASDIV,
        dataclasses.replace(_ASDIV, question="{Body} {Question}", answer="Answer"),
    ),
    "asdiv_aug": (_GSM8K,),
    "commonsense_qa": (
        _CHAIN_OF_SENTENCES,
        Fields(question="question", choices="choices", answer="answerKey"),
        Fields(question="question.stem", choices="question.choices", answer="answerKey"),
    ),
    "gsm8k_aug_nl": (
        Fields(question="question", steps="steps", split_steps="list", answer="answer"),
        _CHAIN_OF_SENTENCES,
    ),
    "gsm8k_platinum": (_GSM8K,),
    "gsm_hard": (Fields(question="input", answer="target"),),
    "gsm_plus": (
        Fields(
            question="question",
            answer="answer",
            group="perturbation_type",
            where={"perturbation_type": IsNot("critical thinking")},
        ),
    ),
    "multiarith": (
        Fields(question="question", answer="final_ans"),
        Fields(question="input", answer="target"),
    ),
    "strategy_qa": (
        dataclasses.replace(_CHAIN_OF_SENTENCES, booleans="true_false"),
        Fields(question="question", answer="answer", booleans="true_false"),
    ),
    "svamp": (
        Fields(question="{Body} {Question}", answer="Answer"),
        Fields(question="question_concat", answer="Answer"),
    ),
}


def maps_of(source: Source) -> tuple[Fields, ...]:
    """Return the maps that may read a source: those of its preset with its own keys on top, its own, or none.

    >>> maps_of(Source("fields", fields=Fields(question="q", answer="a"))) == (Fields(question="q", answer="a"),)
    True
    >>> [one.question for one in maps_of(Source("gsm_hard", fields=Fields(question="{input} Think!")))]
    ['{input} Think!']
    """
    own = source.fields or Fields()
    if source.format == "fields":
        return (own,)
    given = {field.name: value for field in dataclasses.fields(own) if (value := getattr(own, field.name)) is not None}
    return tuple(
        dataclasses.replace(one, **given) for name, maps in PRESETS.items() if name == source.format for one in maps
    )
