"""One save, and what is saved: how a checkpointer and a framework meet."""

from __future__ import annotations

from typing import Any, Mapping, Optional, Tuple

from tf_h5_callback.job import Job


class Save:
    """One save, from the moment before its snapshot is taken.

    Attributes:
      job: the writing; None before the hand-over, which is the assignment of this attribute.
      step: the global step of the snapshot.
    """

    def __init__(self) -> None:
        self.job: Optional[Job] = None
        self.step: Optional[int] = None

    @property
    def owns_memory(self) -> bool:
        """Whether the arrays of the snapshot are being written: nobody may change them."""
        job = self.job
        return job is not None and not job.over

    def wait(self) -> None:
        """Returns when nothing of it is being written; interrupted, it changes nothing."""
        job = self.job
        if job is not None:
            job.wait()


class Training:
    """What is trained, as far as a checkpointer needs it. A hook or callback makes one of it."""

    tensorflow_version: Optional[str] = None

    def snapshot(self, owner: Save) -> Tuple[Mapping[str, Any], int]:
        """Copies the state, all of one moment: ``{name: ndarray}``, and its global step.

        Args:
          owner: owns the arrays from its hand-over on.
        """
        raise NotImplementedError

    def metadata(self, step: int) -> Optional[Mapping[str, Any]]:
        """What the user wants to be stored with this step."""

    def before_save(self, step: int) -> None:
        """A snapshot is about to be taken."""

    def after_save(self, step: int) -> bool:
        """The checkpoint of this step is durable. True ends training."""
        return False
