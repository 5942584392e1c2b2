"""Who writes in a folder, and what dead processes have left in it."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import List

from tf_h5_callback.file.atomic import FolderLock, is_temporary

_log = logging.getLogger("tf_h5_callback")


class WriterLock(FolderLock):
    """The lock of a process that is going to write in a folder for a while."""

    def remove_leftovers(self) -> List[str]:
        """Removes temporary files of dead processes.

        Returns:
          Those that are still there, since a living process may be writing them.
        """
        found = [os.path.join(self._folder, n) for n in os.listdir(self._folder) if is_temporary(n)]
        if found and self._flock("LOCK_EX", "LOCK_NB"):
            for path in found:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
                    _log.info("removed %s, which a process that died had left", path)
            found = []
        self._flock("LOCK_SH")  # an attempt that fails, too, gives up the lock that was held
        return found

    def other_processes(self) -> List[str]:
        """The other living processes that hold the lock: ``["pid 123 (python train.py)"]``.

        Empty where the system does not tell (it does on Linux).
        """
        try:
            with open("/proc/locks") as f:
                rows = [line.split() for line in f]
        except OSError:
            return []
        status = os.fstat(self._handle)
        device = "{:02x}:{:02x}".format(os.major(status.st_dev), os.minor(status.st_dev))
        target = "{}:{}".format(device, status.st_ino)
        pids = {int(row[4]) for row in rows if "FLOCK" in row and target in row} - {os.getpid()}
        return ["pid {} ({})".format(pid, _command(pid)) for pid in sorted(pids) if _alive(pid)]


def _alive(pid: int) -> bool:
    return os.path.exists("/proc/{}".format(pid))


def _command(pid: int) -> str:
    try:
        with open("/proc/{}/cmdline".format(pid), "rb") as f:
            return f.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return "unknown"
