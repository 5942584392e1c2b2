"""A hook that is interrupted, used by several threads, used again, or loses its session."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import tf_h5_callback as h5

tf = pytest.importorskip("tensorflow.compat.v1")

from tf_h5_callback.file import output  # noqa: E402
from tf_h5_callback.saving import checkpointer as checkpointer_module  # noqa: E402


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as g:
        yield g


@pytest.fixture(params=[True, False], ids=["background", "foreground"])
def background(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "run")


def model(initial=0.0, size=1 << 18, use_resource=False):
    """Returns the training operation: all elements of w grow with the step. 1 MB and more is copied
    by the snapshot's own operation."""
    step = tf.train.get_or_create_global_step()
    w = tf.get_variable(
        "w", [size], initializer=tf.constant_initializer(initial), use_resource=use_resource
    )
    with tf.control_dependencies([w.assign_add(tf.ones_like(w), read_value=False)]):
        return step.assign_add(1, read_value=False)


def steps(folder, initial=0.0):
    """The steps in a folder, each looked into."""
    found = []
    for step, path in h5.list_checkpoints(folder):
        with h5.Checkpoint(path) as checkpoint:
            values = np.unique(checkpoint["w:0"])
            assert values.tolist() == [initial + step], path
            assert checkpoint["global_step:0"] == step
        found.append(step)
    return found


def train(hook, runs, initial=0.0, **kwargs):
    """One training in a graph of its own; returns w as it began."""
    with tf.Graph().as_default():
        train_op = model(initial, **kwargs)
        (w,) = [v for v in tf.global_variables() if v.name == "w:0"]
        with tf.train.SingularMonitoredSession(hooks=[hook]) as session:
            began = session.raw_session().run(w)[0]
            for _ in range(runs):
                if session.should_stop():
                    break
                session.run(train_op)
    return began


# Interrupted


@pytest.fixture
def disk(monkeypatch):
    """A disk that takes its time: until ``go`` is set."""

    class Disk:
        go, asked = threading.Event(), threading.Event()

    real = output.write_all

    def write_all(*args):
        Disk.asked.set()
        assert Disk.go.wait(300)
        real(*args)

    Disk.go.set()
    monkeypatch.setattr(output, "write_all", write_all)
    yield Disk
    Disk.go.set()


@pytest.fixture
def ctrl_c_while_waiting(monkeypatch):
    """A real SIGINT, once, when the main thread waits for a save that is being written."""
    real, sent = checkpointer_module.Save.wait, []

    def wait(self):
        if self.owns_memory and sent == ["now"]:
            sent.append("sent")
            # The signal is handled in the middle of the wait: nothing is written until then.
            timer = threading.Timer(0, os.kill, [os.getpid(), signal.SIGINT])
            timer.start()
        real(self)

    monkeypatch.setattr(checkpointer_module.Save, "wait", wait)
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield sent
    signal.signal(signal.SIGINT, earlier)


def test_ctrl_c_while_training_waits_for_the_writer(folder, disk, ctrl_c_while_waiting):
    """Caught inside the ``with`` block, as people do: the end saves once more."""
    train_op = model()
    hook = h5.H5CheckpointHook(folder, save_steps=2)
    with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
        hook.wait_until_finished()
        disk.go.clear()
        ctrl_c_while_waiting.append("now")
        with pytest.raises(KeyboardInterrupt):
            for _ in range(10):
                session.run(train_op)
        disk.go.set()
    assert ctrl_c_while_waiting == ["now", "sent"]
    assert steps(folder) == [0, 2, 4]


def test_ctrl_c_while_the_end_waits(folder, disk, ctrl_c_while_waiting):
    train_op = model()
    hook = h5.H5CheckpointHook(folder, save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
            hook.wait_until_finished()
            disk.go.clear()
            for _ in range(3):
                session.run(train_op)
            ctrl_c_while_waiting.append("now")
    disk.go.set()
    hook.wait_until_finished()
    assert steps(folder) == [0, 2]
    assert train(hook, 2) == 2
    assert steps(folder) == [0, 2, 4]


def test_a_file_in_flight_is_completed_after_ctrl_c_in_a_wait_and_exit(tmp_path):
    """On Python 3.9 to 3.12 a join() that is interrupted makes Python forget the thread."""
    code = """
        import os, signal, sys, threading
        import tensorflow.compat.v1 as tf
        import tf_h5_callback as h5
        from tf_h5_callback.file import output
        from tf_h5_callback.saving import checkpointer
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main, real, waiting = threading.main_thread(), output.write_all, checkpointer.Save.wait
        def write_all(*args):
            main.join()  # returns when Python is ending
            real(*args)
        output.write_all = write_all
        def wait(self):
            if self.owns_memory:
                threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()
            waiting(self)
        checkpointer.Save.wait = wait
        with tf.Graph().as_default():
            step = tf.train.get_or_create_global_step()
            w = tf.get_variable("w", [1 << 18], initializer=tf.zeros_initializer())
            hook = h5.H5CheckpointHook(sys.argv[1], save_steps=2)
            with tf.train.MonitoredTrainingSession(hooks=[hook]):
                hook.wait_until_finished()
    """
    folder = str(tmp_path / "run")
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), folder],
        stderr=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    assert "KeyboardInterrupt" in process.stderr
    assert os.listdir(folder) == ["model.ckpt-0.h5"], process.stderr
    assert steps(folder) == [0]


