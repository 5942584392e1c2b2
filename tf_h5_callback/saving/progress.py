"""A tqdm bar of global steps that tells the last checkpoint."""

from __future__ import annotations

from typing import Any


class Progress:
    """Moves a tqdm bar.

    Args:
      bar: False for none, True for one of our own, or a tqdm bar of the user's, which is moved but
        not closed. The last checkpoint is its postfix.
    """

    def __init__(self, bar: Any = False):
        self._own = bar is True
        self._bar = None if isinstance(bar, bool) else bar

    def start(self, step: int) -> None:
        """Begins, or begins again, at a step."""
        if self._own:
            from tqdm.auto import tqdm

            self.close()
            self._bar = tqdm(initial=step, unit="step")
        elif self._bar is not None:
            self._bar.initial = self._bar.n = step
            self._bar.refresh()

    def advance(self, step: int) -> None:
        """Training is at this step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def saved(self, step: int) -> None:
        """A checkpoint of this step is durable."""
        if self._bar is not None:
            self._bar.set_postfix(checkpoint=step)

    def close(self) -> None:
        """Closes a bar of our own."""
        if self._own and self._bar is not None:
            self._bar.close()
            self._bar = None
