import datetime
import os
import re
import types

import numpy as np
import pytest

import tf_h5_callback as h5
from tf_h5_callback.file import writer as checkpoint_file
from tf_h5_callback.file.format import Monitored
from tf_h5_callback.file.writer import write_checkpoint
from tf_h5_callback.folder.directory import CheckpointDir
from tf_h5_callback.folder.lock import WriterLock
from tf_h5_callback.folder.retention import Retention, best_first

TENSORS = {"w:0": np.arange(100, dtype="f4")}


def fill(folder, steps, basename="model.ckpt"):
    os.makedirs(folder, exist_ok=True)
    for step in steps:
        path = os.path.join(folder, "{}-{}.h5".format(basename, step))
        write_checkpoint(path, {"w:0": np.full(100, step, "f4")}, global_step=step)


def steps(folder, **kwargs):
    return [step for step, _ in h5.list_checkpoints(folder, **kwargs)]


def test_listed_by_step_not_by_text_or_time(tmp_path):
    fill(tmp_path, [900, 1000, 0, 2])
    os.utime(tmp_path / "model.ckpt-1000.h5", (1, 1))
    assert h5.list_checkpoints(tmp_path) == [
        (step, str(tmp_path / "model.ckpt-{}.h5".format(step))) for step in (0, 2, 900, 1000)
    ]
    assert h5.latest_checkpoint(tmp_path) == str(tmp_path / "model.ckpt-1000.h5")


def test_foreign_files_are_not_listed(tmp_path):
    fill(tmp_path, [5])
    for name in (
        "model.ckpt-7.h5.tmp", ".model.ckpt-8.h5.123.tmp", "model.ckpt-9.hdf5", "model.ckpt--1.h5",
        "model.ckpt-010.h5", "modelxckpt-11.h5", "xmodel.ckpt-12.h5", "other-13.h5", "checkpoint",
        "model.ckpt-\u0661.h5", "model.ckpt-14.h5\n",
    ):  # fmt: skip
        (tmp_path / name).write_bytes(b"")
    assert steps(tmp_path) == [5]


def test_another_base_name(tmp_path):
    fill(tmp_path, [1, 2])
    fill(tmp_path, [3], basename="gan+d")
    assert steps(tmp_path, checkpoint_basename="gan+d") == [3]
    assert h5.latest_checkpoint(tmp_path, "gan+d") == str(tmp_path / "gan+d-3.h5")


