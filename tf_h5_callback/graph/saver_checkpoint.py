"""Checkpoints of ``tf.train.Saver``, seen as if they were ours."""

from __future__ import annotations

import os
from typing import Any, Dict, Iterable, Iterator, Mapping, Optional, Tuple, Union

import numpy as np
import tensorflow.compat.v1 as tf

from tf_h5_callback.errors import CheckpointCorruptError, CheckpointNotFoundError
from tf_h5_callback.file.format import PathLike
from tf_h5_callback.file.reader import Checkpoint
from tf_h5_callback.folder.reading import list_checkpoints, load_checkpoint

_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"  # how tf.train.Checkpoint describes itself


class TensorFlowCheckpoint(Mapping[str, np.ndarray]):
    """A checkpoint of ``tf.train.Saver`` with the interface of `Checkpoint`.

    Names are those that ``Saver`` gives, without ``:0``. It stores a partitioned variable as one
    tensor, as we do.

    Args:
      prefix: as returned by ``tf.train.latest_checkpoint``.

    Raises:
      CheckpointNotFoundError: there is no such checkpoint.
      CheckpointCorruptError: TensorFlow cannot read it.
    """

    tensorflow_version: Optional[str] = None

    def __init__(self, prefix: str):
        self.path = prefix
        if not tf.train.checkpoint_exists(prefix):
            raise CheckpointNotFoundError("no such checkpoint: {}".format(prefix))
        try:
            self._reader = tf.train.load_checkpoint(prefix)
        except tf.errors.OpError as error:
            raise self._corrupt(error) from error
        self._shapes = self._reader.get_variable_to_shape_map()
        self._dtypes = self._reader.get_variable_to_dtype_map()
        self._shapes.pop(_OBJECT_GRAPH, None)

    def _corrupt(self, error: Exception) -> CheckpointCorruptError:
        return CheckpointCorruptError(
            "TensorFlow cannot read its checkpoint {}: {}".format(self.path, error)
        )

    def __enter__(self) -> TensorFlowCheckpoint:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        pass

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            value = self._reader.get_tensor(name)
        except tf.errors.OpError as error:
            raise self._corrupt(error) from error
        return np.array(value, dtype=object) if isinstance(value, bytes) else np.asarray(value)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._shapes))

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> Tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._shapes[name])

    def dtype(self, name: str) -> str:
        """The name of a tensor's dtype."""
        return self._dtypes[name].name

    def verify(self) -> None:
        """Reads everything; TensorFlow compares its checksums meanwhile."""
        for name in self:
            self[name]

    def read_all(self, names: Optional[Iterable[str]] = None) -> Dict[str, np.ndarray]:
        """Reads tensors, all or those named."""
        return {name: self[name] for name in (self if names is None else names)}


def open_checkpoint(path: PathLike) -> Union[Checkpoint, TensorFlowCheckpoint]:
    """Opens a checkpoint of ours or of ``tf.train.Saver``.

    Args:
      path: a file of ours; a folder, for its newest intact checkpoint; or the prefix or folder of
        checkpoints of ``tf.train.Saver``.

    Raises:
      CheckpointNotFoundError: there is neither.
      CheckpointCorruptError: it is damaged.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        prefix = tf.train.latest_checkpoint(path)
        if prefix is not None and not list_checkpoints(path):
            return TensorFlowCheckpoint(prefix)
    elif not os.path.exists(path) and tf.train.checkpoint_exists(path):
        return TensorFlowCheckpoint(path)
    return load_checkpoint(path)
