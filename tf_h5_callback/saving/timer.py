"""When to save: every so many steps or seconds, as often as it is paid for; what comes first."""

from __future__ import annotations

import time
from typing import Optional

from tf_h5_callback.saving.budget import OverheadBudget


class SaveTimer:
    """Decides when a save is due, as ``tf.train.SecondOrStepTimer`` does, with both triggers.

    A save is due when ``step >= last + save_steps`` (so that steps that jump do not miss it), or
    ``save_secs`` after the last one, or when a budget pays for it, and never twice at one step.

    Args:
      save_steps: distance in global steps, at least 1; None: steps do not count.
      save_secs: distance in seconds of wall-clock time, above 0; None: time does not count.
      budget: pays for saves, or None.

    Raises:
      ValueError: none is given, or one is out of range.
    """

    def __init__(
        self,
        save_steps: Optional[int] = None,
        save_secs: Optional[float] = None,
        budget: Optional[OverheadBudget] = None,
    ):
        if save_steps is None and save_secs is None and budget is None:
            raise ValueError(
                "when to save? Give save_steps (a number of global steps), save_secs (a number of "
                "seconds), max_overhead (a fraction of the training time), or several of them"
            )
        if save_steps is not None and save_steps < 1:
            raise ValueError("save_steps is {!r}; it must be at least 1".format(save_steps))
        if save_secs is not None and save_secs <= 0:
            raise ValueError("save_secs is {!r}; it must be above 0".format(save_secs))
        self._save_steps = save_steps
        self._save_secs = save_secs
        self._budget = budget
        self._last_step: Optional[int] = None
        self._last_time = 0.0

    @property
    def last_step(self) -> Optional[int]:
        """The step of the last save or restore."""
        return self._last_step

    def is_due(self, step: int) -> bool:
        """Whether to save at this global step; always before the first `update`."""
        if self._last_step is None:
            return True
        if step == self._last_step:
            return False
        if self._save_steps is not None and step >= self._last_step + self._save_steps:
            return True
        if self._save_secs is not None and time.monotonic() >= self._last_time + self._save_secs:
            return True
        return self._budget is not None and self._budget.pays

    def update(self, step: int) -> None:
        """The state at this step is saved, or was just restored."""
        self._last_step = step
        self._last_time = time.monotonic()