def test_no_folder_and_an_empty_one(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        assert h5.list_checkpoints(folder) == []
        assert h5.latest_checkpoint(folder) is None
    with pytest.raises(h5.CheckpointNotFoundError, match=re.escape(str(tmp_path))):
        h5.load_checkpoint(tmp_path)


def test_reading_by_folder(tmp_path):
    fill(tmp_path, [1, 10, 9])
    assert h5.load_variable(tmp_path, "w:0")[0] == 10
    assert h5.list_variables(tmp_path) == [("w:0", (100,))]
    with h5.load_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.step == 10
    assert h5.load_variable(tmp_path / "model.ckpt-1.h5", "w:0")[0] == 1


def test_a_wrong_name_shows_the_right_ones(tmp_path):
    fill(tmp_path, [1])
    with pytest.raises(KeyError, match="model.ckpt-1.h5 has no 'w'; it has 'w:0'"):
        h5.load_variable(tmp_path, "w")


def test_a_damaged_newest_loses_against_an_intact_older_one(tmp_path, damage, caplog):
    fill(tmp_path, [1, 2, 3, 4])
    damage(tmp_path / "model.ckpt-4.h5", "w:0")
    os.truncate(tmp_path / "model.ckpt-3.h5", 1000)
    assert h5.latest_checkpoint(tmp_path) == str(tmp_path / "model.ckpt-2.h5")
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert "model.ckpt-4.h5 is damaged: 'w:0': its checksum is wrong" in warnings[0]
    assert "model.ckpt-3.h5 is damaged" in warnings[1]


def test_if_none_is_intact_all_are_named(tmp_path, damage):
    fill(tmp_path, [1, 2])
    damage(tmp_path / "model.ckpt-1.h5", "w:0")
    damage(tmp_path / "model.ckpt-2.h5", "w:0")
    with pytest.raises(h5.CheckpointCorruptError, match="none of the 2") as error:
        h5.latest_checkpoint(tmp_path)
    assert "model.ckpt-1.h5" in str(error.value) and "model.ckpt-2.h5" in str(error.value)


def test_a_mismatch_is_no_damage(tmp_path):
    """A newest file that is intact but does not fit is an error, not a reason to go back."""
    fill(tmp_path, [1, 2])

    def check(checkpoint):
        raise h5.CheckpointMismatchError(checkpoint.path)

    with pytest.raises(h5.CheckpointMismatchError, match="model.ckpt-2.h5"):
        CheckpointDir(tmp_path).read_newest_intact(check)


def test_retention_keeps_the_newest(tmp_path):
    fill(tmp_path, range(0, 80, 10))
    (tmp_path / "other-1.h5").write_bytes(b"")
    CheckpointDir(tmp_path, retention=Retention(max_to_keep=3)).remove_surplus(70)
    assert steps(tmp_path) == [50, 60, 70]
    assert os.path.exists(tmp_path / "other-1.h5")


def test_retention_of_none_keeps_all(tmp_path):
    fill(tmp_path, range(8))
    CheckpointDir(tmp_path, retention=Retention(max_to_keep=None)).remove_surplus(7)
    assert steps(tmp_path) == list(range(8))


def test_retention_leaves_later_steps_of_a_run_that_was_rolled_back(tmp_path):
    fill(tmp_path, [1, 2, 3, 100, 101, 102])
    CheckpointDir(tmp_path, retention=Retention(max_to_keep=2)).remove_surplus(3)
    assert steps(tmp_path) == [2, 3, 100, 101, 102]


@pytest.fixture
def hours(monkeypatch):
    """Lets files be written at a given hour."""

    class Clock(datetime.datetime):
        hour_of_day = 0.0

        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2020, 1, 1, tzinfo=tz) + datetime.timedelta(
                hours=cls.hour_of_day
            )

    module = types.SimpleNamespace(datetime=Clock, timezone=datetime.timezone)
    monkeypatch.setattr(checkpoint_file, "datetime", module)
    return Clock


def test_one_of_every_n_hours_is_kept_across_restarts(tmp_path, hours):
    for step in range(25):
        hours.hour_of_day = step * 0.5
        fill(tmp_path, [step])
        # A new object each time: a restarted run must keep what the one before it kept.
        CheckpointDir(
            tmp_path, retention=Retention(max_to_keep=2, keep_checkpoint_every_n_hours=3)
        ).remove_surplus(step)
    assert steps(tmp_path) == [0, 6, 12, 18, 23, 24]
    for _, path in h5.list_checkpoints(tmp_path):
        os.utime(path, (1, 1))  # copied without its times
    CheckpointDir(
        tmp_path, retention=Retention(max_to_keep=2, keep_checkpoint_every_n_hours=3)
    ).remove_surplus(24)
    assert steps(tmp_path) == [0, 6, 12, 18, 23, 24]


def test_retention_by_hours_never_deletes_what_it_cannot_read(tmp_path, hours, caplog):
    for step in range(4):
        hours.hour_of_day = step
        fill(tmp_path, [step])
    os.truncate(tmp_path / "model.ckpt-1.h5", 100)
    CheckpointDir(
        tmp_path, retention=Retention(max_to_keep=1, keep_checkpoint_every_n_hours=9)
    ).remove_surplus(3)
    assert steps(tmp_path) == [0, 1, 3]
    assert "model.ckpt-1.h5 is damaged" in caplog.text


