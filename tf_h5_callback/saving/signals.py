"""Signals that ask for a checkpoint: noted when they come, acted upon between two steps."""

from __future__ import annotations

import os
import signal
from typing import Any, Callable, Dict, Iterable, Optional, Union

# A user asks for a checkpoint with these and lets training go on; all others mean the end.
_GO_ON = {getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)}


class SignalRequest:
    """Notes signals and calls the handlers that were there before.

    Args:
      signals: a signal number, several, or None for none.
      is_over: tells whether training is over, so that nobody will act on what is noted: then the
        handlers from before are put back and the signal is delivered to them.

    Attributes:
      save: a signal has come, a checkpoint is wanted.
      stop: and training should end.
    """

    def __init__(
        self, signals: Union[None, int, Iterable[int]], is_over: Callable[[], bool] = lambda: False
    ):
        if signals is None:
            signals = ()
        self._signals = [signals] if isinstance(signals, int) else list(signals)
        self._is_over = is_over
        self._earlier: Dict[int, Any] = {}
        self.save = self.stop = False

    def install(self) -> None:
        """Installs the handlers, unless they are.

        Raises:
          RuntimeError: not called in the main thread, where Python allows it.
        """
        self.save = self.stop = False
        for number in self._signals:
            if number in self._earlier:
                continue
            try:
                self._earlier[number] = signal.signal(number, self._handle)
            except ValueError as error:
                raise RuntimeError(
                    "save_on_signal works only where the session is made in the main thread"
                ) from error

    def restore(self) -> None:
        """Puts the earlier handlers back."""
        while self._earlier:
            number, handler = self._earlier.popitem()
            # None: not installed from Python, so Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def take(self) -> bool:
        """Whether a checkpoint is wanted; asked once for each wish, just before it is made."""
        wanted = self.save
        if wanted:
            self.save = False
        return wanted

    def _handle(self, number: int, frame: Optional[Any]) -> None:
        if self._is_over():
            self.restore()
            os.kill(os.getpid(), number)
            return
        self.save = True
        self.stop = self.stop or number not in _GO_ON
        earlier = self._earlier.get(number)
        # Python's own for Ctrl-C would end training in the middle of a step.
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(number, frame)
