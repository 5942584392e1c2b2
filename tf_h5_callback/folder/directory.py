"""A folder of checkpoints: names, listing, the newest intact one, retention.

"Latest" means the highest global step in the file names, among files that are intact. There is no
pointer file that could be lost or disagree with the files; times of modification do not count
(copying changes them).
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any, Callable, Container, Dict, List, Mapping, Optional, Set, Tuple, TypeVar

import numpy as np

from tf_h5_callback.errors import CheckpointCorruptError, CheckpointNotFoundError
from tf_h5_callback.file.format import PathLike
from tf_h5_callback.file.reader import Checkpoint
from tf_h5_callback.folder.lock import WriterLock
from tf_h5_callback.folder.retention import Retention

_log = logging.getLogger("tf_h5_callback")

DEFAULT_BASENAME = "model.ckpt"

Tensors = Dict[str, np.ndarray]
T = TypeVar("T")


def read_verified(checkpoint: Any, names: Optional[Mapping[str, str]] = None) -> Tensors:
    """Reads and verifies a checkpoint.

    Args:
      checkpoint: an open one, or what has its interface.
      names: what is wanted, and under which name: ``{new name: name in the file}``; None: all.

    Returns:
      ``{new name: ndarray}``, no array twice.

    Raises:
      CheckpointCorruptError: a tensor is damaged.
    """
    if names is None:
        return checkpoint.read_all()
    values = checkpoint.read_all(names.values())
    used: Set[str] = set()
    tensors = {}
    for new, name in names.items():
        tensors[new] = values[name].copy() if name in used else values[name]
        used.add(name)
    return tensors


class CheckpointDir:
    """The checkpoints of one base name in one folder, and which of them are kept.

    Files that are not named ``<basename>-<global step>.h5`` are never listed and never touched.

    Args:
      path: the folder; need not exist for listing.
      basename: the first part of the file names.
      retention: what is kept; None: everything.

    Raises:
      ValueError: the base name is not a plain file name.
    """

    def __init__(
        self,
        path: PathLike,
        basename: str = DEFAULT_BASENAME,
        retention: Optional[Retention] = None,
    ):
        if not basename or os.path.basename(basename) != basename:
            raise ValueError(
                "checkpoint_basename is {!r}; it must be a file name without a folder".format(
                    basename
                )
            )
        self.path = os.fspath(path)
        self._basename = basename
        self._retention = retention or Retention()
        self._pattern = re.compile(re.escape(basename) + r"-(0|[1-9][0-9]*)\.h5")
        self._lock: Optional[WriterLock] = None

    def open_for_writing(self) -> None:
        """Creates the folder where it does not exist, and says that this process writes in it.

        Removes temporary files that dead processes left; warns of living ones that write here too.
        """
        os.makedirs(self.path, exist_ok=True)
        if self._lock is None:
            self._lock = WriterLock(self.path)
        left = self._lock.remove_leftovers()
        others = self._lock.other_processes()
        if others:
            _log.warning(
                "%s is used for writing by another process: %s. Each run needs a folder of its "
                "own: they delete and resume from each other's checkpoints",
                self.path,
                ", ".join(others),
            )
        elif left:
            _log.info("temporary files in %s, perhaps left by dead processes: %s", self.path, left)

    def close(self) -> None:
        """Says that this process writes here no more."""
        lock, self._lock = self._lock, None  # first: an interrupt may come in between
        if lock is not None:
            lock.close()

    def path_for(self, global_step: int) -> str:
        """The file of a step."""
        return os.path.join(self.path, "{}-{:d}.h5".format(self._basename, global_step))

    def list(self) -> List[Tuple[int, str]]:
        """``[(step, path)]``, oldest step first; empty where there is no such folder."""
        try:
            names = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        matches = filter(None, map(self._pattern.fullmatch, names))
        return sorted((int(m.group(1)), os.path.join(self.path, m.group())) for m in matches)

    def read_newest_intact(
        self,
        read: Callable[[Checkpoint], T],
        move_damaged: bool = False,
        among: Optional[Container[int]] = None,
    ) -> Optional[Tuple[str, T]]:
        """Reads the newest checkpoint that is not damaged.

        A damaged one is passed over with a warning that names the file and the reason.

        Args:
          read: called with one open checkpoint after the other until it does not raise
            CheckpointCorruptError; should verify it. What else it raises is raised.
          move_damaged: rename the damaged ones that were passed over to ``<name>.damaged``, so that
            they neither count nor are overwritten. Only if an intact one is found.
          among: the steps that count; None: all.

        Returns:
          The path, and what ``read`` returned, or None where there are no checkpoints at all.

        Raises:
          CheckpointCorruptError: there are checkpoints, but none is intact; lists them all.
        """
        damaged: Dict[str, CheckpointCorruptError] = {}
        for step, path in reversed(self.list()):
            if among is not None and step not in among:
                continue
            try:
                with Checkpoint(path) as checkpoint:
                    newest = path, read(checkpoint)
            except CheckpointCorruptError as error:
                _log.warning("%s; trying the one before it", error)
                damaged[path] = error
            except CheckpointNotFoundError:
                continue  # deleted since it was listed
            else:
                for path in damaged if move_damaged else ():
                    _move_aside(path)
                return newest
        if damaged:
            raise CheckpointCorruptError(
                "none of the {} checkpoints in {} is intact; to start anew, move them away:\n"
                "  {}".format(len(damaged), self.path, "\n  ".join(map(str, damaged.values())))
            )
        return None

    def warn_of_later_steps(self, step: int) -> None:
        """Training begins at this step; files of later ones would win at the next start."""
        later = [path for s, path in self.list() if s > step]
        if later:
            _log.warning(
                "training begins at step %d, but there are checkpoints of later steps, up to %s. "
                "The next run with restore=True will resume from there: move them away if that is "
                "not what you want",
                step,
                later[-1],
            )

    def remove_surplus(self, newest_step: int) -> List[int]:
        """Deletes what retention does not keep, all of it at once.

        Only files up to ``newest_step`` (the one just written) count: files of later steps belong
        to a run that was rolled back, and are left alone.

        Returns:
          The steps whose files are gone.
        """
        steps = {path: step for step, path in self.list() if step <= newest_step}
        return [steps[path] for path in self._retention.surplus(list(steps)) if _remove(path)]


def _move_aside(path: str) -> None:
    aside, n = path + ".damaged", 1
    while os.path.exists(aside):
        n += 1
        aside = "{}.damaged-{}".format(path, n)
    try:
        os.rename(path, aside)
    except OSError as error:
        _log.warning("cannot move the damaged checkpoint %s aside: %s", path, error)
    else:
        _log.warning("the damaged checkpoint is kept as %s", aside)


def _remove(path: str) -> bool:
    """Whether it is gone."""
    try:
        os.remove(path)
    except FileNotFoundError:
        pass  # somebody else was faster
    except OSError as error:
        _log.warning("cannot delete the old checkpoint %s: %s", path, error)
        return False
    return True
