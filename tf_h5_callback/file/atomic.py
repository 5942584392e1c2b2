"""Files that appear whole or not at all, and what killed processes leave behind.

The protocol: a temporary file in the same folder, fsync, rename, fsync of the folder. A process
that is killed on the way leaves the temporary file. The next one to start removes it, but only if
no living process writes in the folder: each writer holds a shared lock (flock) on the folder
itself, which the kernel drops when the process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
import weakref
from typing import IO, Any, Callable, Optional, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

_TEMPORARY = re.compile(r"\..+\.tf-h5-[0-9a-f]{32}\.tmp")


def temporary_name(path: str) -> str:
    """A new name for a temporary file beside ``path``; it begins with a dot."""
    folder, name = os.path.split(path)
    return os.path.join(folder, ".{}.tf-h5-{}.tmp".format(name, uuid.uuid4().hex))


def atomic_write(path: str, size: int, write: Callable[[IO[bytes]], T]) -> T:
    """Writes a temporary file that gets its name, durably, if that succeeds.

    A function that is given one, and not a context manager, where an interrupt can come between the
    end of the block and what has to be done then.

    Args:
      path: the file; one that exists is replaced.
      size: bytes needed, about.
      write: called with the temporary file, binary and unbuffered; its ``name`` is its path.

    Returns:
      What ``write`` returned.

    Raises:
      OSError: the file could not be written. If space is what lacks, the text says how much is
        needed and how much is free. Whatever is raised, by ``write`` as well: the temporary file is
        removed, and an earlier file of this name stays, unless the new one has just replaced it.
    """
    folder = os.path.dirname(path)
    temporary = temporary_name(path)
    lock = FolderLock(folder)
    try:
        try:
            free = shutil.disk_usage(folder).free
            if free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with open(temporary, "xb", buffering=0) as f:
                result = write(f)
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno,
                    "{}: {:,} bytes are needed, {:,} are free in {}".format(
                        error.strerror, size, free, folder
                    ),
                ) from error
            raise
        lock.sync()
        return result
    finally:
        lock.close()


class FolderLock:
    """A shared lock on a folder: "a living process writes in here".

    Where the file system (some network mounts) or the system (Windows) cannot lock folders, nothing
    is locked, and nothing is ever taken for a dead process's.

    Args:
      folder: must exist.

    Raises:
      OSError: the folder cannot be opened.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._handle = -1
        self._close: Optional[weakref.finalize] = None
        if hasattr(os, "O_DIRECTORY"):
            # One line: an interrupt between the two would leave the folder open for good.
            self._close = weakref.finalize(self, os.close, os.open(folder, os.O_RDONLY))
            self._handle = self._close.peek()[2][0]  # type: ignore[index]
        self._flock("LOCK_SH")

    def _flock(self, *flags: str) -> bool:
        if fcntl is None:
            return False
        try:
            fcntl.flock(self._handle, sum(getattr(fcntl, flag) for flag in flags))
        except OSError:  # somebody else's, or not possible on this file system
            return False
        return True

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back."""
        if self._close is not None:
            self._close()

    def sync(self) -> None:
        """Makes renames in the folder durable; Windows has no such call and needs none."""
        if self._handle >= 0:
            os.fsync(self._handle)


def is_temporary(name: str) -> bool:
    """Whether a file name is one of `temporary_name`."""
    return _TEMPORARY.fullmatch(name) is not None
