"""The hook for graph mode: when a run saves, restores and waits.

The life of a session hook, as far as it concerns us:

``begin()``
    Once for a session, before the graph is finalised: the setters are made here.
``after_create_session()``
    After variables are initialised; again, without ``begin()``, whenever a recoverable session had
    to be made anew. Restores the newest checkpoint, or saves the initial state of a new run.
``before_run()``, ``after_run()``
    Around each step. The session in here is the raw one: what is run in it triggers no hook, and
    nothing else runs between two steps, so that a snapshot taken here is of one step.
``end()``
    At the normal end of training. **Not** called when training raises (except OutOfRangeError and
    StopIteration): the writer finishes its file all the same before the process exits.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any, Callable, Iterable, Mapping, Optional, Union

import tensorflow.compat.v1 as tf

from tf_h5_callback.file.format import Monitored, PathLike
from tf_h5_callback.file.writer import metadata_to_json
from tf_h5_callback.folder.directory import DEFAULT_BASENAME, CheckpointDir
from tf_h5_callback.folder.retention import Retention
from tf_h5_callback.graph._compat import TENSORS_ARE_SLOW_TO_FETCH
from tf_h5_callback.graph.saver_checkpoint import open_checkpoint
from tf_h5_callback.graph.state import GraphState, VarList, scalar_tensor
from tf_h5_callback.restoring.restore import Restore
from tf_h5_callback.saving.budget import OverheadBudget, SavingCost
from tf_h5_callback.saving.checkpointer import CheckpointSaver
from tf_h5_callback.saving.progress import Progress
from tf_h5_callback.saving.signals import SignalRequest
from tf_h5_callback.saving.timer import SaveTimer

_log = logging.getLogger("tf_h5_callback")

Metadata = Union[None, Mapping[str, Any], Callable[[Any, int], Mapping[str, Any]]]


class H5CheckpointHook(tf.train.SessionRunHook):
    """Saves HDF5 checkpoints while a session trains, and resumes from the newest one.

    The counterpart of ``tf.train.CheckpointSaverHook``. Start the same script again after a crash
    and it carries on by itself::

        hook = h5.H5CheckpointHook("/data/run1", save_steps=1000)
        with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
            while not session.should_stop():
                session.run(train_op)

    Training stops only while the state is copied in memory; a thread writes the file. A save while
    the one before is still being written waits for it. A new run saves its initial state before
    the first step, a resumed run does not save again what it restored, and the last step is saved
    at the end.

    Place it before hooks that look at the global step when the session is created
    (``tf.train.StopAtStepHook(num_steps=...)``), or pass it in ``chief_only_hooks``, which come
    first.

    Args:
      checkpoint_dir: the folder, created if missing.
      save_steps: save every so many global steps.
      save_secs: save every so many seconds.
      max_overhead: save as often as possible while that adds at most this fraction to the time of
        training (0.03: 3 %), as measured all the time. Of several triggers, whichever comes first
        counts, so that the others limit the distance; with none, an error.
      save_on_signal: a signal, or several: when it comes, save at the end of the running step.
        ``SIGUSR1`` and ``SIGUSR2`` let training go on, any other one (``SIGTERM``, which batch
        systems send before they kill) ends it cleanly. Handlers that were there before are called,
        too, and put back at the end. Works in the main thread only.
      var_list: what to save. None: what ``tf.train.Saver()`` would save, all global variables and
        all saveable objects (lookup tables, ...). Or a list of variables and saveable objects, a
        dict ``{name in file: variable}``, or a callable ``variable -> bool`` that chooses among
        the global variables. The global step is always saved.
      iterators: initializable ``tf.data`` iterators, whose position is saved and restored to the
        exact element.
      metadata: a dict, or a callable ``(session, global_step) -> dict`` called for each save;
        anything JSON can hold. Stored in the file.
      monitor: a scalar tensor, or its name. It is fetched with each step and stored with each
        checkpoint; the best checkpoint is kept besides the newest, also across restarts, and is
        found by `best_checkpoint`.
      mode: ``"min"`` if smaller values are better, ``"max"`` if larger ones are.
      max_to_keep: how many of the newest checkpoints are kept; None keeps all.
      keep_checkpoint_every_n_hours: besides, one of every so many hours is kept for good.
      checkpoint_basename: files are named ``<checkpoint_basename>-<global step>.h5``.
      restore: True: the newest intact checkpoint of ``checkpoint_dir``, if there is one; False:
        nothing; or the path of a checkpoint to begin with, whatever is in ``checkpoint_dir``: a
        file, a folder, or a prefix of ``tf.train.Saver``; or a `Restore`, for other names, parts,
        and conversions. (A session made anew after a lost connection always goes on from the newest
        checkpoint that this hook saved.)
      listeners: ``tf.train.CheckpointSaverListener`` instances. ``after_save`` is called in the
        training thread once the file is durable: with ``background=True`` that is at a later step
        or at the end, but always before the ``before_save`` of the next save.
      background: write in a thread, from a copy of the state, whose memory is kept until the end;
        False: in the training thread, 64 MB at a time (or one tensor, if it is larger), for state
        that does not fit into memory a second time; restored likewise.
      on_error: what to do when a save fails. ``"raise"``: raise at the next step; ``"warn"``: log
        a warning and go on, but raise at the end if the last save failed.
      progress: True shows a tqdm bar of global steps with the last checkpoint; or a tqdm bar of
        your own to be moved.

    Raises:
      ValueError: no trigger is given, or an argument is out of range.
    """

    def __init__(
        self,
        checkpoint_dir: PathLike,
        save_steps: Optional[int] = None,
        save_secs: Optional[float] = None,
        *,
        max_overhead: Optional[float] = None,
        save_on_signal: Union[None, int, Iterable[int]] = None,
        var_list: VarList = None,
        iterators: Iterable[Any] = (),
        metadata: Metadata = None,
        monitor: Any = None,
        mode: str = "min",
        max_to_keep: Optional[int] = 5,
        keep_checkpoint_every_n_hours: Optional[float] = None,
        checkpoint_basename: str = DEFAULT_BASENAME,
        restore: Union[bool, PathLike, Restore] = True,
        listeners: Optional[Iterable[Any]] = None,
        background: bool = True,
        on_error: str = "raise",
        progress: Any = False,
    ):
        budget = None if max_overhead is None else OverheadBudget(max_overhead)
        self._timer = SaveTimer(save_steps, save_secs, budget)
        if mode not in ("min", "max"):
            raise ValueError('mode is {!r}; it must be "min" or "max"'.format(mode))
        retention = Retention(max_to_keep, keep_checkpoint_every_n_hours, monitor is not None)
        self._dir = CheckpointDir(checkpoint_dir, checkpoint_basename, retention)
        self._var_list = var_list
        self._iterators = tuple(iterators)
        self._metadata = metadata
        self._monitor = monitor
        self._mode = mode
        self._restore = Restore.of(restore)
        self._listeners = list(listeners or ())
        self._background = background
        self._saver = CheckpointSaver(self._dir, background, on_error)
        self._cost = SavingCost(budget, lambda: self._saver.busy)
        self._signals = SignalRequest(save_on_signal, self._is_over)
        self._progress = Progress(progress)

        self._coord: Any = None
        self._state: Optional[GraphState] = None
        self._step_tensor: Any = None
        self._session: Any = None  # the one that _read_step is of
        self._read_step: Any = None
        self._monitor_tensor: Any = None
        self._run_args: Any = None
        self._monitored: Optional[Monitored] = None  # as fetched with the last run
        self._seen_step: Optional[int] = None  # as fetched with the last run
        self._increment = 1  # the largest seen
        self._stop_requested = False

    def begin(self) -> None:
        """Makes the setters.

        Raises:
          RuntimeError: the graph has no global step.
          ValueError: ``monitor`` is no scalar tensor of the graph.
        """
        self._step_tensor = tf.train.get_global_step()
        if self._step_tensor is None:
            raise RuntimeError(
                "H5CheckpointHook needs a global step: call tf.train.get_or_create_global_step() "
                "and pass it to the optimizer's minimize()"
            )
        if self._monitor is not None:
            self._monitor_tensor = scalar_tensor(self._monitor)
        # What TensorFlow looks up fastest: not a list of one; and the tensor, where it can.
        fetches = self._step_tensor
        if not TENSORS_ARE_SLOW_TO_FETCH:
            fetches = tf.get_default_graph().as_graph_element(fetches)
        if self._monitor_tensor is not None:
            fetches = [fetches, self._monitor_tensor]
        self._run_args = tf.train.SessionRunArgs(fetches)
        self._dir.open_for_writing()
        self._state = GraphState(self._var_list, self._iterators)
        self._state.add_copies()
        for listener in self._listeners:
            listener.begin()

    def after_create_session(self, session: Any, coord: Any) -> None:
        """Restores, or saves the initial state.

        Raises:
          CheckpointCorruptError: there are checkpoints, but none is intact.
          CheckpointMismatchError: the checkpoint does not fit the graph; nothing was assigned.
          RuntimeError: a later hook's ``begin()`` created what can no longer be restored; or this
            is not the main thread and ``save_on_signal`` is given.
        """
        assert self._state is not None
        self._coord = coord
        self._cost.session_began()
        self._monitored = None
        self._signals.install()
        self._collect(session)
        self._state.add_late_variables()
        restored = self._restore_into(session)
        step = self._current_step(session)
        self._seen_step = step
        self._progress.start(step)
        self._dir.warn_of_later_steps(step)
        if restored is not None and _same_file(restored, self._dir.path_for(step)):
            self._timer.update(step)
            self._saver.saved_step = step
            self._progress.saved(step)
        else:
            self._save(session, step)
            self._saver.report()

    def _restore_into(self, session: Any) -> Optional[str]:
        """Restores what is to be restored; returns the file, or None for a new run."""
        assert self._state is not None
        restore, path = self._restore, self._restore.path if self._restore else None
        if self._saver.saved_step is not None:
            # The session was lost and made anew: go on from what this run has saved, as it is.
            path = self._dir.path_for(self._saver.saved_step) if restore != Restore() else None
            restore = Restore(run_local_init=restore.run_local_init if restore else False)
        if restore is None:
            return None
        into_graph = functools.partial(
            self._state.restore, session, restore=restore, at_once=self._background
        )
        if path is None:
            newest = self._dir.read_newest_intact(into_graph, move_damaged=True)
            if newest is None:
                return None
            path, _ = newest
        else:
            with open_checkpoint(path) as checkpoint:
                path = checkpoint.path
                into_graph(checkpoint)
        _log.info("resumed from %s", path)
        return path

    def before_run(self, run_context: Any) -> Any:
        """Asks for the global step, and for what is monitored, along with the user's fetches."""
        return self._run_args

    def after_run(self, run_context: Any, run_values: Any) -> None:
        """Saves if a save is due.

        Raises:
          CheckpointError: an earlier save failed (with ``on_error="raise"``).
        """
        self._cost.step_ends()
        if self._saver.has_news:
            self._collect(run_context.session)
        results = run_values.results
        if self._monitor_tensor is None:
            self._after_step(run_context, results)
        else:
            self._after_step(run_context, *results)
        self._cost.step_begins()
        if self._stop_requested or self._signals.stop:
            run_context.request_stop()

    def _after_step(self, run_context: Any, fetched: Any, monitored: Any = None) -> None:
        # This may be the step before the run's own increment or after it. Read it again only where
        # a save is due after one more.
        fetched = int(fetched)
        if self._seen_step is not None:
            self._increment = max(self._increment, fetched - self._seen_step)
        self._seen_step = fetched
        self._progress.advance(fetched)
        if monitored is not None:
            self._monitored = Monitored(self._monitor_tensor.name, self._mode, float(monitored))
        if not (self._signals.save or self._timer.is_due(fetched + self._increment)):
            return
        session = run_context.session
        step = self._current_step(session)
        signalled = self._signals.take()
        if self._timer.is_due(step) or (signalled and step != self._timer.last_step):
            self._collect(session)
            self._save(session, step)
            self._saver.report()

    def _current_step(self, session: Any) -> int:
        if session is not self._session:  # a callable takes half the time of session.run()
            self._session, self._read_step = session, session.make_callable(self._step_tensor)
        return int(self._read_step())

    def end(self, session: Any) -> None:
        """Saves the last step unless it is saved already, and waits until it is durable.

        Raises:
          CheckpointError: the last save failed, or (with ``on_error="raise"``) one before it whose
            failure could not be raised at a step any more.
        """
        try:
            self._collect(session)
        finally:
            self._end(session)

    def _end(self, session: Any) -> None:
        assert self._state is not None
        step = self._current_step(session)
        self._progress.advance(step)
        if step != self._saver.saved_step:
            self._save(session, step)
            self._settle(session)
        for listener in self._listeners:
            listener.end(session, step)
        self._progress.close()
        self._session = self._read_step = None
        self._state.forget_session()
        _log.info("%s", self._cost)
        self._dir.close()
        self._signals.restore()
        self._saver.report(at_the_end=True)

    def _is_over(self) -> bool:
        """Whether the session is closed; `end` is not called if training raised."""
        return self._coord is not None and self._coord.joined

    def wait_until_finished(self) -> None:
        """Returns when nothing is being written. Listeners hear of the save at the next step.

        Raises:
          CheckpointError: the last save failed.
        """
        self._saver.wait()
        self._saver.report(at_the_end=True)

    def _save(self, session: Any, step: int) -> None:
        """Takes a snapshot of the session as it is now and hands it to the writer."""
        assert self._state is not None
        self._settle(session)
        for listener in self._listeners:
            listener.before_save(session, step)
        paid = self._cost.paid
        tensors: Mapping[str, Any]
        with self._cost.stalling():
            if self._background:
                tensors, (value,) = self._state.snapshot(session, self._step_tensor)
                step = int(value)
            else:
                tensors = self._state.lazy_snapshot(session)  # nothing else runs meanwhile
            metadata = self._metadata(session, step) if callable(self._metadata) else self._metadata
            # Now: the user may change it while we write.
            metadata_json = metadata_to_json(metadata)
        self._timer.update(step)
        stall = self._cost.stall if self._background else None
        with self._cost.stalling():
            self._saver.save(step, tensors, tf.VERSION, metadata_json, self._monitored, stall)
        del tensors  # or their memory would be held until the next step
        if not self._saver.busy:
            self._settle(session)
        self._cost.saved(paid)

    def _settle(self, session: Any) -> None:
        """Waits for the writer and tells the listeners."""
        with self._cost.stalling():
            self._saver.wait()
        step = self._saver.newly_durable()
        if step is not None:
            self._progress.saved(step)
            for listener in self._listeners:
                if listener.after_save(session, step):
                    self._stop_requested = True

    def _collect(self, session: Any) -> None:
        """Between two saves: as `_settle`, and a failure is raised unless it is only warned of."""
        self._settle(session)
        self._saver.report()


def _same_file(a: str, b: str) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)
