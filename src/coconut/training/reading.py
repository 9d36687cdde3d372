"""What a method's loss is given: the rows of a micro-batch as the model has read them in one of their layouts.

Legend: B rows of the micro-batch, U rows of the update, T columns, L + 1 states of a column (0 enters the first layer,
L leaves the final norm), K slots, D hidden.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coconut.data.collator import Batch
from coconut.data.encoding import EncodedExample
from coconut.data.views import View
from coconut.methods import Part
from coconut.model.batch import latent_columns
from coconut.model.latent import supervised_nll
from coconut.model.passes import PlainPasses
from coconut.ranks import Ranks


@dataclass
class UpdateFacts:
    """What is known of a whole update: the same in every process, however it is cut."""

    num_rows: int
    num_tokens: Mapping[str, int]
    """Supervised tokens, by reading."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """What earlier readings have kept of all rows, U x ..., by name."""


class Keeper:
    """Collects what a reading keeps of its rows, and joins it over micro-batches and processes."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[int, Tensor]] = {}

    def add(self, name: str, places: Sequence[int], values: Tensor) -> None:
        """Keep one tensor for each of these rows of the update."""
        self._rows.setdefault(name, {}).update(zip(places, values.detach().unbind(), strict=True))

    def join(self, facts: UpdateFacts, ranks: Ranks) -> None:
        """Put what was kept into the facts of the update, in the order of its rows.

        Every process calls it at the same place.
        """
        # A process may have no row of its own, and must still take part in what the others send.
        names = sorted({name for names in ranks.gather(sorted(self._rows)) for name in names})
        for name in names:
            own = self._rows.get(name, {})
            shapes = [shape for shape in ranks.gather(list(next(iter(own.values())).shape) if own else None) if shape]
            joined = torch.zeros(facts.num_rows, *shapes[0], device=ranks.device)
            if own:
                joined[list(own)] = torch.stack(list(own.values())).to(joined)
            ranks.sum_([joined])  # Each row is one process's, and zero in the others.
            facts.whole[name] = joined
        self._rows.clear()


@dataclass(frozen=True)
class Draws:
    """Chance for a loss and for thoughts: the same for a row however the update is cut, in whichever process."""

    seeds: Sequence[int]
    """One for each row of the micro-batch, a function of seed, entry, epoch and row."""
    device: torch.device | str = "cpu"

    def normal(self, purpose: object, *shape: int) -> Tensor:
        """Draw from the standard normal distribution for each row, B x shape.

        Args:
            purpose: told apart from other draws by its text, the number of a slot say.
        """
        drawn = []
        for seed in self.seeds:
            generator = torch.Generator().manual_seed(random.Random(f"{seed}/{purpose}").getrandbits(63))
            drawn.append(torch.randn(*shape, generator=generator))
        return torch.stack(drawn).to(self.device)


@dataclass
class Reading:
    """The rows of a micro-batch, read in one layout, with gradients."""

    name: str
    """Which of the method's readings this is."""
    places: Sequence[int]
    """Of the rows in the update."""
    views: Sequence[View]
    examples: Sequence[EncodedExample]
    batch: Batch
    hidden_BTD: Tensor
    """After the final norm; padded columns hold arbitrary finite values."""
    layers: Sequence[Tensor]
    """Hidden states of all columns, B x T x D for each of L + 1; empty where the method does not read layers."""
    fed: Sequence[Tensor]
    """What entered each slot, B x D for each of K; empty where the method does not read thoughts."""
    passes: PlainPasses
    modules: nn.Module | None
    """What the method trains beside the model."""
    facts: UpdateFacts
    keeper: Keeper
    draws: Draws

    # --- losses ---

    def nll(self, weight: float = 1.0) -> Part:
        """Return the next-token loss over the supervised columns: nats, a mean over the tokens of the update."""
        nll, _ = supervised_nll(self.passes, self.hidden_BTD, self.batch)
        return Part(nll, self.facts.num_tokens[self.name], weight)

    def mean_over_rows(self, values_B: Tensor, weight: float = 1.0) -> Part:
        """Return a loss of each row as a mean over the rows of the update."""
        return Part(values_B.float().sum(), self.facts.num_rows, weight)

    # --- what the model computed ---

    def columns(self, name: str) -> Tensor:
        """Return the place of a named column in each row of the batch, B."""
        first_slot = max(view.prefix_length for view in self.views)
        return torch.tensor(
            [first_slot - view.prefix_length + view.columns[name] for view in self.views],
            device=self.hidden_BTD.device,
        )

    def states_at(self, name: str) -> Tensor:
        """Return the hidden states of all layers at a named column of each row, B x (L + 1) x D."""
        assert self.layers, f"list {self.name!r} in reads_layers of the method, so that its layers are kept"
        columns_B = self.columns(name)
        rows_B = torch.arange(len(columns_B), device=columns_B.device)
        return torch.stack([layer_BTD[rows_B, columns_B] for layer_BTD in self.layers], dim=1)

    @property
    def thoughts(self) -> Tensor:
        """The vectors that were fed back, B x K x D, with gradients; see `is_fed` for rows with fewer."""
        assert self.fed, f"no row has a thought, or {self.name!r} is missing in reads_thoughts of the method"
        return torch.stack(list(self.fed), dim=1)

    @property
    def is_fed(self) -> Tensor:
        """Whether each row has a thought in each of the K slots, B x K."""
        return self.batch.is_latent_BT[:, latent_columns(self.batch)]

    # --- from one reading of an update to the next ---

    def keep(self, name: str, values: Tensor) -> None:
        """Keep something of each row, B x ..., for the readings that follow in this update; without gradients."""
        self.keeper.add(name, self.places, values)

    def kept(self, name: str) -> Tensor:
        """Return what an earlier reading kept of these rows, B x ...."""
        return self.whole(name)[list(self.places)]

    def whole(self, name: str) -> Tensor:
        """Return what an earlier reading kept of all rows of the update, U x ..., those of other processes too."""
        return self.facts.whole[name]
