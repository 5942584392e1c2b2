"""A training below any framework, with real files."""

import os
import threading

import numpy as np
import pytest

import tf_h5_callback as h5
from tf_h5_callback.file import output
from tf_h5_callback.folder.directory import CheckpointDir, read_verified
from tf_h5_callback.folder.retention import Retention
from tf_h5_callback.saving import checkpointer as module
from tf_h5_callback.saving.budget import SavingCost
from tf_h5_callback.saving.checkpointer import Checkpointer
from tf_h5_callback.saving.progress import Progress
from tf_h5_callback.saving.save import Save, Training
from tf_h5_callback.saving.signals import SignalRequest
from tf_h5_callback.saving.timer import SaveTimer


class Counting(Training):
    """An array all of whose elements are the step, and one piece of memory for all snapshots."""

    tensorflow_version = "none"

    def __init__(self, stop_at=None):
        self.step, self.memory, self.owner = 0, np.zeros(1000), None
        self.calls, self.stop_at, self.told = [], stop_at, {"lr": 0.1}

    def snapshot(self, owner):
        assert self.owner is None or not self.owner.owns_memory
        self.owner = owner
        self.memory[:] = self.step
        return {"w:0": self.memory, "global_step:0": np.array(self.step)}, self.step

    def metadata(self, step):
        if isinstance(self.told, Exception):
            raise self.told
        return self.told

    def before_save(self, step):
        self.calls.append(("before", step))

    def after_save(self, step):
        self.calls.append(("after", step))
        return step == self.stop_at


@pytest.fixture
def training():
    return Counting()


@pytest.fixture(params=[True, False], ids=["background", "foreground"])
def background(request):
    return request.param


def make(folder, on_error="raise", background=True, save_steps=2, max_to_keep=None):
    directory = CheckpointDir(str(folder), retention=Retention(max_to_keep))
    directory.open_for_writing()
    return Checkpointer(
        directory,
        SaveTimer(save_steps),
        SavingCost(),
        SignalRequest(None),
        Progress(),
        background=background,
        on_error=on_error,
    )


def run(checkpointer, training, steps):
    for _ in range(steps):
        training.step += 1
        if checkpointer.has_news:
            checkpointer.collect(training)
        checkpointer.save_if_due(training.step, training, None)


def steps(folder):
    found = []
    for step, path in h5.list_checkpoints(folder):
        with h5.Checkpoint(path) as checkpoint:
            assert checkpoint.step == step == checkpoint["global_step:0"]
            assert (checkpoint["w:0"] == step).all()
        found.append(step)
    return found


@pytest.fixture
def disk(monkeypatch):
    """A disk that takes nothing until ``go`` is set; ``error`` is what it answers then."""

    class Disk:
        go, error, asked = threading.Event(), None, threading.Event()

    real = output.write_all

    def write_all(*args):
        Disk.asked.set()
        assert Disk.go.wait(300)
        if Disk.error is not None:
            raise Disk.error
        real(*args)

    monkeypatch.setattr(output, "write_all", write_all)
    return Disk


def test_a_training_from_its_first_step_to_its_last(tmp_path, training, background):
    checkpointer = make(tmp_path, background=background)
    checkpointer.begin_at(0, training, restored=False)
    run(checkpointer, training, 5)
    assert checkpointer.finish(5, training) is None
    checkpointer.close()
    assert steps(tmp_path) == [0, 2, 4, 5]
    expected = [(when, step) for step in (0, 2, 4, 5) for when in ("before", "after")]
    assert training.calls == expected
    with h5.load_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.metadata == {"lr": 0.1}


def test_what_was_restored_is_not_saved_again(tmp_path, training):
    checkpointer = make(tmp_path)
    training.step = 7
    checkpointer.begin_at(7, training, restored=True)
    assert checkpointer.finish(7, training) is None
    assert training.calls == [] and steps(tmp_path) == []


def test_the_arrays_are_the_jobs_until_it_has_reported(tmp_path, training, disk):
    checkpointer = make(tmp_path)
    checkpointer.save(0, training)
    assert disk.asked.wait(300)
    owner = training.owner
    assert owner.owns_memory and checkpointer.busy
    training.step = 1
    with pytest.raises(AssertionError):
        training.snapshot(Save())
    disk.go.set()
    checkpointer.wait()
    assert not owner.owns_memory and checkpointer.saved_step == 0


