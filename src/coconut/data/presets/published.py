"""The presets of docs/data.md, which says what each takes, and from where."""

import dataclasses
from collections.abc import Mapping

from coconut.config.field_map import Fields, IsNot

_GSM8K = Fields(question="question", steps="answer", split_steps="notes", answer="answer", answer_after="####")
_ASDIV = Fields(question="{body} {question}", answer="answer", answer_before=" (")
_CHAIN_OF_SENTENCES = Fields(question="question", steps="cot", split_steps="sentences", answer="answer")

PRESETS: Mapping[str, tuple[Fields, ...]] = {
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
