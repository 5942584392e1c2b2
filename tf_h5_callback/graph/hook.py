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
import weakref
from typing import Any, Callable, Iterable, Optional, Union

import tensorflow.compat.v1 as tf

from tf_h5_callback.errors import CheckpointNotFoundError
from tf_h5_callback.file.format import Monitored, PathLike
from tf_h5_callback.file.writer import metadata_to_json
from tf_h5_callback.folder.directory import DEFAULT_BASENAME, CheckpointDir
from tf_h5_callback.folder.retention import Retention
from tf_h5_callback.graph._compat import TENSORS_ARE_SLOW_TO_FETCH, is_recovering
from tf_h5_callback.graph.gate import RunGate
from tf_h5_callback.graph.saver_checkpoint import open_checkpoint
from tf_h5_callback.graph.session import Metadata, SessionTraining
from tf_h5_callback.graph.state import GraphState, VarList, scalar_tensor
from tf_h5_callback.graph.steps import StepWatch
from tf_h5_callback.restoring.restore import Restore
from tf_h5_callback.saving.budget import OverheadBudget, SavingCost
from tf_h5_callback.saving.checkpointer import Checkpointer
from tf_h5_callback.saving.progress import Progress
from tf_h5_callback.saving.signals import SignalRequest
from tf_h5_callback.saving.timer import SaveTimer

