"""A snapshot to disk behind the training loop: one job in flight, every outcome collected.

A thread for each job, and not a daemon: when training dies of an exception nobody calls `wait`,
and Python itself lets the thread finish before the process exits. A thread that waits for the next
job would keep the process from exiting, a daemon would be cut off in the middle of a file.
"""

from __future__ import annotations

import threading
from typing import Callable, Optional

Job = Callable[[], None]


class BackgroundWriter:
    """Runs one job at a time. A job that fails should say so itself: perhaps nobody will ask.

    Args:
      background: True: in a thread; False: in `submit` itself.
    """

    def __init__(self, background: bool = True):
        self._background = background
        self._thread: Optional[threading.Thread] = None
        self._error: Optional[BaseException] = None

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Starts a job. The one before must have been collected with `wait`."""
        assert self._thread is None and self._error is None
        if not self._background:
            self._run(job)
            return
        # start() waits until the thread runs, which then keeps the GIL while it runs Python. So it
        # stops at once, and goes on when the training thread gives the GIL away by itself.
        go_on = threading.Lock()
        with go_on:
            self._thread = threading.Thread(
                target=self._run_after, args=(go_on, job), name="tf_h5_callback-writer"
            )
            self._thread.start()

    def _run_after(self, go_on: threading.Lock, job: Job) -> None:
        with go_on:
            pass
        self._run(job)

    def _run(self, job: Job) -> None:
        try:
            job()
        except BaseException as error:  # raised again by wait(), on the thread that asks
            self._error = error

    def wait(self) -> None:
        """Returns when nothing is running; raises what the job raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
