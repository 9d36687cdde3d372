"""Which stages run next, and which together: the order in which a pipeline takes the least time on several places.

A curriculum is a tree of trainings, with an evaluation and a probe at each. Nothing may hold up the longest chain of
trainings: it goes on as soon as one of them has ended, and evaluations and probes fill the places that are free.
"""

from collections.abc import Iterable, Mapping, Sequence

from coconut.pipeline.dvc_file import Stage
from coconut.pipeline.status import parents_of

_MOST_TAILS = 2
"""Evaluations and probes for one process while there are trainings to come, which would wait for all of them."""


class Schedule:
    """Which stages are left, which are ready, and which go together into one process."""

    def __init__(self, stages: Mapping[str, Stage], left: Iterable[str]) -> None:
        self._parents = {name: parents_of(stage, stages) for name, stage in stages.items()}
        self._order = {name: place for place, name in enumerate(stages)}
        self.left = set(left)
        """Neither done nor given out."""
        self.running: set[str] = set()
        self.blocked: set[str] = set()
        """Failed, or below one that failed."""

    def ready(self) -> list[str]:
        """Return the stages that wait for nothing, those first from which the longest chains hang."""
        found = self._ready_among(self.left)
        return sorted(found, key=self._rank)

    def has_branches(self) -> bool:
        """Say whether, sooner or later, two stages will wait for nothing at once."""
        left = set(self.left)
        while ready := self._ready_among(left):
            if len(ready) > 1:
                return True
            left -= set(ready)
        return False

    def _ready_among(self, left: set[str]) -> list[str]:
        open_ = left | self.running | self.blocked
        return [name for name in left if not self._parents[name] & open_]

    def next_bundle(self, num_places: int) -> list[str]:
        """Take the next stages for one process out of those that are left; empty if none is ready.

        A chain stays together, and where it forks it goes on with its longest branch: starting `dvc` anew costs a
        second. What nothing waits for but a join, as an evaluation, never stands before the rest of a chain.

        Args:
            num_places: processes at once.
        """
        ready = self.ready()
        tails = [name for name in ready if self._is_tail(name, ())]
        if ready[:1] == tails[:1]:
            most = len(tails) if all(self._is_tail(name, ()) for name in self.left) else _MOST_TAILS
            share = len(tails) // num_places  # Not more, so that no place ends long before the others.
            bundle = tails[: max(1, min(most, share))]
        else:
            bundle = ready[:1]
            while (name := self._next_of_chain(bundle, ready, num_places)) is not None:
                bundle.append(name)
        self.left -= set(bundle)
        self.running |= set(bundle)
        return bundle

    def _next_of_chain(self, bundle: Sequence[str], ready: Sequence[str], num_places: int) -> str | None:
        """Return what is to run after the last of a bundle in the same process; None for nothing."""
        freed = self._freed_by(bundle)
        below = sorted((name for name in freed if bundle[-1] in self._parents[name]), key=self._rank)
        chains = [name for name in below if not self._is_tail(name, bundle)]
        if chains:
            return chains[0]
        others = [name for name in {*ready, *freed} - set(bundle) if not self._is_tail(name, bundle)]
        return below[0] if below and len(others) < num_places else None

    def take_back(self, names: Iterable[str]) -> None:
        """Put stages back that were given out and did not run."""
        self.running -= set(names)
        self.left |= set(names) - self.blocked

    def finish(self, names: Iterable[str]) -> None:
        """Count stages as up to date."""
        self.running -= set(names)

    def fail(self, name: str) -> list[str]:
        """Count a stage as failed; return the stages that are left out because of it, in order."""
        self.running.discard(name)
        self.blocked.add(name)
        hit = {name}
        while more := {one for one in self._parents if self._parents[one] & hit} - hit:
            hit |= more
        self.left -= hit
        self.blocked |= hit
        return sorted(hit - {name}, key=self._order.__getitem__)

    def _freed_by(self, bundle: Sequence[str]) -> list[str]:
        """Return the stages that wait for nothing once the bundle is done, without those that do not wait for it."""
        open_ = (self.left | self.running | self.blocked) - set(bundle)
        return [
            name
            for name in self._order
            if name in self.left and name not in bundle
            and self._parents[name] & set(bundle) and not self._parents[name] & open_
        ]  # fmt: skip

    def _is_tail(self, name: str, done: Sequence[str]) -> bool:
        """Say whether nothing can begin once the stage is done, too, as what waits for it waits for others."""
        return not any(name in self._parents[one] for one in self._freed_by([*done, name]))

    def _rank(self, name: str) -> tuple[int, int]:
        return -self._height(name), self._order[name]

    def _height(self, name: str) -> int:
        children = [one for one in self.left if name in self._parents[one]]
        return 1 + max((self._height(one) for one in children), default=0)
