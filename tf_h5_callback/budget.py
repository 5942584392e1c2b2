"""How often to save: as often as a fraction of the training time pays for.

CheckFreq (Mohan et al., FAST'21) measures what a checkpoint costs, chooses an interval for a given
overhead, and makes it longer when the overhead is exceeded. This is an account instead: training
time earns, saves spend, and the next one comes as soon as it is paid for. So the interval grows
when saves become dearer (a slower disk, a larger model) and shrinks when they become cheaper.
"""

from __future__ import annotations

import time
from typing import Optional

# The weight of the newest measurement in a running mean.
_NEWEST_STEP = 0.05
_NEWEST_SAVE = 0.3


class OverheadBudget:
    """Tells when the next save is paid for.

    A save costs the time for which training waits, and what the steps that run while the file is
    being written take longer than others.

    Args:
      max_overhead: the time that saving may add, as a fraction of the time without.

    Raises:
      ValueError: the fraction is not above 0.
    """

    def __init__(self, max_overhead: float):
        if max_overhead <= 0:
            raise ValueError(
                "max_overhead is {!r}; it must be above 0 (0.03 lets saving add 3 % to the time of "
                "training)".format(max_overhead)
            )
        self._max_overhead = max_overhead
        self._account = 0.0  # seconds
        self._step: Optional[float] = None  # mean seconds of a step beside which nothing is written
        self._cost: Optional[float] = None  # mean seconds of a save
        self._cost_so_far: Optional[float] = None  # of the save whose file is being written
        self._unpaid = False  # that save

    @property
    def pays(self) -> bool:
        """Whether a save is paid for; the first one is when a step has been taken."""
        if self._step is None or self._cost_so_far is not None:
            return False
        return self._account >= (self._cost or 0.0)

    def step_taken(self, seconds: float, writing: bool) -> None:
        """A step, and what the user does between two, took so long.

        Args:
          seconds: without what we do after the step ourselves.
          writing: whether a file was being written at its beginning.
        """
        if not writing:
            self._settle()
            mean = seconds if self._step is None else self._step
            self._step = mean + _NEWEST_STEP * (seconds - mean)
            self._account += self._max_overhead * seconds
        elif self._step is None:  # nothing to compare it with yet
            self._account += self._max_overhead * seconds
        else:
            # Below zero, too, by chance: the mean of many saves tells.
            self._spend(seconds - self._step)
            self._account += self._max_overhead * self._step

    def saved(self, stall: float, unpaid: bool) -> None:
        """Training has waited so many seconds for a save.

        Args:
          stall: the seconds.
          unpaid: the save came for another reason, before it was paid for. Nobody owes for that.
        """
        self._settle()
        self._cost_so_far, self._unpaid = 0.0, unpaid
        self._spend(stall)

    def _spend(self, seconds: float) -> None:
        if not self._unpaid:
            self._account -= seconds
        if self._cost_so_far is not None:
            self._cost_so_far += seconds

    def _settle(self) -> None:
        """The cost of the last save is known."""
        if self._cost_so_far is not None:
            mean = self._cost_so_far if self._cost is None else self._cost
            self._cost = max(0.0, mean + _NEWEST_SAVE * (self._cost_so_far - mean))
            self._cost_so_far = None


class Stalls:
    """How long training has waited for saves, of how long it has taken."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._count = 0
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        """One more save, for which training waited so long."""
        self._count += 1
        self._seconds += seconds

    def __str__(self) -> str:
        total = time.monotonic() - self._began
        return "training waited {:.3g} s for {} checkpoints, {:.2g} % of {:.3g} s".format(
            self._seconds, self._count, 100 * self._seconds / total if total else 0.0, total
        )
