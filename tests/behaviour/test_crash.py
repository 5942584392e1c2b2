"""Training that ends badly: exceptions, SIGKILL. Real processes.

Nothing here hopes that one thing takes longer than another: a process stops where a test wants it,
says so, and waits until the test lets it go on.
"""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

import tf_h5_callback as h5
from tf_h5_callback.file.atomic import is_temporary

pytest.importorskip("tensorflow.compat.v1")

# Trains one variable that follows the global step. Once so many steps are trained, the writer stops
# in the middle of what it writes, or training stops between two steps.
SCRIPT = textwrap.dedent(
    """
    import select
    import sys
    import tensorflow.compat.v1 as tf
    import tf_h5_callback as h5
    from tf_h5_callback.file import output as block_output

    folder, how = sys.argv[1:3]
    writer_stops_at, training_stops_at = map(float, sys.argv[3:])
    trained = 0

    def say(what):
        sys.stdout.write(what + "\\n")
        sys.stdout.flush()

    def stop(where):
        say(where)
        select.select([sys.stdin], [], [])  # until the test closes it

    real = block_output.write_all
    def write_all(file, data, offset):
        half = len(data) // 2
        real(file, memoryview(data)[:half], offset)
        if trained >= writer_stops_at:
            stop("half written")
        real(file, memoryview(data)[half:], offset + half)
    block_output.write_all = write_all

    with tf.Graph().as_default():
        step = tf.train.get_or_create_global_step()
        w = tf.get_variable("w", [1000], initializer=tf.zeros_initializer())
        with tf.control_dependencies([w.assign_add(tf.ones([1000]))]):
            train_op = step.assign_add(1)
        hook = h5.H5CheckpointHook(folder, save_steps=10, max_to_keep=3)
        last = tf.train.StopAtStepHook(last_step=200)
        with tf.train.MonitoredTrainingSession(hooks=[hook, last]) as session:
            hook.wait_until_finished()  # what is half written later is no longer the initial state
            trained = session.run(step)
            say("started at {}".format(trained))
            try:
                while not session.should_stop():
                    trained = session.run(train_op)
                    if trained == training_stops_at:
                        stop("between two steps")
                    if trained == 11 and how != "train":
                        say("raising")
                        raise {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt,
                               "SystemExit": SystemExit}[how]("the user's own error")
            except KeyboardInterrupt:
                say("interrupted")
                raise
    """
)


