"""Crash-safe HDF5 checkpoints for TensorFlow training loops.

Reading needs no TensorFlow; what does need it is imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, List

from tf_h5_callback.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from tf_h5_callback.file.reader import Checkpoint
from tf_h5_callback.folder.reading import (
    best_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    list_variables,
    load_checkpoint,
    load_variable,
)
from tf_h5_callback.folder.waiting import checkpoints_iterator
from tf_h5_callback.restoring.restore import Restore, rnn_names_of_tensorflow_1_2

if TYPE_CHECKING:
    from tf_h5_callback.graph.functions import create_setters, restore_variables, save_variables
    from tf_h5_callback.graph.hook import H5CheckpointHook
    from tf_h5_callback.graph.restore_hook import H5RestoreHook

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "H5CheckpointHook",
    "H5RestoreHook",
    "Restore",
    "best_checkpoint",
    "checkpoints_iterator",
    "create_setters",
    "latest_checkpoint",
    "list_checkpoints",
    "list_variables",
    "load_checkpoint",
    "load_variable",
    "restore_variables",
    "rnn_names_of_tensorflow_1_2",
    "save_variables",
]

_NEEDS_TENSORFLOW = {
    "H5CheckpointHook": "graph.hook",
    "H5RestoreHook": "graph.restore_hook",
    "create_setters": "graph.functions",
    "restore_variables": "graph.functions",
    "save_variables": "graph.functions",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TENSORFLOW:
        raise AttributeError("module {!r} has no attribute {!r}".format(__name__, name))
    module = importlib.import_module("{}.{}".format(__name__, _NEEDS_TENSORFLOW[name]))
    return getattr(module, name)


def __dir__() -> List[str]:
    return sorted(set(globals()) | set(__all__))
