"""A session as a checkpointer sees it."""

from __future__ import annotations

from typing import Any, Callable, Iterable, Mapping, Optional, Tuple, Union

import tensorflow.compat.v1 as tf

from tf_h5_callback.graph.gate import RunGate
from tf_h5_callback.graph.state import GraphState
from tf_h5_callback.saving.save import Save, Training

Metadata = Union[None, Mapping[str, Any], Callable[[Any, int], Mapping[str, Any]]]


class SessionTraining(Training):
    """What is trained by a session.

    Args:
      session: the raw session.
      state: all that is saved of its graph.
      step_tensor: the global step.
      gate: keeps the runs of other threads out.
      listeners: ``tf.train.CheckpointSaverListener`` instances.
      metadata: a dict, or a callable ``(session, global_step) -> dict``.
      background: False: the state is copied piece by piece while it is written.

    Attributes:
      session: the raw session.
    """

    tensorflow_version = tf.VERSION

    def __init__(
        self,
        session: Any,
        state: GraphState,
        step_tensor: Any,
        gate: RunGate,
        listeners: Iterable[Any],
        metadata: Metadata,
        background: bool,
    ):
        self.session = session
        self._state, self._step_tensor, self._gate = state, step_tensor, gate
        self._listeners, self._metadata, self._background = listeners, metadata, background
        # It takes half the time of session.run().
        self._read_step: Callable[[], Any] = session.make_callable(step_tensor)

    def current_step(self) -> int:
        """The global step, read now."""
        return int(self._read_step())

    def snapshot(self, owner: Save) -> Tuple[Mapping[str, Any], int]:
        """See `Training`.

        Raises:
          MemoryError: there is none left for the copy.
        """
        try:
            if self._background:
                tensors, (step,) = self._gate.alone(
                    lambda: self._state.snapshot(self.session, owner, self._step_tensor)
                )
                return tensors, int(step)
            return self._state.lazy_snapshot(self.session), self.current_step()
        except tf.errors.ResourceExhaustedError as error:
            raise MemoryError(str(error)) from error

    def metadata(self, step: int) -> Optional[Mapping[str, Any]]:
        """See `Training`."""
        return self._metadata(self.session, step) if callable(self._metadata) else self._metadata

    def before_save(self, step: int) -> None:
        """See `Training`."""
        for listener in self._listeners:
            listener.before_save(self.session, step)

    def after_save(self, step: int) -> bool:
        """See `Training`."""
        return any([listener.after_save(self.session, step) for listener in self._listeners])