class Process(subprocess.Popen):
    """Runs the script.

    Args:
      writer_stops_at, training_stops_at: steps; by default it does not stop.
    """

    def __init__(self, tmp_path, how, writer_stops_at=float("inf"), training_stops_at=float("inf")):
        path = tmp_path / "train.py"
        path.write_text(SCRIPT)
        arguments = [str(tmp_path / "run"), how, str(writer_stops_at), str(training_stops_at)]
        super().__init__(
            [sys.executable, str(path), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # It may be ignored here, as it is in what a shell runs in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        self.said = []
        self._watchdog = threading.Timer(300, self.kill)  # only if it hangs
        self._watchdog.start()

    def wait_until_it_says(self, *what):
        """Returns when it has said all of this, in whatever order."""
        while not set(what) <= set(self.said):
            line = self.stdout.readline()
            assert line, "it has said {} and ended: {}".format(self.said, self.stderr.read())
            self.said.append(line.rstrip("\n"))

    def go_on(self):
        """Lets it go on, and never stop again."""
        self.stdin.close()

    def end(self):
        """Lets it go on, waits for its end, and returns what it has written to stderr."""
        self.go_on()
        self.said += self.stdout.read().splitlines()
        err = self.stderr.read()
        self.wait()
        return err

    def __exit__(self, *exc_info):
        self.kill()
        self._watchdog.cancel()
        self._watchdog.join()
        super().__exit__(*exc_info)


def check_files(folder):
    """Returns the steps of its checkpoints, each of which is whole and right."""
    for step, path in h5.list_checkpoints(folder):
        with h5.load_checkpoint(path) as checkpoint:
            assert checkpoint.step == step
            assert (checkpoint["w:0"] == step).all()
            assert len(checkpoint.read_all()) == 2
    return [step for step, _ in h5.list_checkpoints(folder)]


def left_overs(folder):
    return [name for name in os.listdir(folder) if not name.endswith(".h5")]


@pytest.mark.parametrize("how", ["ValueError", "KeyboardInterrupt", "SystemExit"])
def test_training_that_raises_completes_the_write_in_flight_and_exits(tmp_path, how):
    folder = tmp_path / "run"
    with Process(tmp_path, how, writer_stops_at=10) as process:
        process.wait_until_it_says("half written", "raising")
        assert check_files(folder) == [0]
        err = process.end()
    assert process.returncode != 0
    assert "the user's own error" in err
    # The save of step 10 was in flight when step 11 raised.
    assert check_files(folder) == [0, 10]
    assert left_overs(folder) == []


def test_a_process_that_is_killed_again_and_again_gets_to_the_end(tmp_path):
    """Kills at odd moments; no file with a final name is ever damaged, nothing is lost twice."""
    folder = tmp_path / "run"

    def kill(newest, says, **stops):
        with Process(tmp_path, "train", **stops) as process:
            process.wait_until_it_says(says)
            process.send_signal(signal.SIGKILL)
            process.end()
        assert process.returncode == -signal.SIGKILL
        if newest is not None:
            assert "started at {}".format(newest) in process.said
        return max(check_files(folder), default=None)

    assert kill(None, "half written", writer_stops_at=0) is None  # before anything is saved
    assert kill(None, "half written", writer_stops_at=10) == 0
    assert any(is_temporary(name) for name in os.listdir(folder))
    assert kill(0, "half written", writer_stops_at=50) == 40
    # The writer is anywhere in the save of step 50, or has finished it.
    newest = kill(40, "between two steps", training_stops_at=51)
    assert newest in (40, 50)
    assert kill(newest, "between two steps", training_stops_at=89) in (70, 80)
    (*_, newest) = check_files(folder)
    with Process(tmp_path, "train") as process:
        err = process.end()
    assert process.returncode == 0, err
    assert "started at {}".format(newest) in process.said
    assert check_files(folder)[-1] == 200
    assert left_overs(folder) == []


def test_ctrl_c_in_the_middle_of_a_save(tmp_path):
    """SIGINT while a background write is in flight: it is completed, nothing is left broken."""
    folder = tmp_path / "run"
    # Not in the middle of session.run(), where TensorFlow 1.15 may make a SystemError of it.
    with Process(tmp_path, "train", writer_stops_at=10, training_stops_at=11) as process:
        process.wait_until_it_says("half written", "between two steps")
        assert any(is_temporary(name) for name in os.listdir(folder))
        process.send_signal(signal.SIGINT)
        process.wait_until_it_says("interrupted")
        assert check_files(folder) == [0]
        err = process.end()
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    assert check_files(folder) == [0, 10]
    assert left_overs(folder) == []


def test_two_processes_on_one_folder_by_mistake(tmp_path):
    """No damaged file, and the second to come names the first."""
    folder = tmp_path / "run"
    with Process(tmp_path, "train", writer_stops_at=10) as first:
        first.wait_until_it_says("half written")
        with Process(tmp_path, "train", writer_stops_at=50) as second:
            second.wait_until_it_says("started at 0", "half written")
            # Both are in the middle of a save. From here on they write side by side.
            first.go_on()
            errors = [second.end(), first.end()]
    assert first.returncode == second.returncode == 0, errors
    assert "is used for writing by another process: pid {} (".format(first.pid) in errors[0]
    assert "train.py" in errors[0]
    assert check_files(folder)[-1] == 200
