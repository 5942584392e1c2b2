"""Whose turn it is, among the threads of one training."""

from __future__ import annotations

import sys
import time
from threading import get_ident
from typing import Callable, Dict

from tf_h5_callback.job import finally_twice

_POLL_SECS = 0.01


def is_alive(thread: int) -> bool:
    """Whether a thread of this identifier runs."""
    return thread in sys._current_frames()


class Turn:
    """Lets one thread at a time do something.

    Not a lock: an interrupt could leave it held, and nobody could tell by whom. A turn has a
    holder, who takes it again where it was left, and whose death ends it.
    """

    def __init__(self) -> None:
        self._holder: Dict[str, int] = {}

    def _take(self) -> bool:
        me = get_ident()
        holder = self._holder.setdefault("thread", me)
        if holder != me and not is_alive(holder):
            self._holder.pop("thread", None)
            holder = self._holder.setdefault("thread", me)
        return holder == me

    def _give_back(self) -> None:
        if self._holder.get("thread") == get_ident():
            self._holder.pop("thread", None)

    def do(self, action: Callable[[], object], wait: bool = False) -> None:
        """Does something, if it is no other thread's turn, or when it is not any more.

        Args:
          action: what.
          wait: False: another thread is at it, which will do: return at once.
        """

        def attempt() -> bool:
            if not self._take():
                return False
            action()
            return True

        while not finally_twice(attempt, self._give_back) and wait:
            time.sleep(_POLL_SECS)
