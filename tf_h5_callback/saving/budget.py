"""How often to save: as often as a fraction of the training time pays for.

CheckFreq (Mohan et al., FAST'21) measures what a checkpoint costs, chooses an interval for a given
overhead, and makes it longer when the overhead is exceeded. This is an account instead: training
time earns, saves spend, and the next one comes as soon as it is paid for. So the interval grows
when saves become dearer (a slower disk, a larger model) and shrinks when they become cheaper.

Not all that takes time is training or saving: a laptop is closed, an evaluation runs between two
steps, the first step compiles. So nothing is trusted that was measured once; see `_Usual`.
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_left, insort
from collections import deque
from typing import Callable, Deque, Iterator, List, Optional


class _Usual:
    """What something usually takes, from its last few measurements.

    One or two of them may be anything; a third one is believed. The mean is that of all but those,
    since the median would say that training takes no longer for every tenth step being a long one.

    Args:
      count: how many measurements are remembered.

    Attributes:
      limit: nothing longer than this is believed: three times the third longest.
    """

    def __init__(self, count: int):
        self._count = count
        self._last: Deque[float] = deque()
        self._ordered: List[float] = []
        self.limit = 0.0

    def add(self, seconds: float) -> None:
        ordered = self._ordered
        if len(ordered) == self._count:
            del ordered[bisect_left(ordered, self._last.popleft())]
        self._last.append(seconds)
        insort(ordered, seconds)
        self.limit = 3 * ordered[-3:][0]  # of one or two, the shorter

    @property
    def is_known(self) -> bool:
        return len(self._ordered) >= 3

    @property
    def mean(self) -> float:
        believed = [seconds for seconds in self._ordered if seconds <= self.limit]
        return sum(believed) / len(believed)


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
        self._bound = 0.0  # of the account, both ways
        self._alone = _Usual(32)  # steps beside which nothing is written
        self._beside = _Usual(32)  # the others
        self._costs = _Usual(8)  # of saves
        self._cost = 0.0  # seconds that a save usually costs
        self._saves = 0
        self._cost_so_far: Optional[float] = None  # of the last save, until it is over
        self._unpaid = False  # that save
        self._step: Optional[float] = None  # mean seconds of a step when it was made
        self._writing_steps = 0  # of that save
        self._steps_after = 0  # since they are over
        self._tail = 0  # how many of these may be slower, too

    @property
    def pays(self) -> bool:
        """Whether a save is paid for; none is before it is known what a step takes."""
        if not self._alone.is_known or not self._steps_after:
            return False
        # The second one gets credit: the cost of one alone may be anything.
        return self._saves < 2 or self._account >= self._cost

    def step_taken(self, seconds: float, writing: bool) -> None:
        """A step, and what the user does between two, took so long.

        Args:
          seconds: without what we do after the step ourselves.
          writing: whether a file was being written at its beginning.
        """
        if writing:
            self._writing_steps += 1
        else:
            self._steps_after += 1
        # What a save leaves behind in the system and in the caches makes later steps slower, too.
        if not writing and self._steps_after > min(self._tail, self._writing_steps):
            if self._cost_so_far is not None:
                self._settle()
            alone = self._alone
            alone.add(seconds)
            if alone.is_known:
                earned = self._max_overhead * min(seconds, alone.limit)
                self._account = min(self._account + earned, self._bound)
        elif self._step is not None:  # there is something to compare it with
            beside = self._beside
            beside.add(seconds)
            limit = (beside if beside.is_known else self._alone).limit
            # A disk that makes training wait once for each save is found out save by save.
            limit = max(limit, self._step + self._cost)
            # Below zero, too, by chance: the mean of many saves tells.
            self._spend(min(seconds, limit) - self._step)
            self._account += self._max_overhead * self._step

    def saved(self, stall: float, unpaid: bool) -> None:
        """Training has waited so many seconds for a save.

        Args:
          stall: the seconds.
          unpaid: the save came for another reason, before it was paid for. Nobody owes for that.
        """
        if self._cost_so_far is not None:
            self._settle()
        self._step = self._alone.mean if self._alone.is_known else None
        self._tail = self._steps_after // 2  # the others tell what a step takes
        self._writing_steps = self._steps_after = 0
        self._saves += 1
        self._cost_so_far, self._unpaid = 0.0, unpaid
        self._spend(stall)

    def _spend(self, seconds: float) -> None:
        if not self._unpaid:
            self._account -= seconds
        if self._cost_so_far is not None:
            self._cost_so_far += seconds

    def _settle(self) -> None:
        """The cost of the last save is known; if it was an exceptional one, not all is owed."""
        assert self._cost_so_far is not None
        self._costs.add(max(0.0, self._cost_so_far))
        self._cost_so_far = None
        self._cost, self._bound = self._costs.mean, self._costs.limit
        self._account = max(-self._bound, min(self._account, self._bound))


class SavingCost:
    """What saving costs a session: measured, told, and held against a budget.

    Args:
      budget: hears of every step and save; None: nobody does.
      is_writing: tells whether a file is being written.

    Attributes:
      stall: for how many seconds training has waited for the save that is being made.
    """

    def __init__(
        self,
        budget: Optional[OverheadBudget] = None,
        is_writing: Callable[[], bool] = lambda: False,
    ):
        self._budget = budget
        self._is_writing = is_writing
        self.session_began()

    def session_began(self) -> None:
        """Everything that was measured belongs to another session."""
        self.stall = self._earlier_stall = 0.0
        self._began = time.monotonic()
        self._count = 0
        self._seconds = 0.0
        self._step_began: Optional[float] = None
        self._step_ended: Optional[float] = None
        self._writing = False  # when it began

    def step_begins(self) -> None:
        """From now on it is the user's time."""
        if self._budget is not None:
            self._step_began, self._writing = time.monotonic(), self._is_writing()
            self._step_ended = None

    def step_ends(self) -> None:
        """And now it is ours."""
        if self._budget is not None and self._step_began is not None:
            self._step_ended = time.monotonic()
            self._earlier_stall = self.stall
            self._budget.step_taken(self._step_ended - self._step_began, self._writing)

    @contextlib.contextmanager
    def stalling(self) -> Iterator[None]:
        """Training waits for a save during the block."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.stall += time.monotonic() - start

    @property
    def paid(self) -> bool:
        """Whether a save made now is one that the budget pays for."""
        return self._budget is not None and self._budget.pays

    def saved(self, paid: bool) -> None:
        """A save is made, or handed to the writer; ``paid`` as it was before."""
        self._count += 1
        self._seconds += self.stall
        if self._budget is not None:
            stall = self.stall
            if self._step_ended is not None:  # with all that we do beside waiting
                stall = self._earlier_stall + time.monotonic() - self._step_ended
                self._step_ended = None
            self._budget.saved(stall, unpaid=not paid)
        self.stall = 0.0

    def __str__(self) -> str:
        total = time.monotonic() - self._began
        return "training waited {:.3g} s for {} checkpoints, {:.2g} % of {:.3g} s".format(
            self._seconds, self._count, 100 * self._seconds / total if total else 0.0, total
        )
