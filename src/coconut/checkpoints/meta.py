"""How a checkpoint was trained: its `coconut.json`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from coconut.checkpoints.tensors import RESTORE
from coconut.checkpoints.weights import read_json
from coconut.config.methods import asking_keys, find_method
from coconut.config.schema import Entry, LatentConfig
from coconut.config.strict import Range, parse
from coconut.config.thought import parse_thought
from coconut.data.chat import PROMPT_DATE
from coconut.data.layouts import Layout

if TYPE_CHECKING:
    from coconut.methods import Method

META_FILE = "coconut.json"
Prompt = Literal["plain", "bare", "chat"]
AnswerRule = str
"""Where a text says its answer; see `coconut.evaluation.outcomes.read_answer`."""
_Number = Annotated[int, Range(0, 1_000_000)]
_NO_STATE = {"num_removed_tokens": 0, "num_removed_at_end": 0}
"""Every file has these since its first form, in which one method alone kept a state."""


@dataclass(frozen=True)
class CheckpointMeta:
    """The values with which a checkpoint is used without `params.yaml`. Its file is flat, because people read it."""

    method: str
    latent_stage: _Number
    c_thought: _Number
    max_latent_stage: _Number
    pad_latent_to_max: bool
    markers: bool
    thought: str
    parallel_iterations: _Number
    prompt: Prompt
    prompt_date: str = ""
    """The day that chat templates were told, in ISO form; nothing where prompts are plain."""
    answer: AnswerRule = "marked"
    """Checkpoints of others end in `The answer is: 18`."""
    state: Mapping[str, int] = field(default_factory=dict)
    """Of the method, at the end of the training; see `coconut.methods.Method.state_at`."""
    keys: Any = None
    """Of the method, by its own type; those on which the layout of a question depends are in the file."""

    def __post_init__(self) -> None:
        if self.keys is None:
            object.__setattr__(self, "keys", asking_keys(find_method(self.method), {}))

    @classmethod
    def of(
        cls,
        method: str,
        latent_stage: int,
        latent: LatentConfig,
        *,
        prompt: Prompt,
        state: Mapping[str, int] | None = None,
        answer: AnswerRule = "marked",
        keys: Any = None,
    ) -> "CheckpointMeta":
        """Describe the checkpoint of an entry with these values."""
        return cls(
            method=method,
            latent_stage=latent_stage,
            c_thought=latent.c_thought,
            max_latent_stage=latent.max_latent_stage,
            pad_latent_to_max=latent.pad_latent_to_max,
            markers=latent.markers,
            thought=latent.thought,
            parallel_iterations=latent.parallel_iterations,
            prompt=prompt,
            prompt_date=f"{PROMPT_DATE:%Y-%m-%d}" if prompt == "chat" else "",
            answer=answer,
            state=state or {},
            keys=keys,
        )

    @classmethod
    def of_entry(cls, entry: Entry, *, prompt: Prompt, state: Mapping[str, int]) -> "CheckpointMeta":
        """Describe the checkpoint of a trained entry."""
        meta = cls.of(entry.method, entry.latent_stage, entry.latent, prompt=prompt, state=state, keys=entry.keys)
        return dataclasses.replace(meta, answer=meta.build_method().answer_rule())

    def latent_config(self) -> LatentConfig:
        """The method's switches; nothing is mixed outside of training."""
        return LatentConfig(
            self.c_thought,
            self.max_latent_stage,
            self.pad_latent_to_max,
            self.markers,
            uniform_prob=0.0,
            thought=self.thought,
            parallel_iterations=self.parallel_iterations,
        )

    def build_method(self) -> "Method":
        """Return the method that trained the checkpoint.

        Raises:
            ValueError: There is no such method here.
        """
        kind = find_method(self.method)
        return kind(self.latent_stage, self.latent_config(), self.keys)

    def layout(self) -> Layout:
        """The layout that the checkpoint was trained for last, which depends on no gold solution."""
        return self.layout_at(self.latent_stage)

    def layout_at(self, latent_stage: int) -> Layout:
        """The checkpoint's layout at another stage."""
        return self.build_method().layout(latent_stage, state=self.state)

    def to_json(self) -> dict[str, Any]:
        """Return what the file holds."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        asked_with = {
            name: getattr(self.keys, name)
            for name in (find_method(self.method).asked_with if self.keys is not None else ())
            if getattr(self.keys, name) is not None
        }
        late = {name: fields.pop(name) for name in _LATE}
        return fields | _NO_STATE | dict(self.state) | late | asked_with


_FIELDS = tuple(one.name for one in dataclasses.fields(CheckpointMeta) if one.name not in ("state", "keys"))
_LATE = ("prompt_date", "answer")
"""These follow the state in the file."""


def read_meta(folder: Path) -> CheckpointMeta:
    """Read how a checkpoint was trained.

    Raises:
        ValueError: if its `coconut.json` is missing or damaged, or its method is not here.
    """
    path = folder / META_FILE
    found = read_json(path)
    try:
        method = find_method(found["method"]) if isinstance(found.get("method"), str) else None
        names = [] if method is None else [*method.asked_with, *method.state_names]
        # Keys with a default were added later: checkpoints from before them are still read.
        required = set(_FIELDS) - set(_LATE)
        if not required <= found.keys() <= {*_FIELDS, *_NO_STATE, *names}:
            wanted = sorted({*_FIELDS, *_NO_STATE, *names})
            raise ValueError(f"found {sorted(found)!s:.300}, wanted exactly the keys {wanted}")
        assert method is not None, "its name is among the required keys"
        keys = {name: found.pop(name) for name in method.asked_with if name in found}
        state = {
            name: parse(found.pop(name), _Number, name) for name in (*_NO_STATE, *method.state_names) if name in found
        }
        kept = {name: value for name, value in state.items() if name in method.state_names}
        meta: CheckpointMeta = parse(found | {"state": kept, "keys": asking_keys(method, keys)}, CheckpointMeta, "")
        parse_thought(meta.thought)
        if meta.answer not in ("marked", "last_number") and not meta.answer.startswith("after "):
            raise ValueError(f"answer: found {meta.answer!r:.60}, wanted marked, last_number, or after TEXT")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {RESTORE}") from None
    return meta
