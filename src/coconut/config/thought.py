"""The grammar of `thought:` in `params.yaml`, which names what is fed back as a thought.

    form    = state | finish | finish "(" state ")"
    finish  = "normalised" | "projection" | "projector"
    state   = hidden | removed | hidden "+" removed | "input+" removed
    hidden  = "hidden[" layer "]"
    removed = "suppressed[" layer "]" | "suppressed[" layer ":]"
    layer   = a whole number, such as 6 or -2, or a fraction between 0 and 1, such as 0.5

On a command line the form needs quotes of its own: `dvc exp run -S "latent.thought='hidden[-2]'"`.
`coconut.model.feedback` says what the forms compute. This module needs no torch, so that a wrong form is an error
before anything is trained.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from coconut.config.strict import shown, suggest

FORMS = (
    "hidden[LAYER]",
    "suppressed[LAYER]",
    "suppressed[LAYER:]",
    "hidden[LAYER]+suppressed[LAYER:]",
    "input+suppressed[LAYER:]",
    "normalised(...), projection(...) and projector(...) around any of these, or alone around hidden[-1]",
)

_QUOTING = """-S "latent.thought='hidden[-2]'\""""
"""Hydra, which reads the command line before us, takes brackets outside quotes for a list of its own."""
_LAYER = r"0|-?[1-9][0-9]{0,8}|0?\.[0-9]{0,8}[1-9][0-9]{0,8}"
_STATE = re.compile(
    rf"(?:(?:hidden\[(?P<hidden>{_LAYER})\]|(?P<input>input))(?P<plus>\+)?)?"
    rf"(?:suppressed\[(?P<suppressed>{_LAYER})(?P<upward>:)?\])?"
)
_FINISHED = re.compile(r"(?P<finish>normalised|projection|projector)(?:\((?P<state>[^()]+)\))?")


@dataclass(frozen=True)
class Form:
    """A parsed form; at least one of `hidden` and `suppressed` is given."""

    hidden: str | None
    """The layer whose hidden state is fed back."""
    adds_input: bool
    """Whether the input embedding of the column that produces the thought is added."""
    suppressed: str | None
    """The layer whose suppressed activations are fed back."""
    upward: bool
    """Whether the suppressed activations of all layers above it are added."""
    finish: Literal["normalised", "projection", "projector"] | None

    @property
    def has_weights(self) -> bool:
        """Whether a network of its own is trained with the model."""
        return self.finish in ("projection", "projector")


def parse_thought(thought: str) -> Form:
    """Read a form.

    Raises:
        ValueError: listing the known forms.

    >>> parse_thought("normalised(hidden[-2])")
    Form(hidden='-2', adds_input=False, suppressed=None, upward=False, finish='normalised')
    >>> parse_thought("input+suppressed[0.5:]")
    Form(hidden=None, adds_input=True, suppressed='0.5', upward=True, finish=None)
    """
    finished = _FINISHED.fullmatch(thought)
    state = _STATE.fullmatch((finished["state"] or "hidden[-1]") if finished else thought)
    first = state and (state["hidden"] or state["input"])
    # A sum needs both terms and a plus, a single term needs neither; the input alone is no thought.
    if not state or bool(state["plus"]) != bool(first and state["suppressed"]) or state[0] in ("", "input"):
        raise ValueError(
            f"thought: found {shown(thought)}, wanted one of {', '.join(FORMS)}; LAYER is a whole number"
            " (0 the embeddings, 1 the first layer, -1 the last) or a fraction such as 0.5;"
            f" on a command line, quote it twice: {_QUOTING}"
            + suggest(re.sub(r"-?[0-9.]+", "LAYER", thought), (*FORMS[:-1], "normalised", "projection", "projector"))
        )
    return Form(
        hidden=state["hidden"],
        adds_input=state["input"] is not None,
        suppressed=state["suppressed"],
        upward=state["upward"] is not None,
        finish=finished["finish"] if finished else None,  # type: ignore[arg-type]
    )


def check_layers(thought: str, num_layers: int) -> None:
    """Raise a ValueError if a thought names a layer that a model with `num_layers` layers does not have.

    >>> check_layers("hidden[-2]+suppressed[0.5:]", 3)
    """
    form = parse_thought(thought)
    if form.hidden:
        find_layer(form.hidden, num_layers)
    if form.suppressed:
        find_layer(form.suppressed, num_layers, lowest=1)


def find_layer(layer: str, num_layers: int, *, lowest: int = 0) -> int:
    """Turn a layer's name into its number: 0 for the embeddings, `num_layers` for the state after the final norm.

    A fraction f names layer floor(f x (`num_layers` + 1)), as in the journal's code, but at least `lowest`.

    Raises:
        ValueError: if the model has no such layer.

    >>> [find_layer(layer, 12) for layer in ("-1", "-2", "3", "0.5")]
    [12, 11, 3, 6]
    """
    if "." in layer:
        return max(lowest, math.floor(Fraction(layer) * (num_layers + 1)))
    number = int(layer) + (num_layers + 1 if int(layer) < 0 else 0)
    if not lowest <= number <= num_layers:
        raise ValueError(
            f"thought: found layer {layer}, but the model has {num_layers} layers;"
            f" wanted {lowest} to {num_layers}, {lowest - num_layers - 1} to -1, or a fraction such as 0.5"
        )
    return number
