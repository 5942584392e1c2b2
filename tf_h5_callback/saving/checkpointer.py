"""One save at a time behind training: in which order, and who owns what meanwhile.

The life of a save, and who may do what in each state:

=============== ================================================ ===================================
state           the thread that trains                           the job (a thread of its own)
=============== ================================================ ===================================
idle            trains; may take a snapshot                      is not there
snapshot taken  has the arrays; may drop them and be idle again  is not there yet
writing         trains; waits before it takes the next snapshot  owns the arrays; writes the file
written         hears of it, tells the listeners                 has reported it, removes old files
failed          hears of it, raises or goes on                   has reported the error, and is over
=============== ================================================ ===================================

That no file is ever torn, and none lost, rests on this:

1. A snapshot's memory has one owner: the job, from the hand-over (one assignment) until the job has
   reported *written* or *failed*. `Save.owns_memory` tells, and whoever fills arrays asks it.
2. *Saved* is what the job reported after the rename and the sync of the folder. That no thread runs
   and no error is known is not success.
3. Who waits, waits for an event that the job sets, whatever happens to it (`Job`).
4. An exception at any line in the thread that trains leaves a state from which the next call is
   right: nothing is taken note of by two assignments that must go together.
5. What happens once the file is durable (retention, listeners, logs) changes nothing about that.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from threading import get_ident
from typing import Any, Callable, Deque, Mapping, Optional, Set

from tf_h5_callback.errors import CheckpointCorruptError, CheckpointError
from tf_h5_callback.file.format import Monitored
from tf_h5_callback.file.reader import Checkpoint
from tf_h5_callback.file.writer import metadata_to_json, write_checkpoint
from tf_h5_callback.folder.directory import CheckpointDir
from tf_h5_callback.job import Job
from tf_h5_callback.saving.budget import SavingCost
from tf_h5_callback.saving.progress import Progress
from tf_h5_callback.saving.save import Save, Training
from tf_h5_callback.saving.signals import SignalRequest
from tf_h5_callback.saving.timer import SaveTimer
from tf_h5_callback.saving.turn import Turn

_log = logging.getLogger("tf_h5_callback")

# What can go wrong with a save. Anything else is a mistake in a program, or tells of the session.
_FAILURES = (CheckpointError, OSError, MemoryError)


class Checkpointer:
    """Decides when to save one training, saves, and remembers how it went.

    A failed save is logged at once, by the thread that writes: if training dies first, nobody would
    hear of it otherwise. It is raised when training asks.

    Any thread may `wait`. The other calls are those of the thread that trains, or of several, which
    then take turns (`turn`).

    Args:
      directory: where, and what is kept.
      timer: when.
      cost: hears of what saving costs.
      signals: also when.
      progress: hears of steps and of saves.
      background: write in a thread; False: in `save` itself.
      on_error: ``"raise"`` or ``"warn"``: what `report` does about a failed save.

    Raises:
      ValueError: ``on_error`` is neither.

    Attributes:
      saved_step: the step of the last checkpoint that is durable, or None.
      turn: whose turn it is to save.
    """

    def __init__(
        self,
        directory: CheckpointDir,
        timer: SaveTimer,
        cost: SavingCost,
        signals: SignalRequest,
        progress: Progress,
        *,
        background: bool = True,
        on_error: str = "raise",
    ):
        if on_error not in ("raise", "warn"):
            raise ValueError('on_error is {!r}; it must be "raise" or "warn"'.format(on_error))
        self.directory, self.timer, self.cost = directory, timer, cost
        self.signals, self.progress = signals, progress
        self._background = background
        self._raises = on_error == "raise"
        self.turn = Turn()
        self._news = False
        self.saved_step: Optional[int] = None
        self._save = Save()  # the last one, or the one in flight
        self._own: Set[int] = set()  # steps that this training has saved and that were not deleted
        self._unannounced: Deque[int] = deque()
        self._failure: Optional[Exception] = None  # of the last save, until it was raised
        self._began_in = get_ident()
        self._stop_requested = False

    # When

    @property
    def busy(self) -> bool:
        """Whether a file is being written."""
        return self._save.owns_memory

    @property
    def has_news(self) -> bool:
        """Whether a save is over, old files deleted and all, of which `collect` can tell."""
        return self._news and not self.busy

    def is_due(self, step: int) -> bool:
        """Whether to save at this step."""
        return self.signals.save or self.timer.is_due(step)

    @property
    def wants_to_stop(self) -> bool:
        """Whether a listener or a signal wants training to end."""
        return self._stop_requested or self.signals.stop

    # Saving

    def begin_at(self, step: int, training: Training, restored: bool) -> None:
        """Training begins or goes on at this step.

        Args:
          step: where it begins.
          training: what is trained.
          restored: this step's checkpoint is in the folder already; otherwise it is saved.
        """
        self._began_in = get_ident()
        self.progress.start(step)
        self.directory.warn_of_later_steps(step)
        if restored:
            self.timer.update(step)
            self.saved_step = step
            self.progress.saved(step)
        else:
            self.save(step, training)

    def save_if_due(self, step: int, training: Training, monitored: Optional[Monitored]) -> None:
        """Saves if it is time to; see `save` for the arguments."""
        signalled = self.signals.take()  # before the snapshot: one that comes later wants another
        try:
            if self.timer.is_due(step) or (signalled and step != self.timer.last_step):
                self.save(step, training, monitored)
        except BaseException:
            self.signals.save = signalled or self.signals.save
            raise

    def save(self, step: int, training: Training, monitored: Optional[Monitored] = None) -> None:
        """Saves the state of a training between two steps.

        In this order: wait for the save before, tell of it, ``before_save``, the snapshot, the
        user's metadata, the hand-over to the job; with ``background=False`` the job is done here,
        and told of at once.

        Args:
          step: the global step; in the end that of the snapshot counts.
          training: what is trained.
          monitored: stored with it.

        Raises:
          CheckpointError: the save before has failed, or this one, as far as it is known.
        """
        self.collect(training)
        self._save_now(step, training, monitored)
        self.report()

    def _save_now(
        self, step: int, training: Training, monitored: Optional[Monitored] = None
    ) -> Save:
        training.before_save(step)
        paid = self.cost.paid
        save = Save()
        try:
            with self.cost.stalling():
                tensors, save.step = training.snapshot(save)
                metadata = _metadata_json(training, save.step)  # now: the user may change it later
        except _FAILURES as error:
            self.timer.update(step)
            self._failed(step, error)
            self.cost.saved(paid)
            return save
        stall = self.cost.stall if self._background else None
        with self.cost.stalling():
            self._hand_over(save, tensors, training.tensorflow_version, metadata, monitored, stall)
        del tensors  # or their memory would be held until the next step
        self.timer.update(save.step)
        if not save.owns_memory:
            self._tell(training)
        self.cost.saved(paid)
        return save

    def _hand_over(self, save: Save, *what: Any) -> None:
        self._save = save
        save.job = Job(functools.partial(self._write, save, *what))
        if self._background:
            save.job.start("tf_h5_callback-writer")
        else:
            save.wait()  # does it, or waits for another thread that waits, too, and was faster

    def _write(
        self,
        save: Save,
        tensors: Mapping[str, Any],
        tensorflow_version: Optional[str],
        metadata_json: str,
        monitored: Optional[Monitored],
        stall_seconds: Optional[float],
    ) -> None:
        """The job: writes, reports, and only then cleans up."""
        try:
            assert save.step is not None
            step, start = save.step, time.monotonic()
            path = self.directory.path_for(step)
            size = write_checkpoint(
                path,
                tensors,
                global_step=step,
                tensorflow_version=tensorflow_version,
                metadata=metadata_json,
                monitored=monitored,
                stall_seconds=stall_seconds,
            )
            self._own.add(step)
            self.saved_step, self._failure = step, None
            self._unannounced.append(step)
            self._news = True
            _log_saved(path, size, time.monotonic() - start, stall_seconds)
            self._own.difference_update(self.directory.remove_surplus(step))
        except Exception as error:
            self._failed(save.step, error)

    def _failed(self, step: Optional[int], error: Exception) -> None:
        """Takes note of an error that came before or after the file was durable."""
        if step == self.saved_step and isinstance(error, _FAILURES):
            _log.warning(
                "step %s is saved, but %s could not be tidied up after it: %s",
                step,
                self.directory.path,
                error,
            )
            return
        _log.error("step %s is not saved: %s", step, error)
        if isinstance(error, _FAILURES) and not isinstance(error, CheckpointError):
            what = str(error) or type(error).__name__
            failure = CheckpointError(
                "cannot save step {} in {}: {}".format(step, self.directory.path, what)
            )
            failure.__cause__ = error
            error = failure
        self._failure = error
        self._news = True

    # What became of it

    def wait(self) -> None:
        """Returns when nothing is being written. From any thread; raises no failure."""
        self._save.wait()

    def collect(self, training: Training) -> None:
        """Waits for the save in flight, tells the listeners, and raises its failure; see `report`.

        Raises:
          CheckpointError: the last save failed (with ``on_error="raise"``).
        """
        with self.cost.stalling():
            self.wait()
        self._tell(training)
        self.report()

    def _tell(self, training: Training) -> None:
        self._news = False
        job = self._save.job
        if job is not None and job.error is not None:  # it did not even get as far as to say so
            error, job.error = job.error, None
            self._failed(self._save.step, error)
        while self._unannounced:
            step = self._unannounced.popleft()
            self.progress.saved(step)
            if training.after_save(step):
                self._stop_requested = True

    def report(self) -> None:
        """Raises the failure of the last save, once, unless failures are only warned of.

        Raises:
          CheckpointError: the last save failed (with ``on_error="raise"``).
          Exception: something went wrong that is no failed save: always.
        """
        failure = self._failure
        if failure is not None and (self._raises or not isinstance(failure, CheckpointError)):
            self._failure = None
            raise failure

    def raise_failure(self) -> None:
        """Raises the failure of the last save in any case.

        Another thread than the one that trains does not take it away from that one.
        """
        failure = self._failure
        if failure is not None:
            if get_ident() == self._began_in:
                self._failure = None
            raise failure

    def finish(self, step: int, training: Training) -> Optional[CheckpointError]:
        """Training ends at this step: saves it, unless it is saved, and waits until it is durable.

        Returns:
          What has to be raised in the end: the last save failed, or one before it whose failure
          could not be raised at a step any more. None: the last step is on disk.
        """
        earlier: Optional[CheckpointError] = None
        try:
            self.collect(training)
        except CheckpointError as error:
            earlier = error
        self.progress.advance(step)
        if step == self.saved_step:
            return earlier
        save = self._save_now(step, training)
        save.wait()
        self._tell(training)
        failure, self._failure = self._failure, None
        if failure is None and self.saved_step != save.step:
            failure = CheckpointError("step {} is not saved: its save was given up".format(step))
        if failure is None or isinstance(failure, CheckpointError):
            return failure or earlier
        raise failure

    # Going on

    @property
    def has_saved(self) -> bool:
        """Whether this training has made a checkpoint that is not deleted."""
        return bool(self._own)

    def read_own_newest(self, read: Callable[[Checkpoint], object]) -> Optional[str]:
        """Reads the newest intact checkpoint that this training has saved.

        Args:
          read: see `CheckpointDir.read_newest_intact`.

        Returns:
          The file, or None if none of them is intact any more.
        """
        try:
            newest = self.directory.read_newest_intact(read, move_damaged=True, among=self._own)
        except CheckpointCorruptError as error:
            _log.warning("%s", error)
            newest = None
        last = self.directory.path_for(max(self._own))
        if newest is None or newest[0] != last:
            _log.warning(
                "the session was lost, and so is %s, which this run saved last; going on from %s",
                last,
                "what it began with" if newest is None else newest[0],
            )
        return None if newest is None else newest[0]

    def close(self) -> None:
        """Training has ended: the folder, the signals and the progress bar are given back."""
        self.progress.close()
        self.directory.close()
        self.signals.restore()
        _log.info("%s", self.cost)


def _metadata_json(training: Training, step: int) -> str:
    try:
        return metadata_to_json(training.metadata(step))
    except Exception as error:
        raise CheckpointError(
            "cannot save step {}: its metadata failed: {!r}".format(step, error)
        ) from error


def _log_saved(path: str, size: int, seconds: float, stall_seconds: Optional[float]) -> None:
    _log.info(
        "saved %s: %s bytes durable after %.3g s (%.2g GB/s), training waited %.3g s",
        path,
        format(size, ","),
        seconds,
        size / 1e9 / seconds if seconds else 0.0,
        seconds if stall_seconds is None else stall_seconds,
    )
