"""Waiting for checkpoints that another process writes."""

from __future__ import annotations

import time
from typing import Callable, Iterator, Optional

from tf_h5_callback.file.format import PathLike
from tf_h5_callback.folder.directory import DEFAULT_BASENAME, CheckpointDir

_POLL_SECS = 1.0


def checkpoints_iterator(
    checkpoint_dir: PathLike,
    min_interval_secs: float = 0,
    timeout: Optional[float] = None,
    timeout_fn: Optional[Callable[[], bool]] = None,
    checkpoint_basename: str = DEFAULT_BASENAME,
) -> Iterator[str]:
    """Yields new checkpoints as they appear, as ``tf.train.checkpoints_iterator`` does.

    Only the newest one is yielded if several have appeared meanwhile. A file that has its final
    name is complete; it is not read here, so damage shows when it is opened.

    Args:
      checkpoint_dir: the folder; need not exist yet.
      min_interval_secs: the least time between two checkpoints, in seconds.
      timeout: how long to wait for the next one, in seconds; None: for ever.
      timeout_fn: called after a timeout; true ends the iteration, false waits again. By default a
        timeout ends it.
      checkpoint_basename: as given to the hook.

    Yields:
      Paths.
    """
    directory = CheckpointDir(checkpoint_dir, checkpoint_basename)
    last: Optional[str] = None
    while True:
        path = wait_for_checkpoint(directory, last, timeout)
        if path is None:
            if timeout_fn is None or timeout_fn():
                return
            continue
        last = path
        yielded_at = time.monotonic()
        yield path
        time.sleep(max(0.0, yielded_at + min_interval_secs - time.monotonic()))


def wait_for_checkpoint(
    directory: CheckpointDir, last: Optional[str], timeout: Optional[float]
) -> Optional[str]:
    """Waits until the newest checkpoint is another than ``last``.

    Returns:
      Its path, or None after ``timeout`` seconds (None: never).
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        checkpoints = directory.list()
        if checkpoints and checkpoints[-1][1] != last:
            return checkpoints[-1][1]
        remaining = _POLL_SECS if deadline is None else deadline - time.monotonic()
        if remaining <= 0:
            return None
        time.sleep(min(_POLL_SECS, remaining))
