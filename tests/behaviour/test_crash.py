"""Training that ends badly: exceptions, SIGKILL. Real processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import tf_h5_callback as h5
from tf_h5_callback.file.atomic import is_temporary

pytest.importorskip("tensorflow.compat.v1")

# Trains one variable that follows the global step. Saves are slowed down by a file system that
# takes its time, so that there is always one in flight.
SCRIPT = textwrap.dedent(
    """
    import sys, time
    import tensorflow.compat.v1 as tf
    import tf_h5_callback as h5
    from tf_h5_callback.file import output as block_output

    folder, how, slow = sys.argv[1], sys.argv[2], float(sys.argv[3])
    real = block_output.write_all
    def write_all(file, data, offset):
        half = len(data) // 2
        real(file, memoryview(data)[:half], offset)
        time.sleep(slow)
        real(file, memoryview(data)[half:], offset + half)
    block_output.write_all = write_all

    with tf.Graph().as_default():
        step = tf.train.get_or_create_global_step()
        w = tf.get_variable("w", [1000], initializer=tf.zeros_initializer())
        with tf.control_dependencies([w.assign_add(tf.ones([1000]))]):
            train_op = step.assign_add(1)
        hook = h5.H5CheckpointHook(folder, save_steps=10, max_to_keep=3)
        stop = tf.train.StopAtStepHook(last_step=200)
        with tf.train.MonitoredTrainingSession(hooks=[hook, stop]) as session:
            print("started at", session.run(step), flush=True)
            while not session.should_stop():
                n = session.run(train_op)
                time.sleep(0.002)
                if n == 11 and how != "train":
                    print("raising", flush=True)
                    raise {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt,
                           "SystemExit": SystemExit}[how]("the user's own error")
    """
)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)

    def start(how, slow=0.0):
        return subprocess.Popen(
            [sys.executable, str(path), str(tmp_path / "run"), how, str(slow)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
            # It may be ignored here, as it is in what a shell runs in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    return start


@pytest.mark.parametrize("how", ["ValueError", "KeyboardInterrupt", "SystemExit"])
def test_training_that_raises_completes_the_write_in_flight_and_exits(script, tmp_path, how):
    process = script(how, slow=0.5)
    out, err = process.communicate(timeout=120)
    assert "raising" in out
    assert process.returncode != 0
    assert "the user's own error" in err
    # The save of step 10 had just begun when step 11 raised.
    assert [step for step, _ in h5.list_checkpoints(tmp_path / "run")] == [0, 10]
    with h5.load_checkpoint(tmp_path / "run") as checkpoint:
        assert checkpoint.step == 10
        assert (checkpoint["w:0"] == 10).all()
    assert all(name.endswith(".h5") for name in os.listdir(tmp_path / "run"))


def test_a_process_that_is_killed_again_and_again_gets_to_the_end(script, tmp_path):
    """Kills at odd moments; no file with a final name is ever damaged, nothing is lost twice."""
    folder, last, kills = tmp_path / "run", -1, 0
    for delay in (0.01, 0.05, 0.1, 0.16, 0.23):
        process = script("train", slow=0.005)
        assert "started at" in process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
        for step, path in h5.list_checkpoints(folder):
            with h5.load_checkpoint(path) as checkpoint:
                assert checkpoint.step == step
                assert (checkpoint["w:0"] == step).all()
                assert len(checkpoint.read_all()) == 2
        newest = max([step for step, _ in h5.list_checkpoints(folder)] + [-1])
        assert newest >= last
        last = newest
    assert kills == 5
    process = script("train")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "started at {}".format(last) in out or last <= 0
    assert h5.list_checkpoints(folder)[-1][0] == 200
    assert (h5.load_variable(folder, "w:0") == 200).all()


def test_ctrl_c_in_the_middle_of_a_save(script, tmp_path):
    """SIGINT while a background write is in flight: it is completed, nothing is left broken."""
    folder = tmp_path / "run"
    process = script("train", slow=0.3)
    assert "started at" in process.stdout.readline()
    deadline = time.monotonic() + 60
    while not any(is_temporary(name) for name in os.listdir(folder)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    assert all(name.endswith(".h5") for name in os.listdir(folder))
    for step, path in h5.list_checkpoints(folder):
        with h5.load_checkpoint(path) as checkpoint:
            assert (checkpoint["w:0"] == step).all()


def test_two_processes_on_one_folder_by_mistake(script, tmp_path):
    """No damaged file, and the second to come names the first."""
    folder = tmp_path / "run"
    first = script("train", slow=0.2)  # takes longer than the second needs to start
    assert "started at" in first.stdout.readline()
    second = script("train", slow=0.005)
    errors = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert first.returncode == second.returncode == 0, errors
    assert "is used for writing by another process: pid {} (".format(first.pid) in errors[1]
    assert "train.py" in errors[1]
    for step, path in h5.list_checkpoints(folder):
        with h5.load_checkpoint(path) as checkpoint:
            assert (checkpoint["w:0"] == step).all()
    assert h5.list_checkpoints(folder)[-1][0] == 200