def test_any_number_of_threads_may_wait_while_training_saves(tmp_path, training):
    checkpointer = make(tmp_path, save_steps=1)
    over = threading.Event()

    def wait():
        while not over.is_set():
            checkpointer.wait()

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        run(checkpointer, training, 100)
        assert checkpointer.finish(100, training) is None
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert steps(tmp_path) == list(range(1, 101))


def test_in_the_foreground_training_waits_for_another_thread_that_was_faster(
    tmp_path, training, disk, monkeypatch
):
    """Who waits does the job of a save whose thread was not seen to start."""
    checkpointer = make(tmp_path, background=False)
    real = module.Save.wait

    def wait(self):
        if threading.current_thread() is threading.main_thread() and self.job is not None:
            other = threading.Thread(target=real, args=(self,))
            other.start()
            assert disk.asked.wait(300)  # the other thread has it
            disk.go.set()
        real(self)

    monkeypatch.setattr(module.Save, "wait", wait)
    checkpointer.save(0, training)
    assert checkpointer.saved_step == 0 and steps(tmp_path) == [0]


@pytest.mark.parametrize("where", [Counting.snapshot, Training.before_save, "job", "start"])
def test_an_interrupted_save_leaves_nothing_behind(tmp_path, training, monkeypatch, where):
    checkpointer = make(tmp_path)
    checkpointer.begin_at(0, training, restored=False)
    real = module.Job

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    if where == "job":
        monkeypatch.setattr(module, "Job", interrupt)
    elif where == "start":
        monkeypatch.setattr(real, "start", interrupt)
    else:
        monkeypatch.setattr(training, where.__name__, interrupt, raising=True)
    with pytest.raises(KeyboardInterrupt):
        run(checkpointer, training, 2)
    monkeypatch.undo()
    assert checkpointer.finish(2, training) is None
    assert steps(tmp_path) == [0, 2]


# Failures


def test_a_failed_save_is_raised_once(tmp_path, training, disk):
    checkpointer = make(tmp_path)
    disk.error = OSError(28, "No space left on device")
    disk.go.set()
    checkpointer.save(0, training)
    with pytest.raises(h5.CheckpointError, match="model.ckpt-0.h5.*No space left"):
        checkpointer.collect(training)
    checkpointer.collect(training)
    assert checkpointer.saved_step is None and training.calls == [("before", 0)]


def test_another_thread_that_waits_does_not_take_the_failure_away(tmp_path, training, disk):
    checkpointer = make(tmp_path)
    disk.error = OSError(28, "No space left on device")
    disk.go.set()
    checkpointer.begin_at(0, training, restored=False)
    told = []

    def wait():
        checkpointer.wait()
        try:
            checkpointer.raise_failure()
        except h5.CheckpointError as error:
            told.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    with pytest.raises(h5.CheckpointError):
        checkpointer.collect(training)
    assert len(told) == 1


def no_memory(*args, **kwargs):
    raise MemoryError("Unable to allocate 25 MB")


def break_snapshot(training, monkeypatch):
    monkeypatch.setattr(training, "snapshot", no_memory)
    return MemoryError


def break_memory_of_the_writer(training, monkeypatch):
    monkeypatch.setattr(module, "write_checkpoint", no_memory)
    return MemoryError


def break_metadata(training, monkeypatch):
    monkeypatch.setattr(training, "told", KeyError("lr"))
    return KeyError


def break_json(training, monkeypatch):
    monkeypatch.setattr(training, "told", {"lr": {1, 2}})
    return TypeError


