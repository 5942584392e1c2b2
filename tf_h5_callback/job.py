"""Work behind the caller's back that no interrupt can lose, run twice, or forget.

A `KeyboardInterrupt` comes at any line of the main thread, and what it leaves behind must be right:

- Whether a job is over is a fact in the job, set by whoever did the work. It is never concluded
  from ``Thread.join()`` having returned: an interrupt inside it makes Python 3.9 to 3.12 believe
  that a running thread has ended, and the process then exits without it.
- A job is done once, by its thread or by whoever waits for it, if no thread could be started.
- There is no lock that an interrupt could leave held.

A thread for each job, and not a daemon: when the main thread dies of an exception nobody waits, and
Python itself lets the thread finish before the process exits. A thread that waits for more work
would keep the process from exiting, a daemon would be cut off in the middle of a file.
"""

from __future__ import annotations

import threading
from typing import Callable, Dict, Optional, TypeVar

_HEAD_START = 0.1  # seconds, at most

T = TypeVar("T")


def finally_twice(action: Callable[[], T], clean_up: Callable[[], object]) -> T:
    """Returns what ``action`` does, after cleaning up, whatever happens.

    Twice, since one interrupt may come just where the first clean-up should have begun, and a
    ``with`` block has the same gap at its end. Cleaning up a second time must do nothing.
    """
    try:
        try:
            return action()
        finally:
            clean_up()
    finally:
        clean_up()


class Job:
    """A piece of work, done once.

    Args:
      work: what is to be done. It is let go, with all that it holds, as soon as it is over.

    Attributes:
      succeeded: the work has returned.
      error: the Exception that it has raised instead, or None.
    """

    def __init__(self, work: Callable[[], object]):
        self._work: Optional[Callable[[], object]] = work
        self._done_by: Dict[str, object] = {}
        self._over = threading.Event()
        self._has_thread = False
        self.succeeded = False
        self.error: Optional[Exception] = None

    @property
    def over(self) -> bool:
        """Whether nothing of the work will happen any more."""
        return self._over.is_set()

    def start(self, name: str) -> None:
        """Lets a thread of this name do the work; does it here where there can be no thread."""
        # Thread.start() waits until the thread runs, which then keeps the GIL while it runs Python.
        # So it stops at once, and goes on when this thread gives the GIL away by itself.
        head_start = threading.Lock()
        head_start.acquire()
        thread = threading.Thread(target=self._run_after, args=(head_start,), name=name)
        try:
            thread.start()
            self._has_thread = True
        except (RuntimeError, MemoryError):  # no more threads: too many, or the interpreter ends
            self.run()
        finally:
            head_start.release()

    def _run_after(self, head_start: threading.Lock) -> None:
        head_start.acquire(timeout=_HEAD_START)  # an interrupt may keep it from being released
        self.run()

    def run(self) -> None:
        """Does the work here, unless somebody else has begun. What is no Exception is raised."""
        me = object()
        finally_twice(lambda: self._run_as(me), lambda: self._end_as(me))

    def _run_as(self, me: object) -> None:
        # One operation: nothing can come between finding out and claiming.
        if self._done_by.setdefault("who", me) is not me:
            return
        try:
            work = self._work
            if work is not None:
                work()
            self.succeeded = True
        except Exception as error:
            self.error = error
            del self  # the error holds this frame: there would be a circle

    def _end_as(self, me: object) -> None:
        if self._done_by.get("who") is me:
            self._work = None
            self._over.set()

    def wait(self) -> None:
        """Returns when the job is over; interrupted, it changes nothing: wait again.

        A job whose thread was never seen to start is done here.
        """
        if not self._has_thread:
            self.run()
        self._over.wait()
