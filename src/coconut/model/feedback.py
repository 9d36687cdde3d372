"""What is fed back as a thought, by the names that `coconut.config.thought` reads.

States are numbered as in transformers. With L layers, state 0 enters the first layer, state l leaves layer l, and
state L leaves the final norm. All others are before that norm.

* `hidden[-1]` is state L, the paper's thought. The head reads it, so it has the scale of a normed vector.
* `hidden[l]` is state l. `hidden[-2]` is the last one before the final norm, and in a pretrained model it is far
  larger than `hidden[-1]`; `hidden[0]` is the embedding; `hidden[0.5]` is state floor(0.5 x (L + 1)).
* `suppressed[l]` and `suppressed[l:]` are what layer l, or layers l to L together, take away; see `suppressed`.
* `hidden[m]+suppressed[l:]` and `input+suppressed[l:]` add that to a hidden state, or to the input embedding of the
  column that thinks, which is itself a thought from the second thought on.
* `normalised(...)` scales to the root mean square of the embedding table; see `normalise`.
* `projection(...)` and `projector(...)` apply a small trained network; see `Projection` and `Projector`.

Every form reads one column of one row, so batches, padding and caches do not change it.

Legend: B rows, S columns of a pass, D hidden. `x` and `states` end in D, whatever stands before.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from coconut.config.thought import Form, find_layer, parse_thought

_MAX_RMS_ROWS = 4096
_EPSILON = 1e-12


class States(NamedTuple):
    """The states of a column, from which its thought is made; tensors of one shape (..., D)."""

    layers: Sequence[Tensor]
    """States 0 to L; empty where no form asked for them."""
    last: Tensor
    """State L."""
    inputs: Tensor
    """The column's input embedding."""


Function = Callable[[Tensor], Tensor]
Source = Callable[[States], Tensor]
_LAST: Source = attrgetter("last")


class Feedback(nn.Module):
    """Turns the states of a column into the next column's input embedding; by default as in the paper.

    It holds trained weights only for `projection` and `projector`. It holds what it needs of the model as functions,
    so that the model's weights are not counted twice.
    """

    def __init__(
        self,
        source: Source = _LAST,
        *,
        finish: Function | None = None,
        needs_all_layers: bool = False,
        parallel_iterations: int = 0,
    ) -> None:
        super().__init__()
        self.source = source
        self.finish = finish
        self.needs_all_layers = needs_all_layers
        """Whether `output.hidden_states` must hold every layer."""
        self.parallel_iterations = parallel_iterations
        """0: thoughts one after another. T: all together, T times; see `coconut.model.parallel`."""

    def forward(self, output: BaseModelOutput, input_BD: Tensor) -> Tensor:
        """Return the thought of a pass's last column, B x D.

        Args:
            output: of the decoder body over the pass.
            input_BD: the input embedding of the pass's last column.
        """
        layers = [layer_BSD[:, -1] for layer_BSD in output.hidden_states] if self.needs_all_layers else []
        return self._think(States(layers, output.last_hidden_state[:, -1], input_BD))

    def of_columns(self, output: BaseModelOutput, inputs_BSD: Tensor) -> Tensor:
        """Return the thoughts of all columns of a pass, B x S x D."""
        layers = output.hidden_states if self.needs_all_layers else []
        return self._think(States(layers, output.last_hidden_state, inputs_BSD))

    def _think(self, states: States) -> Tensor:
        thought = self.source(states)
        return thought if self.finish is None else self.finish(thought)


