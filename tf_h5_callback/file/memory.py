"""Memory for tensors."""

from __future__ import annotations

import functools
import operator
from typing import Tuple

import numpy as np

_ALIGNMENT = 64  # TensorFlow adopts a buffer with this alignment instead of copying it


def count(shape: Tuple[int, ...]) -> int:
    """The number of elements; exact where NumPy's product would overflow."""
    return functools.reduce(operator.mul, shape, 1)


def aligned_empty(shape: Tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that starts at a multiple of 64 bytes."""
    size = count(shape) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)