_log = logging.getLogger("tf_h5_callback")


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
    at the end. Ctrl-C may come at any moment: no file is torn, and one that is being written is
    completed before the process exits.

    Several threads may run the session: each checkpoint is taken while none of their runs goes on.
    Used for another training, in a notebook say, a hook begins anew, as a new one would.

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
        checkpoint that this training has saved, or from the one before it if that is damaged.)
      listeners: ``tf.train.CheckpointSaverListener`` instances. ``after_save`` is called in the
        training thread once the file is durable: with ``background=True`` that is at a later step
        or at the end, but always before the ``before_save`` of the next save.
      background: write in a thread, from a copy of the state, whose memory is kept until the end;
        False: in the training thread, 64 MB at a time (or one tensor, if it is larger), for state
        that does not fit into memory a second time; restored likewise.
      on_error: what to do when a save fails, whatever the reason (the disk, no memory, ``metadata``
        raises). ``"raise"``: raise CheckpointError at the next step; ``"warn"``: log it and go on,
        but raise at the end if the last save failed. What fails once a file is durable, the
        deletion of an old one for instance, is only ever a warning.
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
        self._progress = Progress(progress)

        def new_checkpointer() -> Checkpointer:
            budget = None if max_overhead is None else OverheadBudget(max_overhead)
            return Checkpointer(
                self._dir,
                SaveTimer(save_steps, save_secs, budget),
                SavingCost(budget, lambda: self._checkpointer.busy),
                SignalRequest(save_on_signal, self._is_over),
                self._progress,
                background=background,
                on_error=on_error,
            )

        self._new_checkpointer: Callable[[], Checkpointer] = new_checkpointer
        self._checkpointer = new_checkpointer()

        self._coord: Any = None  # a weak reference: it lives as long as the session
        self._state: Any = None  # GraphState
        self._step_tensor: Any = None
        self._monitor_tensor: Any = None
        self._run_args: Any = None
        self._training: Any = None  # SessionTraining
        self._gate = RunGate()
        self._steps = StepWatch()
        self._monitored: Optional[Monitored] = None  # as fetched with the last run

    def begin(self) -> None:
        """A training begins: makes the setters, and forgets the training before.

        Raises:
          RuntimeError: the graph has no global step.
          ValueError: ``monitor`` is no scalar tensor of the graph.
          TypeError: ``metadata`` is a dict that JSON cannot hold.
        """
        self._checkpointer.wait()  # the one before may have died while a file was written
        self._checkpointer = self._new_checkpointer()
        self._coord = self._training = None
        self._gate, self._steps = RunGate(), StepWatch()
        if not callable(self._metadata):
            metadata_to_json(self._metadata)
        self._step_tensor = tf.train.get_global_step()
        if self._step_tensor is None:
            raise RuntimeError(
                "H5CheckpointHook needs a global step: call tf.train.get_or_create_global_step() "
                "and pass it to the optimizer's minimize()"
            )
        self._monitored = self._monitor_tensor = None
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
          CheckpointError: what this run has saved before the session was lost is gone.
          RuntimeError: a later hook's ``begin()`` created what can no longer be restored; or this
            is not the main thread and ``save_on_signal`` is given.
        """
        self._coord = None if coord is None else weakref.ref(coord)
        checkpointer, training = self._checkpointer, self._train_in(session)
        self._monitored = None
        checkpointer.cost.session_began()
        checkpointer.collect(training)
        self._state.add_late_variables()
        restored = self._restore_into(session)
        step = training.current_step()
        self._steps.begin(step)
        checkpointer.begin_at(
            step, training, restored is not None and _same_file(restored, self._dir.path_for(step))
        )
        checkpointer.signals.install()  # now there is something that can act upon them

    def _train_in(self, session: Any) -> SessionTraining:
        training = self._training
        if training is None or training.session is not session:
            self._training = training = SessionTraining(
                session,
                self._state,
                self._step_tensor,
                self._gate,
                self._listeners,
                self._metadata,
                self._background,
            )
        return training

    def _restore_into(self, session: Any) -> Optional[str]:
        """Restores what is to be restored; returns the file, or None for a new run."""
        restore = self._restore

        def into_graph(checkpoint: Any, what: Restore) -> None:
            self._state.restore(session, checkpoint, restore=what, at_once=self._background)

        path = None
        if self._checkpointer.has_saved:
            # The session was lost and made anew: go on from what this run has saved, as it is.
            what = Restore(run_local_init=restore.run_local_init if restore else False)
            path = self._checkpointer.read_own_newest(functools.partial(into_graph, what=what))
        if path is None and restore is not None:
            path = self._begin_with(restore, functools.partial(into_graph, what=restore))
        if path is not None:
            _log.info("resumed from %s", path)
        elif self._checkpointer.has_saved:
            raise CheckpointNotFoundError(
                "the session was lost, and with it the training: no checkpoint that this run saved "
                "in {} can be read any more".format(self._dir.path)
            )
        return path

    def _begin_with(self, restore: Restore, read: Callable[[Any], object]) -> Optional[str]:
        if restore.path is None:
            newest = self._dir.read_newest_intact(read, move_damaged=True)
            return None if newest is None else newest[0]
        with open_checkpoint(restore.path) as checkpoint:
            read(checkpoint)
            return checkpoint.path

    def before_run(self, run_context: Any) -> Any:
        """Asks for the global step, and for what is monitored, along with the user's fetches."""
        self._gate.enter()
        return self._run_args

    def after_run(self, run_context: Any, run_values: Any) -> None:
        """Saves if a save is due.

        Raises:
          CheckpointError: an earlier save failed (with ``on_error="raise"``).
        """
        self._gate.leave()
        checkpointer = self._checkpointer
        checkpointer.cost.step_ends()
        fetched = run_values.results
        if self._monitor_tensor is not None:
            fetched, value = fetched
            self._monitored = Monitored(self._monitor_tensor.name, self._mode, float(value))
        step = int(fetched)
        may_be = self._steps.fetched(step)
        checkpointer.progress.advance(step)
        if checkpointer.has_news or checkpointer.is_due(may_be):
            checkpointer.turn.do(lambda: self._look_again(run_context.session))
        checkpointer.cost.step_begins()
        if checkpointer.wants_to_stop:
            run_context.request_stop()

    def _look_again(self, session: Any) -> None:
        checkpointer, training = self._checkpointer, self._train_in(session)
        if checkpointer.has_news:
            checkpointer.collect(training)
        if checkpointer.is_due(self._steps.possible):
            save = functools.partial(
                checkpointer.save_if_due, training.current_step(), training, self._monitored
            )
            save() if self._background else self._gate.alone(save)

    def end(self, session: Any) -> None:
        """Saves the last step unless it is saved already, and waits until it is durable.

        Raises:
          CheckpointError: the last save failed, or (with ``on_error="raise"``) one before it whose
            failure could not be raised at a step any more.
        """
        self._checkpointer.turn.do(lambda: self._end(session), wait=True)

    def _end(self, session: Any) -> None:
        checkpointer, training = self._checkpointer, self._train_in(session)
        step = training.current_step()
        finish = functools.partial(checkpointer.finish, step, training)
        failure = finish() if self._background else self._gate.alone(finish)
        for listener in self._listeners:
            listener.end(session, step)
        self._training = None
        self._state.forget_session()
        checkpointer.close()
        if failure is not None:
            raise failure

    def _is_over(self) -> bool:
        """Whether the session is closed for good; `end` is not called if training raised."""
        if self._coord is None:
            return False
        coord = self._coord()
        return (coord is None or coord.joined) and not is_recovering()

    def wait_until_finished(self) -> None:
        """Returns when nothing is being written. Listeners hear of the save at the next step.

        May be called from any thread.

        Raises:
          CheckpointError: the last save failed.
        """
        checkpointer = self._checkpointer
        checkpointer.wait()
        checkpointer.raise_failure()


def _same_file(a: str, b: str) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)
