"""Differences between versions of TensorFlow, and its private signs, each with a name of ours."""

from __future__ import annotations

import sys
from typing import Any, List, NamedTuple, Optional, Tuple

import tensorflow.compat.v1 as tf

# Tensors of 2.x are slow to tell which attributes they lack, and session.run() asks for some.
TENSORS_ARE_SLOW_TO_FETCH = hasattr(tf.Tensor, "__getattr__")


# What makes a lost session anew, inside of the user's ``session.run()``; None: it is not there.
_RECOVERABLE_SESSION = getattr(
    sys.modules[tf.train.MonitoredSession.__module__], "_RecoverableSession", None
)


def is_recovering() -> bool:
    """Whether this thread is about to make a lost session anew, or in the middle of a run."""
    frame = sys._getframe()
    while frame is not None:
        if _RECOVERABLE_SESSION is not None and frame.f_code is _RECOVERABLE_SESSION.run.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class Slice(NamedTuple):
    """Which part of a partitioned variable this one is.

    Attributes:
      name: of the whole variable, as `tf.train.Saver` calls it, with ``:0``.
      shape: of the whole variable.
      slices: where this part is.
    """

    name: str
    shape: Any
    slices: Tuple[slice, ...]


def slice_of(variable: Any) -> Optional[Slice]:
    """What `tf.train.Saver` goes by where a variable is a part of a partitioned one."""
    info = getattr(variable, "_save_slice_info", None)
    if info is None:
        return None
    return Slice(
        info.full_name + ":0",
        tf.TensorShape(info.full_shape),
        tuple(slice(o, o + n) for o, n in zip(info.var_offset, info.var_shape)),
    )


def name_of(variable: Any) -> str:
    """A variable's name in a file; parts of a partitioned one have that of the whole."""
    part = slice_of(variable)
    return variable.name if part is None else part.name


def parts_of(value: Any) -> List[Any]:
    """The parts of a partitioned variable, or the variable."""
    return list(value) if hasattr(value, "as_tensor") else [value]


def is_saveable(value: Any) -> bool:
    """Whether this is a saveable object (a lookup table, an iterator) and not a variable."""
    return hasattr(value, "specs") and hasattr(value, "restore")


def is_variable(value: Any) -> bool:
    """Whether this is a variable of any kind: there is no class that all of them share."""
    return hasattr(value, "initializer") and hasattr(value, "dtype")


def is_ref_variable(variable: Any) -> bool:
    """Whether this is a variable of TensorFlow 1's first kind, which can change its shape."""
    return hasattr(variable, "_ref")


def initial_value_of(variable: Any) -> Optional[Any]:
    """The tensor that the initialiser assigns, which can be fed; None if there are several."""
    inputs = variable.initializer.inputs
    return inputs[1] if len(inputs) == 2 else None