def break_the_disk(training, monkeypatch):
    def write_all(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(output, "write_all", write_all)
    return OSError


BREAKS = [break_snapshot, break_memory_of_the_writer, break_metadata, break_json, break_the_disk]


@pytest.mark.parametrize("break_it", BREAKS)
def test_warn_covers_everything_that_can_fail(
    tmp_path, training, background, monkeypatch, caplog, break_it
):
    checkpointer = make(tmp_path, on_error="warn", background=background)
    checkpointer.begin_at(0, training, restored=False)
    checkpointer.wait()
    break_it(training, monkeypatch)
    run(checkpointer, training, 3)
    checkpointer.wait()
    monkeypatch.undo()
    run(checkpointer, training, 2)
    assert checkpointer.finish(5, training) is None
    assert steps(tmp_path) == [0, 4, 5]
    messages = [r.getMessage() for r in caplog.records if "is not saved" in r.getMessage()]
    assert len(messages) == 1 and messages[0].startswith("step 2 is not saved: ")


@pytest.mark.parametrize("break_it", BREAKS)
def test_raise_raises_one_error_with_the_cause(
    tmp_path, training, background, monkeypatch, break_it
):
    checkpointer = make(tmp_path, background=background)
    checkpointer.begin_at(0, training, restored=False)
    checkpointer.wait()
    cause = break_it(training, monkeypatch)
    with pytest.raises(h5.CheckpointError) as error:
        run(checkpointer, training, 4)
    chain = [error.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    assert isinstance(chain[-1], cause)
    monkeypatch.undo()
    assert checkpointer.finish(training.step, training) is None
    assert steps(tmp_path) == [0, training.step]


def test_where_no_thread_can_be_started_it_is_written_all_the_same(
    tmp_path, training, monkeypatch, caplog
):
    def start(self):
        raise RuntimeError("can't start new thread")

    checkpointer = make(tmp_path)
    monkeypatch.setattr(threading.Thread, "start", start)
    run(checkpointer, training, 2)
    assert steps(tmp_path) == [1] and caplog.records == []


@pytest.mark.parametrize("broken", ["list", "remove"])
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_what_fails_after_the_file_is_durable_is_a_warning_of_its_own(
    tmp_path, training, background, monkeypatch, caplog, broken, on_error
):
    checkpointer = make(tmp_path, on_error, background, save_steps=1, max_to_keep=1)
    run(checkpointer, training, 1)
    checkpointer.wait()

    def fails(*args):
        raise OSError(116, "Stale file handle")

    if broken == "list":
        monkeypatch.setattr(checkpointer.directory, "list", fails)
    else:
        monkeypatch.setattr(os, "remove", fails)
    run(checkpointer, training, 1)
    checkpointer.collect(training)
    monkeypatch.undo()
    assert checkpointer.saved_step == 2 and ("after", 2) in training.calls
    assert "is not saved" not in caplog.text and "Stale file handle" in caplog.text
    run(checkpointer, training, 1)
    assert checkpointer.finish(3, training) is None
    assert steps(tmp_path) == [3]


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_mistake_in_retention_is_raised_but_the_file_counts(
    tmp_path, training, monkeypatch, on_error
):
    checkpointer = make(tmp_path, on_error)
    monkeypatch.setattr(checkpointer.directory, "remove_surplus", lambda step: 1 / 0)
    checkpointer.save(0, training)
    with pytest.raises(ZeroDivisionError):
        checkpointer.collect(training)
    assert checkpointer.saved_step == 0 and ("after", 0) in training.calls


# Going on after a loss


@pytest.fixture
def own(tmp_path, training):
    """A training that has saved 0, 2 and 4 in a folder where another one had saved 1 and 5."""
    other = Counting()
    other.step = 1
    checkpointer = make(tmp_path)
    checkpointer.save(1, other)
    other.step = 5
    checkpointer.save(5, other)
    checkpointer.wait()
    checkpointer = make(tmp_path)
    checkpointer.begin_at(0, training, restored=False)
    run(checkpointer, training, 4)
    checkpointer.wait()
    return checkpointer


def test_it_goes_on_from_what_it_has_saved_itself(own, caplog):
    caplog.clear()
    assert own.read_own_newest(read_verified).endswith("model.ckpt-4.h5")
    assert caplog.records == []


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_and_from_the_one_before_if_that_is(own, tmp_path, damage, caplog, how):
    last = str(tmp_path / "model.ckpt-4.h5")
    damage(last, "w:0") if how == "damaged" else os.remove(last)
    assert own.read_own_newest(read_verified).endswith("model.ckpt-2.h5")
    assert "the session was lost, and so is {}".format(last) in caplog.text


def test_and_if_none_is_left_it_says_so(own, tmp_path, damage):
    os.remove(str(tmp_path / "model.ckpt-4.h5"))
    damage(str(tmp_path / "model.ckpt-2.h5"), "w:0")
    damage(str(tmp_path / "model.ckpt-0.h5"), "w:0")
    assert own.read_own_newest(read_verified) is None


def test_what_retention_deletes_is_forgotten(tmp_path, training):
    checkpointer = make(tmp_path, save_steps=1, max_to_keep=2)
    run(checkpointer, training, 50)
    checkpointer.wait()
    assert checkpointer._own == {49, 50}


def test_a_listener_may_end_training(tmp_path):
    training = Counting(stop_at=2)
    checkpointer = make(tmp_path, background=False)
    run(checkpointer, training, 1)
    assert not checkpointer.wants_to_stop
    training.stop_at = 3
    run(checkpointer, training, 2)
    assert checkpointer.wants_to_stop
