"""The hook for evaluation and prediction: restores, never writes."""

from __future__ import annotations

import functools
import logging
import os
import time
from typing import Any, Iterable, Optional, Tuple

import tensorflow.compat.v1 as tf

from tf_h5_callback.file.format import PathLike
from tf_h5_callback.folder.directory import DEFAULT_BASENAME, CheckpointDir
from tf_h5_callback.folder.waiting import wait_for_checkpoint
from tf_h5_callback.graph.saver_checkpoint import open_checkpoint
from tf_h5_callback.graph.state import GraphState, VarList
from tf_h5_callback.restoring.restore import EVERYTHING, Restore

_log = logging.getLogger("tf_h5_callback")


class H5RestoreHook(tf.train.SessionRunHook):
    """Restores what its graph has, from the newest checkpoint of a folder or from a file.

    Tensors of the file that the graph does not have, optimizer slots for instance, are ignored.
    Nothing is ever written::

        hook = h5.H5RestoreHook("checkpoints", follow_secs=60)
        with tf.train.SingularMonitoredSession(hooks=[hook]) as session:
            session.run(accuracy)

    Args:
      path: a folder of checkpoints, a file, or a prefix of ``tf.train.Saver``.
      var_list: what to restore; see `H5CheckpointHook`.
      iterators: ``tf.data`` iterators to restore.
      restore: a `Restore` without a path: other names, parts, conversions.
      wait_secs: how long to wait for the first checkpoint of the folder, in seconds.
      follow_secs: look every so many seconds for a newer checkpoint in the folder, between two
        runs, and load it; None: stay with the first.
      checkpoint_basename: as given to the hook that writes.

    Raises:
      ValueError: ``restore`` has a path.
    """

    def __init__(
        self,
        path: PathLike,
        var_list: VarList = None,
        *,
        iterators: Iterable[Any] = (),
        restore: Restore = EVERYTHING,
        wait_secs: float = 0,
        follow_secs: Optional[float] = None,
        checkpoint_basename: str = DEFAULT_BASENAME,
    ):
        if restore.path is not None:
            raise ValueError("the path belongs into the first argument, not into Restore")
        self._path = os.fspath(path)
        self._dir = CheckpointDir(self._path, checkpoint_basename)
        self._var_list = var_list
        self._iterators = tuple(iterators)
        self._restore = restore
        self._wait_secs = wait_secs
        self._follow_secs = follow_secs
        self._state: Optional[GraphState] = None
        self._loaded: Optional[str] = None
        self._newest: Optional[Tuple[int, str]] = None  # when we last looked
        self._looked_at = 0.0

    def begin(self) -> None:
        """Makes the setters."""
        self._state = GraphState(self._var_list, self._iterators)

    def after_create_session(self, session: Any, coord: Any) -> None:
        """Restores, after waiting for the first checkpoint if need be.

        Raises:
          CheckpointNotFoundError: there is none, or none has come in time.
          CheckpointCorruptError: it is damaged; of a folder, each one is.
          CheckpointMismatchError: it lacks something that the graph has; nothing was assigned.
        """
        assert self._state is not None
        self._state.add_late_variables()
        if self._wait_secs and not os.path.isfile(self._path):
            wait_for_checkpoint(self._dir, None, self._wait_secs)
        self._load(session)

    def before_run(self, run_context: Any) -> None:
        """Loads a newer checkpoint, if there is one and newer ones are wanted."""
        if self._follow_secs is None or time.monotonic() < self._looked_at + self._follow_secs:
            return
        self._looked_at = time.monotonic()
        checkpoints = self._dir.list()
        if checkpoints and checkpoints[-1] != self._newest:
            self._load(run_context.session)

    def _load(self, session: Any) -> None:
        self._looked_at = time.monotonic()
        self._newest = next(reversed(self._dir.list()), None)
        read = functools.partial(self._read, session)
        newest = self._dir.read_newest_intact(read)
        if newest is None:
            with open_checkpoint(self._path) as checkpoint:
                read(checkpoint)

    def _read(self, session: Any, checkpoint: Any) -> None:
        assert self._state is not None
        if checkpoint.path == self._loaded:
            return  # a newer one is damaged
        self._state.restore(session, checkpoint, self._restore, ignore_extra=True)
        self._loaded = checkpoint.path
        _log.info("restored %s", checkpoint.path)
