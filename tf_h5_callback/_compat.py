"""Differences between versions of h5py, NumPy and TensorFlow, found by feature."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from typing import IO, Any, Optional

import h5py
import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

try:
    from isal.isal_zlib import crc32 as crc32  # ten times as fast, the same value
except ImportError:
    from zlib import crc32 as crc32

# HDF5's own file locks fail on some NFS and Lustre mounts (errno 11, 37, 524) and protect nothing
# here: a checkpoint gets its name only when it is complete.
_NO_LOCKING = {"locking": False} if "locking" in inspect.signature(h5py.File).parameters else {}

_SEEK_LOCK = threading.Lock()

# What h5py raises for a file that is damaged; which one depends on where the damage is.
H5PY_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError)


def open_h5(path: str) -> h5py.File:
    """Opens an HDF5 file to read, without HDF5's file locking where h5py can do so (since 3.5)."""
    return h5py.File(path, "r", **_NO_LOCKING)


def read_at(file: IO[bytes], view: memoryview, offset: int) -> int:
    """Reads bytes of an unbuffered file into ``view``, from any thread; returns their number."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [view], offset)
    with _SEEK_LOCK:  # Windows, and macOS before Python 3.10
        file.seek(offset)
        return file.readinto(view)  # type: ignore[attr-defined]


def write_at(file: IO[bytes], view: memoryview, offset: int) -> int:
    """Writes bytes to an unbuffered file, from any thread; returns how many it took."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file.fileno(), view, offset)
    with _SEEK_LOCK:  # Windows
        file.seek(offset)
        return file.write(view)


def set_direct(file: IO[bytes], on: bool) -> bool:
    """Makes output to a file bypass the page cache, or not; returns whether that can be done."""
    if not hasattr(os, "O_DIRECT"):
        return False
    flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
    try:
        fcntl.fcntl(
            file.fileno(), fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
        )
    except OSError:  # EINVAL: not on this file system
        return False
    return True


def extension_dtype(name: str) -> Optional[np.dtype]:
    """NumPy's dtype for ``bfloat16`` and the like, or None where no installed package has it.

    TensorFlow 2.x takes these from ``ml_dtypes``; 1.15 brings its own bfloat16.
    """
    try:
        import ml_dtypes
    except ImportError:
        tensorflow: Any = sys.modules.get("tensorflow")
        scalar = getattr(tensorflow, name, None)
        return np.dtype(scalar.as_numpy_dtype) if scalar is not None else None
    scalar = getattr(ml_dtypes, name, None)
    return np.dtype(scalar) if scalar is not None else None
