"""Differences between versions of h5py, NumPy and TensorFlow, found by feature."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from typing import IO, Any, Optional

import h5py
import numpy as np

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
