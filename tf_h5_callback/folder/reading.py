"""What is read without TensorFlow: the public functions, named as in ``tf.train``."""

from __future__ import annotations

import logging
import os
from typing import Dict, List, Optional, Tuple

import numpy as np

from tf_h5_callback.errors import CheckpointCorruptError, CheckpointNotFoundError
from tf_h5_callback.file.format import Monitored, PathLike
from tf_h5_callback.file.reader import Checkpoint
from tf_h5_callback.folder.directory import DEFAULT_BASENAME, CheckpointDir
from tf_h5_callback.folder.retention import best_first

_log = logging.getLogger("tf_h5_callback")


def list_checkpoints(
    checkpoint_dir: PathLike, checkpoint_basename: str = DEFAULT_BASENAME
) -> List[Tuple[int, str]]:
    """Lists the checkpoints of a folder by their names, without opening them.

    Args:
      checkpoint_dir: the folder; one that does not exist holds no checkpoints.
      checkpoint_basename: as given to the hook.

    Returns:
      ``[(step, path)]``, oldest step first.
    """
    return CheckpointDir(checkpoint_dir, checkpoint_basename).list()


def latest_checkpoint(
    checkpoint_dir: PathLike, checkpoint_basename: str = DEFAULT_BASENAME
) -> Optional[str]:
    """The checkpoint of the highest step that is intact, or None where there is none at all.

    Reads the file whole, to verify it. The counterpart of ``tf.train.latest_checkpoint``.

    Args:
      checkpoint_dir: the folder.
      checkpoint_basename: as given to the hook.

    Raises:
      CheckpointCorruptError: there are checkpoints, but none is intact.
    """
    newest = CheckpointDir(checkpoint_dir, checkpoint_basename).read_newest_intact(
        Checkpoint.verify
    )
    return None if newest is None else newest[0]


def best_checkpoint(
    checkpoint_dir: PathLike, checkpoint_basename: str = DEFAULT_BASENAME
) -> Optional[str]:
    """The intact checkpoint with the best monitored value, or None where none has one.

    Reads the file whole, to verify it. NaN is never best; of equal ones the oldest is.

    Args:
      checkpoint_dir: the folder of a hook with ``monitor=``.
      checkpoint_basename: as given to the hook.
    """
    monitored: Dict[str, Optional[Monitored]] = {}
    for _, path in list_checkpoints(checkpoint_dir, checkpoint_basename):
        try:
            with Checkpoint(path) as checkpoint:
                checkpoint.verify()
                monitored[path] = checkpoint.monitored
        except CheckpointCorruptError as error:
            _log.warning("%s; it cannot be the best", error)
    return next(iter(best_first(monitored)), None)


def load_checkpoint(path_or_dir: PathLike) -> Checkpoint:
    """Opens a checkpoint, or the newest intact one of a folder.

    Args:
      path_or_dir: a file, or a folder of checkpoints with the default base name.

    Returns:
      A `Checkpoint`: a read-only mapping name -> ndarray, read lazily.

    Raises:
      CheckpointNotFoundError: there is no such file, or no checkpoint in the folder.
      CheckpointCorruptError: the file, or each one in the folder, is damaged.
    """
    if not os.path.isdir(path_or_dir):
        return Checkpoint(path_or_dir)
    path = latest_checkpoint(path_or_dir)
    if path is None:
        raise no_checkpoint_in(path_or_dir)
    return Checkpoint(path)


def no_checkpoint_in(
    checkpoint_dir: PathLike, basename: str = DEFAULT_BASENAME
) -> CheckpointNotFoundError:
    """The error that tells of a folder without checkpoints."""
    return CheckpointNotFoundError(
        "no checkpoint named {}-<step>.h5 in {}".format(basename, os.fspath(checkpoint_dir))
    )


def list_variables(path_or_dir: PathLike) -> List[Tuple[str, Tuple[int, ...]]]:
    """``[(name, shape)]`` of a checkpoint, without reading its tensors.

    The counterpart of ``tf.train.list_variables``. For arguments and errors see `load_checkpoint`.
    """
    with load_checkpoint(path_or_dir) as checkpoint:
        return [(name, checkpoint.shape(name)) for name in checkpoint]


def load_variable(path_or_dir: PathLike, name: str) -> np.ndarray:
    """Reads one tensor of a checkpoint, verified. The counterpart of ``tf.train.load_variable``.

    Args:
      path_or_dir: see `load_checkpoint`, also for its errors.
      name: as in the graph, for instance ``"rnn/cell/kernel:0"``.

    Raises:
      KeyError: the checkpoint has no such tensor.
    """
    with load_checkpoint(path_or_dir) as checkpoint:
        if name not in checkpoint:
            raise KeyError(
                "{} has no {!r}; it has {}".format(
                    checkpoint.path, name, ", ".join(map(repr, checkpoint))
                )
            )
        return checkpoint[name]
