"""When a trainer saves its state: often enough to lose little, seldom enough to cost little."""

import time
from collections import deque

SAVING_SHARE = 0.02
"""The share of the training time that saving may take where that keeps states young enough."""
_LONGEST_PAUSE = 4
"""A pause between two saves is never longer than this many times `save_every_s`, unless a save takes longer."""
_NUM_RECENT = 3
"""Saves whose shortest counts as what saving costs: a disk that stalls once says nothing about the next save."""


class Pacing:
    """The pause between saves, by what recent ones took. Clocks that are set do not matter."""

    def __init__(self, save_every_s: float) -> None:
        self.save_every_s = save_every_s
        self.saving_s = 0.0
        """Spent in saving so far."""
        self._recent_s: deque[float] = deque(maxlen=_NUM_RECENT)
        self._last_end = time.monotonic()

    @property
    def pause_s(self) -> float:
        """Seconds between the end of a save and the next one: about the age that the newest state can reach.

        A save that takes 2 s is followed by 98 s of training, so that saving stays below `SAVING_SHARE` of the time.
        But the pause is at most four times `save_every_s`, or as long as a save itself takes if that is longer.
        """
        save_s = min(self._recent_s, default=0.0)
        cheap_s = save_s * (1 - SAVING_SHARE) / SAVING_SHARE
        return max(self.save_every_s, min(cheap_s, max(_LONGEST_PAUSE * self.save_every_s, save_s)))

    def is_due(self) -> bool:
        """Say whether it is time to save."""
        return time.monotonic() - self._last_end >= self.pause_s

    def note_save(self, seconds: float) -> bool:
        """Take how long a save took that has ended now; say whether the pause has become notably longer than asked."""
        before = self.pause_s
        self._last_end = time.monotonic()
        self.saving_s += seconds
        self._recent_s.append(seconds)
        return self.pause_s > max(before, self.save_every_s) + 1
