"""The global step, as far as it can be told from what is fetched with each run."""

from __future__ import annotations

from typing import Optional


class StepWatch:
    """Follows the global step without a ``session.run`` of its own.

    The step is fetched along with the user's run, which also increments it, and TensorFlow reads it
    before or after that, as it happens. So what was fetched may be one increment behind. Reading it
    again costs as much as a small step: only where a save would be due one increment later.

    For example, with ``save_steps=10``, the last save at step 20, and runs that add 1:

    ========== ============ ================ ================================
    fetched    may be       due if it is     so the step is read again
    ========== ============ ================ ================================
    27         28           no               no
    28         29           no               no
    29         30           yes              yes: 29, nothing; or 30, saved
    30         31           yes              yes: 30 or 31, saved
    ========== ============ ================ ================================

    Attributes:
      seen: the step as fetched last, or as `begin` was told; None before.
      possible: the step that it may be by now.
    """

    def __init__(self) -> None:
        self.seen: Optional[int] = None
        self.possible = 0
        self._increment = 1  # the largest seen

    def begin(self, step: int) -> None:
        """A session begins at this step."""
        self.seen = step

    def fetched(self, step: int) -> int:
        """A run has fetched this step; returns the step that it may be now."""
        if self.seen is not None:
            self._increment = max(self._increment, step - self.seen)
        self.seen = step
        self.possible = step + self._increment
        return self.possible
