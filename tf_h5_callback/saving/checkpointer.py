"""Snapshots to a folder, one in flight, and the account of what is durable and what failed."""

from __future__ import annotations

import logging
import time
from typing import Mapping, Optional

import numpy as np

from tf_h5_callback.errors import CheckpointError
from tf_h5_callback.file.format import Monitored
from tf_h5_callback.file.writer import write_checkpoint
from tf_h5_callback.folder.directory import CheckpointDir
from tf_h5_callback.saving.background import BackgroundWriter

_log = logging.getLogger("tf_h5_callback")


class CheckpointSaver:
    """Saves snapshots in the background and remembers how it went.

    A failed save is logged at once, by the thread that writes: if training dies first, nobody would
    hear of it. It is raised when the training loop asks.

    Args:
      directory: where, and what is kept.
      background: write in a thread; False: in `save` itself.
      on_error: ``"raise"`` or ``"warn"``: what `report` does about a failed save.

    Raises:
      ValueError: ``on_error`` is neither.

    Attributes:
      saved_step: the step of the last checkpoint that is durable, or None.
    """

    def __init__(self, directory: CheckpointDir, background: bool, on_error: str):
        if on_error not in ("raise", "warn"):
            raise ValueError('on_error is {!r}; it must be "raise" or "warn"'.format(on_error))
        self._dir = directory
        self._raises = on_error == "raise"
        self._writer = BackgroundWriter(background)
        self._in_flight: Optional[int] = None
        self._unannounced: Optional[int] = None
        self._failure: Optional[Exception] = None
        self.saved_step: Optional[int] = None

    @property
    def has_news(self) -> bool:
        """Whether a save has ended of which `wait`, `newly_durable` and `report` can tell."""
        if self._in_flight is not None:
            return not self._writer.busy
        return self._unannounced is not None or self._failure is not None

    @property
    def busy(self) -> bool:
        """Whether a file is being written."""
        return self._writer.busy

    def save(
        self,
        step: int,
        tensors: Mapping[str, np.ndarray],
        tensorflow_version: str,
        metadata_json: str,
        monitored: Optional[Monitored] = None,
        stall_seconds: Optional[float] = None,
    ) -> None:
        """Hands a snapshot to the writer; waits for the one before.

        For the arguments see `write_checkpoint`.
        """
        self.wait()

        path, start = self._dir.path_for(step), time.monotonic()

        def job() -> None:
            try:
                size = write_checkpoint(
                    path,
                    tensors,
                    global_step=step,
                    tensorflow_version=tensorflow_version,
                    metadata=metadata_json,
                    monitored=monitored,
                    stall_seconds=stall_seconds,
                )
                _log_saved(path, size, time.monotonic() - start, stall_seconds)
                self._dir.remove_surplus(step)
            except Exception as error:
                _log.error("step %d is not saved: %s", step, error)
                raise

        self._in_flight = step
        self._writer.submit(job)

    def wait(self) -> None:
        """Returns when nothing is being written, and takes note of the outcome.

        Raises nothing but errors that are no failed save.
        """
        if self._in_flight is None:
            return
        step, self._in_flight = self._in_flight, None
        try:
            self._writer.wait()
        except (CheckpointError, OSError) as error:
            self._failure = error
        else:
            self._failure = None
            self.saved_step = self._unannounced = step

    def newly_durable(self) -> Optional[int]:
        """The step that has become durable since the last call, once; else None."""
        step, self._unannounced = self._unannounced, None
        return step

    def report(self, *, at_the_end: bool = False) -> None:
        """Raises the failure of the last save, once, unless failures are only warned of.

        Args:
          at_the_end: raise it in any case: no later save will make up for it.

        Raises:
          CheckpointError: the last save failed.
        """
        if self._failure is not None and (self._raises or at_the_end):
            failure, self._failure = self._failure, None
            raise failure


def _log_saved(path: str, size: int, seconds: float, stall_seconds: Optional[float]) -> None:
    _log.info(
        "saved %s: %s bytes durable after %.3g s (%.2g GB/s), training waited %.3g s",
        path,
        format(size, ","),
        seconds,
        size / 1e9 / seconds if seconds else 0.0,
        seconds if stall_seconds is None else stall_seconds,
    )