# Threads


def test_several_threads_run_one_session(folder, background, use_resource):
    """Each file is of one moment; nobody dies; the last step is there."""
    train_op = model(use_resource=use_resource)
    hook = h5.H5CheckpointHook(folder, save_steps=3, max_to_keep=None, background=background)
    errors = []
    with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
        (w,) = [v for v in tf.global_variables() if v.name == "w:0"]

        def work():
            try:
                for _ in range(40):
                    session.run(train_op)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    found = h5.list_checkpoints(folder)
    assert len(found) >= 5
    for step, path in found:
        with h5.Checkpoint(path) as checkpoint:
            # Two threads may add to w at once, and one of them be lost; not to one element only.
            assert len(np.unique(checkpoint["w:0"])) == 1 or not use_resource, path
            assert checkpoint["global_step:0"] == step


def test_wait_until_finished_in_another_thread(folder):
    train_op = model()
    hook = h5.H5CheckpointHook(folder, save_steps=1, max_to_keep=None)
    over, errors = threading.Event(), []

    def wait():
        while not over.is_set():
            try:
                hook.wait_until_finished()
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=wait) for _ in range(3)]
    try:
        with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
            for thread in threads:
                thread.start()
            for _ in range(50):
                session.run(train_op)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert errors == [] and steps(folder) == list(range(51))


# Used again


def test_the_next_training_begins_with_its_own_initial_state(folder):
    hook = h5.H5CheckpointHook(folder, save_steps=5, restore=False)
    assert train(hook, 10) == 0
    assert train(hook, 10, initial=1000.0) == 1000
    assert steps(folder, 1000.0) == [0, 5, 10]


def test_the_next_training_begins_with_the_same_path(folder, tmp_path):
    path = str(tmp_path / "pretrained.h5")
    with tf.Graph().as_default():
        model(77.0)
        with tf.Session() as session:
            session.run(tf.global_variables_initializer())
            h5.save_variables(session, path)
    hook = h5.H5CheckpointHook(folder, save_steps=5, restore=path)
    assert [train(hook, 7), train(hook, 7)] == [77, 77]


def test_the_next_training_resumes_as_a_new_hook_would(folder):
    hook = h5.H5CheckpointHook(folder, save_steps=5)
    assert [train(hook, 7), train(hook, 7)] == [0, 7]
    assert steps(folder)[-1] == 14


def test_a_listeners_wish_to_stop_is_of_its_training(folder):
    class Stop(tf.train.CheckpointSaverListener):
        asked = False

        def after_save(self, session, step):
            earlier, self.asked = self.asked, self.asked or step >= 5
            return self.asked and not earlier

    hook = h5.H5CheckpointHook(folder, save_steps=5, listeners=[Stop()], background=False)
    assert train(hook, 20) == 0
    assert train(hook, 20) == 5
    assert steps(folder)[-1] == 25


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_that_was_emptied_or_removed_meanwhile(folder, restore, whole):
    import shutil

    hook = h5.H5CheckpointHook(folder, save_steps=5, restore=restore)
    assert train(hook, 7) == 0
    if whole:
        shutil.rmtree(folder)
    else:
        for name in os.listdir(folder):
            os.remove(os.path.join(folder, name))
    assert train(hook, 8) == 0
    assert steps(folder) == [0, 5, 8]


def test_a_training_that_died_while_a_file_was_written(folder, disk):
    """The next one, with the same hook, waits for that file and resumes from it."""
    hook = h5.H5CheckpointHook(folder, save_steps=5)
    with pytest.raises(ZeroDivisionError):
        with tf.Graph().as_default():
            train_op = model()
            with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
                hook.wait_until_finished()
                disk.asked.clear()
                disk.go.clear()
                for _ in range(5):
                    session.run(train_op)
                assert disk.asked.wait(300)
                raise ZeroDivisionError
    disk.go.set()
    assert train(hook, 2) == 5
    assert steps(folder) == [0, 5, 7]


# A lost session