@pytest.mark.parametrize("basename", ["a/b", ""])
def test_base_names_that_are_none(tmp_path, basename):
    with pytest.raises(ValueError, match="without a folder"):
        CheckpointDir(tmp_path, basename)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"max_to_keep": 0}, "max_to_keep is 0; it must be at least 1"),
        ({"keep_checkpoint_every_n_hours": 0}, "must be above 0"),
    ],
)
def test_retention_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        Retention(**kwargs)


NAN = float("nan")


@pytest.mark.parametrize(
    "mode, values, expected",
    [
        ("min", [3, 1, 2], [1, 2, 0]),
        ("max", [3, 1, 2], [0, 2, 1]),
        ("min", [NAN, 5, NAN], [1]),
        ("max", [NAN], []),
        ("min", [2, 1, 1], [1, 2, 0]),
        ("max", [2, 2, 1], [0, 1, 2]),
        ("min", [None, 4, None, 3], [3, 1]),
        ("min", [None], []),
        ("max", [float("-inf"), float("inf")], [1, 0]),
    ],
)
def test_best_first(mode, values, expected):
    monitored = {
        str(i): None if v is None else Monitored("loss:0", mode, v) for i, v in enumerate(values)
    }
    assert best_first(monitored) == [str(i) for i in expected]


def test_only_values_of_the_newest_monitor_are_compared():
    monitored = {
        "0": Monitored("loss:0", "min", 0.1),
        "1": Monitored("accuracy:0", "max", 0.5),
        "2": Monitored("accuracy:0", "max", 0.4),
    }
    assert best_first(monitored) == ["1", "2"]


def test_the_best_survives_retention_and_is_found_again(tmp_path, damage):
    losses = [5.0, 2.0, 3.0, NAN, 4.0, 2.5]
    for step, loss in enumerate(losses):
        path = tmp_path / "model.ckpt-{}.h5".format(step)
        write_checkpoint(
            path, TENSORS, global_step=step, monitored=Monitored("loss:0", "min", loss)
        )
        CheckpointDir(tmp_path, retention=Retention(2, keep_best=True)).remove_surplus(step)
    assert steps(tmp_path) == [1, 4, 5]
    best = h5.best_checkpoint(tmp_path)
    assert best == str(tmp_path / "model.ckpt-1.h5")
    with h5.load_checkpoint(best) as checkpoint:
        assert checkpoint.monitored == ("loss:0", "min", 2.0)
    damage(best, "w:0")
    assert h5.best_checkpoint(tmp_path) == str(tmp_path / "model.ckpt-5.h5")
    assert h5.best_checkpoint(tmp_path / "nowhere") is None


def test_a_file_that_somebody_else_deleted_first(tmp_path, monkeypatch):
    fill(tmp_path, [1, 2])
    directory = CheckpointDir(tmp_path, retention=Retention(max_to_keep=1))
    listing = directory.list()
    os.remove(listing[0][1])
    monkeypatch.setattr(directory, "list", lambda: listing)
    directory.remove_surplus(2)
    assert steps(tmp_path) == [2]


def test_a_surplus_file_that_cannot_be_deleted_is_a_warning(tmp_path, caplog):
    fill(tmp_path, [2])
    (tmp_path / "model.ckpt-1.h5").mkdir()
    CheckpointDir(tmp_path, retention=Retention(max_to_keep=1)).remove_surplus(2)
    assert "cannot delete the old checkpoint" in caplog.text


def test_an_interrupt_while_it_is_closed(tmp_path, monkeypatch):
    """The next training opens it again, whether the lock was given back by then or not."""
    real = WriterLock.close
    for closed in (False, True):
        directory = CheckpointDir(tmp_path)
        directory.open_for_writing()

        def close(self, closed=closed):
            if closed:
                real(self)
            raise KeyboardInterrupt

        monkeypatch.setattr(WriterLock, "close", close)
        with pytest.raises(KeyboardInterrupt):
            directory.close()
        monkeypatch.undo()
        directory.open_for_writing()
        directory.close()
