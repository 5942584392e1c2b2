"""Signals that ask for a checkpoint: noted when they come, acted upon between two steps."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, Callable, Iterable, List, Optional, Set, Union

# A user asks for a checkpoint with these and lets training go on; all others mean the end.
_GO_ON = {getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)}

# Who waits for signals in this process. One operation each to join, to leave and to look: an
# interrupt finds a request in it or not, and nothing in between.
_waiting: Set[SignalRequest] = set()
if hasattr(os, "register_at_fork"):
    # A forked worker of an input pipeline trains nothing: SIGTERM is to end it.
    os.register_at_fork(after_in_child=_waiting.clear)


class SignalRequest:
    """Notes signals, from `install` until `restore` or until training is over otherwise.

    Handlers form a chain, each calls the one that it has found in place. With two hooks and a
    handler of the user's that was installed between them::

        SIGTERM --> ours, of hook b --> the user's --> ours, of hook a --> the default: terminate

    The chain is nobody's own: the user's handler holds ours of hook a and calls it even when a has
    ended, and may put it in place again when b has installed another. So ours belong to no hook.
    Whichever is called notes the signal for all who wait for it and calls the handler before it;
    only while nobody waits does it let the default action happen, as if it were not there. Who ends
    first does not matter: the last one out puts back what ours has found, here the user's, unless
    somebody else's handler is in place by then.

    Args:
      signals: a signal number, several, or None for none.
      is_over: tells whether training is over, so that nobody will act on what is noted. It may be
        called at any moment.

    Attributes:
      save: a signal has come, a checkpoint is wanted.
      stop: and training should end.
    """

    def __init__(
        self, signals: Union[None, int, Iterable[int]], is_over: Callable[[], bool] = lambda: False
    ):
        if signals is None:
            signals = ()
        self._signals = (signals,) if isinstance(signals, int) else tuple(signals)
        self._is_over = is_over
        self.save = self.stop = False

    def install(self) -> None:
        """Waits for the signals from now on, if it does not yet; what has come is kept.

        Raises:
          RuntimeError: not called in the main thread, where Python allows it.
        """
        if self in _waiting or not self._signals:
            return
        if not _in_main_thread():
            raise RuntimeError(
                "save_on_signal works only where the session is made in the main thread"
            )
        try:
            for number in self._signals:
                _waiting_for(number)  # lets go those whose training died, and what they hold
                in_place = signal.getsignal(number)
                if not isinstance(in_place, _Handler):
                    signal.signal(number, _Handler(in_place))
            _waiting.add(self)
        except BaseException:  # no such signal, or an interrupt
            self._leave()
            raise

    def restore(self) -> None:
        """Waits no longer, puts the earlier handlers back, and forgets what has come."""
        self._leave()
        self.save = self.stop = False

    def _leave(self) -> None:
        _waiting.discard(self)
        if not _in_main_thread():
            return  # Python does not allow it; ours stay and are as good as not there
        for number in self._signals:
            in_place = signal.getsignal(number)
            if isinstance(in_place, _Handler) and not _waiting_for(number):
                signal.signal(number, in_place.earlier)

    def take(self) -> bool:
        """Whether a checkpoint is wanted; asked once for each wish, just before it is made."""
        wanted = self.save
        if wanted:
            self.save = False
        return wanted

    def _note(self, number: int) -> None:
        self.save = True
        self.stop = self.stop or number not in _GO_ON


class _Handler:
    """Notes a signal for all who wait for it, and calls the handler that was there before."""

    def __init__(self, earlier: Any):
        # None: not installed from Python, so Python can neither call it nor put it back.
        self.earlier = signal.SIG_DFL if earlier is None else earlier

    def __call__(self, number: int, frame: Optional[Any]) -> None:
        requests = _waiting_for(number)
        for request in requests:
            request._note(number)
        if requests and self.earlier is signal.default_int_handler:
            return  # Python's own for Ctrl-C would end training in the middle of a step
        if callable(self.earlier):
            self.earlier(number, frame)
        elif self.earlier == signal.SIG_DFL and not requests:
            in_place = signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            signal.signal(number, in_place)  # still here: the default is to ignore, or to pause


def _waiting_for(number: int) -> List[SignalRequest]:
    for request in tuple(_waiting):
        if request._is_over():
            _waiting.discard(request)
    return [request for request in tuple(_waiting) if number in request._signals]


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