class Lost(tf.train.SessionRunHook):
    """Loses the session after some runs; before that it does something."""

    def __init__(self, after, before=lambda: None):
        self.after, self.before, self.runs, self.began = after, before, 0, []

    def after_create_session(self, session, coord):
        (w,) = [v for v in tf.global_variables() if v.name == "w:0"]
        self.began.append(session.run(w)[0])

    def after_run(self, run_context, run_values):
        self.runs += 1
        if self.runs == self.after:
            self.before()
            raise tf.errors.AbortedError(None, None, "the connection is lost")


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_a_lost_session_whose_last_file_is_lost_too(
    folder, background, restore, how, damage, caplog
):
    def lose():
        hook.wait_until_finished()
        path = os.path.join(folder, "model.ckpt-6.h5")
        damage(path, "w:0") if how == "damaged" else os.remove(path)

    train_op, lost = model(), Lost(7, lose)
    hook = h5.H5CheckpointHook(folder, save_steps=3, restore=restore, background=background)
    with tf.train.MonitoredTrainingSession(hooks=[hook, lost]) as session:
        for _ in range(6):
            session.run(train_op)
        session.run(train_op)
    assert lost.began == [0, 3]
    assert "the session was lost, and so is " in caplog.text
    assert steps(folder) == [0, 3, 4]
    assert os.path.exists(os.path.join(folder, "model.ckpt-6.h5.damaged")) == (how == "damaged")


def test_a_lost_session_and_nothing_left(folder):
    def lose():
        hook.wait_until_finished()
        for name in os.listdir(folder):
            os.remove(os.path.join(folder, name))

    train_op, lost = model(), Lost(4, lose)
    hook = h5.H5CheckpointHook(folder, save_steps=3, restore=False)
    with pytest.raises(h5.CheckpointNotFoundError, match="the session was lost, and with it"):
        with tf.train.MonitoredTrainingSession(hooks=[hook, lost]) as session:
            for _ in range(6):
                session.run(train_op)


# Signals


@pytest.fixture
def handler():
    earlier = signal.getsignal(signal.SIGTERM)
    yield earlier
    signal.signal(signal.SIGTERM, earlier)


def test_a_signal_in_the_step_that_loses_the_session(folder, handler):
    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.getsignal(signal.SIGTERM)  # Python runs handlers between two of its instructions

    train_op, lost = model(), Lost(5, terminate)
    hook = h5.H5CheckpointHook(folder, save_steps=2, save_on_signal=signal.SIGTERM)
    with tf.train.MonitoredTrainingSession(hooks=[lost, hook]) as session:
        for _ in range(100):
            if session.should_stop():
                break
            session.run(train_op)
    assert lost.runs < 10
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_signal_between_a_lost_session_and_the_new_one(folder, handler):
    """That may take minutes, if a parameter server is away. The signal is not lost, nor deadly."""

    class Creator(tf.train.ChiefSessionCreator):
        made = 0

        def create_session(self):
            self.made += 1
            if self.made == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.getsignal(signal.SIGTERM)
            return super().create_session()

    train_op, lost = model(), Lost(5)
    hook = h5.H5CheckpointHook(folder, save_steps=2, save_on_signal=signal.SIGTERM)
    with tf.train.MonitoredSession(Creator(), hooks=[lost, hook]) as session:
        for _ in range(100):
            if session.should_stop():
                break
            session.run(train_op)
    assert lost.runs < 10
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_signal_in_the_middle_of_a_save_asks_for_another_one(folder):
    """Its snapshot is taken already: the next step is wanted."""

    def metadata(session, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
            signal.getsignal(signal.SIGUSR1)
        return {}

    hook = h5.H5CheckpointHook(
        folder, save_steps=5, max_to_keep=None, metadata=metadata, save_on_signal=signal.SIGUSR1
    )
    train(hook, 9)
    assert steps(folder) == [0, 5, 6, 9]


def test_where_training_does_not_begin_signals_are_as_before(folder, handler, damage):
    hook = h5.H5CheckpointHook(folder, save_steps=5, save_on_signal=signal.SIGTERM)
    train(hook, 2)
    for _, path in h5.list_checkpoints(folder):
        damage(path, "w:0")
    with pytest.raises(h5.CheckpointCorruptError):
        train(hook, 2)
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_run_that_died_does_not_kill_a_later_one(folder, handler):
    def run(dies):
        with tf.Graph().as_default():
            train_op = model()
            hook = h5.H5CheckpointHook(folder, save_steps=1000, save_on_signal=signal.SIGTERM)
            with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
                for n in range(100):
                    if session.should_stop():
                        break
                    session.run(train_op)
                    if dies and n == 3:
                        raise ValueError("NaN loss")
                    if n == 4:
                        os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(2):
        with pytest.raises(ValueError, match="NaN loss"):
            run(dies=True)
    run(dies=False)
    assert steps(folder)[-1] < 10
    assert signal.getsignal(signal.SIGTERM) == handler


def test_two_hooks_with_signals_both_save(tmp_path, handler):
    train_op = model()
    folders = [str(tmp_path / name) for name in "ab"]
    hooks = [
        h5.H5CheckpointHook(folder, save_steps=1000, save_on_signal=signal.SIGTERM)
        for folder in folders
    ]
    with tf.train.MonitoredTrainingSession(hooks=hooks) as session:
        for n in range(100):
            if session.should_stop():
                break
            session.run(train_op)
            if n == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    for folder in folders:
        assert steps(folder) == [0, 5]
    assert signal.getsignal(signal.SIGTERM) == handler
