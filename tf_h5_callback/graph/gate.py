"""Threads that run one session at a time."""

from __future__ import annotations

import logging
import time
from threading import Event, get_ident
from typing import Callable, Dict, Optional, Set, TypeVar

from tf_h5_callback.job import finally_twice
from tf_h5_callback.saving.turn import is_alive

_log = logging.getLogger("tf_h5_callback")

_POLL_SECS = 0.1  # events only make it faster: an interrupt can keep one from being set
_PATIENCE_SECS = 10.0

T = TypeVar("T")


class RunGate:
    """Keeps the runs of other threads out while one of them takes a snapshot.

    Several threads may run one session. Between two runs of one thread another thread's run goes
    on, so "between two steps" is a moment that has to be made: runs that have begun are waited for,
    new ones wait. A run that waits for something that only another one could bring (a queue, say)
    would wait for ever; after 10 seconds the snapshot is taken all the same, and a warning says so.

    For a single thread this is one entry in a dict before each run and one after it.
    """

    def __init__(self) -> None:
        self._running: Dict[int, bool] = {}  # by thread
        self._closed_by: Optional[int] = None
        self._opened, self._left = Event(), Event()
        self._given_up: Set[int] = set()  # threads that are not waited for any more

    def enter(self) -> None:
        """A run begins in this thread."""
        me = get_ident()
        self._running[me] = True
        while self._closed_by is not None and self._closed_by != me:
            self.leave()
            self._opened.wait(_POLL_SECS)
            self._running[me] = True
            holder = self._closed_by
            if holder is not None and not is_alive(holder):
                self._closed_by = None

    def leave(self) -> None:
        """It is over."""
        self._running.pop(get_ident(), None)
        if self._closed_by is not None:
            self._left.set()

    def alone(self, action: Callable[[], T]) -> T:
        """Returns what ``action`` does while no other thread runs the session."""

        def closed() -> T:
            self._close()
            return action()

        return finally_twice(closed, self._open)

    def _close(self) -> None:
        me, deadline = get_ident(), time.monotonic() + _PATIENCE_SECS
        self._opened.clear()
        self._closed_by = me
        while True:
            self._left.clear()
            others = set(list(self._running)) - self._given_up - {me}
            if not any(map(is_alive, others)):
                return
            if time.monotonic() > deadline:
                break
            self._left.wait(_POLL_SECS)
        self._given_up |= others
        _log.warning(
            "a run of this session in another thread has not ended for %.0f s; checkpoints are "
            "taken while it goes on, and may hold its changes in part",
            _PATIENCE_SECS,
        )

    def _open(self) -> None:
        if self._closed_by == get_ident():
            self._closed_by = None
            self._opened.set()
