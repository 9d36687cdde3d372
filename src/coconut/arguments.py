"""What a caller of the Python interface can get wrong: each check is a ValueError that says what was wanted."""

import typing
from collections.abc import Iterable
from typing import Any, TypeVar

import torch

from coconut.data.examples import Example
from coconut.model.sampling import Noise, Sampling

_Item = TypeVar("_Item")


def check_number(place: str, value: Any, *, at_least: int) -> None:
    # type(), not isinstance(): True is an int to Python, not to a reader.
    if type(value) is not int or value < at_least:
        raise ValueError(f"{place}: found {value!r}, wanted a whole number (int) of at least {at_least}")


def check_sampling(num_samples: Any, temperature: Any, noise: Any, noise_scale: Any, seed: Any) -> Sampling:
    check_number("num_samples", num_samples, at_least=0)
    check_number("seed", seed, at_least=0)
    for place, value in (("temperature", temperature), ("noise_scale", noise_scale)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"{place}: found {value!r}, wanted a number of at least 0")
    if noise not in typing.get_args(Noise):
        raise ValueError(f"thought_noise: found {noise!r}, wanted one of {', '.join(typing.get_args(Noise))}")
    if noise == "dropout" and noise_scale >= 1:
        raise ValueError(f"noise_scale: found {noise_scale!r}, wanted less than 1, the probability of dropout")
    return Sampling(num_samples, float(temperature), noise, float(noise_scale))


def check_device(device: Any) -> None:
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: found {device!r}, wanted cpu, cuda, or cuda:1 and so on") from None
    num_gpus = torch.cuda.device_count()
    if asked.type == "cuda" and (asked.index or 0) >= num_gpus:
        raise ValueError(f"device: found {device!r}, but torch sees {num_gpus} GPUs here; use cpu, or one of them")


def as_list(place: str, values: Iterable[_Item], kind: type[_Item]) -> list[_Item]:
    name = {str: "text", Example: "Example"}[kind]
    # A text is a sequence of texts to Python, so that each character would be a question.
    if isinstance(values, str | Example) or not isinstance(values, Iterable):
        raise ValueError(f"{place}: found one {type(values).__name__}, wanted a list of {name}; put [ ] around it")
    items = list(values)
    for i, item in enumerate(items):
        if not isinstance(item, kind):
            raise ValueError(f"{place}[{i}]: found {item!r:.60} ({type(item).__name__}), wanted {name}")
    return items


def check_example(place: str, example: Example) -> None:
    parts = {"question": example.question, "answer": example.answer}
    parts |= {f"steps[{i}]": step for i, step in enumerate(example.steps)}
    for name, text in parts.items():
        check_not_blank(f"{place}.{name}", text)


def check_not_blank(place: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place}: found {text!r:.60}, wanted text that is not empty")