def build_feedback(thought: str, model: PreTrainedModel, *, parallel_iterations: int = 0, seed: int = 0) -> Feedback:
    """Build the feedback that `thought` names, for this model.

    Args:
        seed: of the weights of `projection` and `projector`.

    Raises:
        ValueError: for an unknown form, listing the known ones, or a layer that the model does not have.
    """
    form = parse_thought(thought)
    num_layers: int = model.config.get_text_config().num_hidden_layers
    terms: list[Source] = []
    numbers = [find_layer(form.hidden, num_layers)] if form.hidden else []
    # The last state is available even where the others are not requested.
    terms += [_LAST if number == num_layers else partial(_state, number=number) for number in numbers]
    if form.adds_input:
        terms.append(attrgetter("inputs"))
    if form.suppressed:
        first = find_layer(form.suppressed, num_layers, lowest=1)
        last = num_layers if form.upward else first
        terms.append(partial(suppressed, first=first, last=last, read=find_final_norm(model)))
    return Feedback(
        partial(_sum, terms=terms) if len(terms) > 1 else terms[0],
        finish=_build_finish(form, model, seed),
        needs_all_layers=form.suppressed is not None or any(number < num_layers for number in numbers),
        parallel_iterations=parallel_iterations,
    )


def _build_finish(form: Form, model: PreTrainedModel, seed: int) -> Function | None:
    embed = model.get_input_embeddings()
    if form.finish == "normalised":
        return partial(normalise, embed=embed.__call__, num_rows=embed.weight.shape[0])
    if form.finish is None:
        return None
    kind = Projection if form.finish == "projection" else Projector
    # A model whose weights are loaded later is on the meta device; those that are drawn here are not.
    network = kind(embed.weight.shape[1], seed).to(embed.weight.dtype)
    return network if embed.weight.is_meta else network.to(embed.weight.device)


# --- sources --------------------------------------------------------------------------------


def _state(states: States, *, number: int) -> Tensor:
    return states.layers[number]


def _sum(states: States, *, terms: Sequence[Source]) -> Tensor:
    return reduce(torch.add, [term(states) for term in terms])


def suppressed(states: States, *, first: int, last: int, read: Function) -> Tensor:
    """Sum the suppressed activations of layers `first` to `last`: what they take away from what the head would read.

    Let z_l be state l after the final norm; the head W would turn it into the logits W z_l if the model ended there
    (z_L is the last state as it is). Coordinate d adds W[v, d] z_l[d] to the logit of token v, so it raises the
    logits of some tokens and lowers those of others. Layer l suppresses the coordinate where it moves it towards 0,
    which undoes that. Coordinate by coordinate, the part that is taken away is

        s_l = z_{l-1} - k_l,    k_l = z_l limited to the interval between 0 and z_{l-1}

    So s_l is z_{l-1} where the layer turns a coordinate's sign, the difference where it shrinks it, and 0 where it
    lets it grow. It is continuous, and differentiable almost everywhere, in both states, and gradients flow through
    both. It costs one norm per layer; the head is not needed, tied or not.

    This replaces the code of the journal that this project grew from (hs2ie.py), and differs from it. That code takes
    the logits W h_l of states before the norm, multiplies their change from layer to layer by a pseudo-inverse of W,
    and keeps the coordinates of h_l where the product is below -0.1. For a head of full column rank (more tokens than
    dimensions) the pseudo-inverse undoes W, and the product is h_l - h_{l-1}, which needs neither; besides, it is
    computed once and kept while W trains, so it soon undoes nothing. That code also compares h_{L-1} before the final
    norm with h_L after it; counts a fall of a negative coordinate as suppression; cuts at a threshold whose meaning
    changes from layer to layer, and passes no gradient to the mask; keeps what is left of a coordinate instead of what
    was taken; applies masks of a pass's last column to all columns; starts the slice [0.5:] one layer later; and fails
    where the pass and the input embeddings differ in length.
    """
    seen = [
        states.last if number == len(states.layers) - 1 else read(states.layers[number])
        for number in range(first - 1, last + 1)
    ]
    before, after = torch.stack(seen[:-1]), torch.stack(seen[1:])
    kept = torch.maximum(torch.minimum(after, before.clamp(min=0)), before.clamp(max=0))
    return (before - kept).sum(dim=0)


@torch.no_grad()
def find_final_norm(model: PreTrainedModel) -> Function:
    """Find the final norm by recording which module computes last while the model reads two columns.

    Families name it differently, but in all of them no module computes after it.

    Raises:
        ValueError: if the model has no such module.
    """
    if model.device.type == "meta":
        # Its buffers may be elsewhere already, so that it cannot be run; one that is on that device as a whole can.
        with torch.device("meta"):
            twin = type(model)(model.config)
        return cast(Function, model.get_submodule(_name_of_final_norm(twin)).__call__)
    return cast(Function, model.get_submodule(_name_of_final_norm(model)).__call__)


def _name_of_final_norm(model: PreTrainedModel) -> str:
    seen: list[tuple[nn.Module, Tensor]] = []

    def watch(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append((module, output))

    leaves = [module for module in model.base_model.modules() if not any(True for _ in module.children())]
    handles = [leaf.register_forward_hook(watch) for leaf in leaves]
    try:
        embeds_BSD = model.get_input_embeddings()(torch.arange(2, device=model.device)[None])
        # With a cache, the library does not look at values, which a model on the meta device lacks.
        cache = DynamicCache(config=model.config)
        hidden_BSD = model.base_model(inputs_embeds=embeds_BSD, past_key_values=cache, use_cache=True).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    module, output = seen[-1]
    # The norm's own memory, which it may have been given another shape in.
    is_last = output.untyped_storage()._cdata == hidden_BSD.untyped_storage()._cdata
    if output.shape != hidden_BSD.shape or not (is_last or (not output.is_meta and torch.equal(output, hidden_BSD))):
        raise ValueError(
            f"thought: {type(model).__name__} does not end in a final norm, which suppressed[...] reads;"
            " use hidden[...] with this model"
        )
    names: dict[nn.Module, str] = {other: name for name, other in model.named_modules()}
    return names[module]


# --- finishes -------------------------------------------------------------------------------


def normalise(x: Tensor, *, embed: Function, num_rows: int) -> Tensor:
    """Scale each vector to the root mean square of the embedding table, the scale that inputs have.

    The table is measured as it is now, over at most 4096 rows spread evenly (all of a small one), through the
    embedding module, because some families scale inside it. No gradient flows into the measurement.
    """
    with torch.no_grad():
        stride = -(-num_rows // _MAX_RMS_ROWS)
        weight = embed.__self__.weight  # type: ignore[attr-defined]
        rows = embed(torch.arange(0, num_rows, stride, device=weight.device)).float()
        wanted = rows.square().mean().sqrt()
    exact = x.float()
    found = (exact.square().mean(dim=-1, keepdim=True) + _EPSILON).sqrt()
    return (exact * (wanted / found)).to(x.dtype)


class _Network(nn.Module):
    """A norm and two linear maps, D x D, drawn from a seed."""

    def __init__(self, width: int, seed: int, *, drawn: Sequence[str]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        # The usual construction would draw from the global generator.
        self.inner = nn.Linear(width, width, device="meta").to_empty(device="cpu")
        self.outer = nn.Linear(width, width, device="meta").to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in (*self.inner.named_parameters("inner"), *self.outer.named_parameters("outer")):
                if name in drawn:
                    parameter.copy_(torch.randn(width, width, generator=generator) / width**0.5)
                else:
                    parameter.zero_()


class Projection(_Network):
    """Computes x + W2 gelu(W1 layernorm(x)), trained with the model; the weights are D x D.

    W2 starts at 0, so that training starts exactly from the form inside the brackets; W1 is drawn from the seed.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__(width, seed, drawn=["inner.weight"])

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.inner(self.norm(x.to(self.inner.weight.dtype)))
        return x + cast(Tensor, self.outer(functional.gelu(inner))).to(x.dtype)


class Projector(_Network):
    """Computes layernorm(W2 gelu(W1 x)), the thought of CODI; the weights are D x D, both drawn from the seed.

    Source: Shen et al. 2025 (arXiv:2502.21074).
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__(width, seed, drawn=["inner.weight", "outer.weight"])

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.inner(x.to(self.inner.weight.dtype)))
        return cast(Tensor, self.norm(self.outer(hidden))).to(x.dtype)
