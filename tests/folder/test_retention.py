import os

import numpy as np
import pytest

from tf_h5_callback.file.format import Monitored
from tf_h5_callback.file.writer import write_checkpoint
from tf_h5_callback.folder import retention as retention_module
from tf_h5_callback.folder.directory import CheckpointDir
from tf_h5_callback.folder.retention import Retention


@pytest.fixture
def opened(monkeypatch):
    """The paths of the files that are opened to see what they say."""
    paths, real = [], retention_module.Checkpoint

    def opening(path):
        paths.append(path)
        return real(path)

    monkeypatch.setattr(retention_module, "Checkpoint", opening)
    return paths


def save(directory, step, loss):
    write_checkpoint(
        directory.path_for(step),
        {"w:0": np.zeros(3)},
        global_step=step,
        monitored=Monitored("loss:0", "min", loss),
    )
    directory.remove_surplus(step)


def steps(directory):
    return [step for step, _ in directory.list()]


def test_files_that_are_gone_are_forgotten_the_best_is_not(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    retention = Retention(max_to_keep=2, keep_best=True)
    directory = CheckpointDir(tmp_path, retention=retention)
    for step in range(500):
        save(directory, step, loss=0.5 if step == 7 else 1 + step)
        assert len(retention._facts) <= 4
    assert steps(directory) == [7, 498, 499]
    # Each file once, though the best one was compared at every save.
    assert opened == [directory.path_for(step) for step in range(500)]


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    directory = CheckpointDir(tmp_path, retention=Retention(max_to_keep=1, keep_best=True))
    for step, loss in enumerate([3, 1, 2]):
        save(directory, step, loss)
    assert steps(directory) == [1, 2]
    write_checkpoint(directory.path_for(1), {}, monitored=Monitored("loss:0", "min", 9))
    os.utime(directory.path_for(1), ns=(1, 1))
    directory.remove_surplus(2)
    assert steps(directory) == [2]


def test_an_interrupt_while_a_file_is_read_does_not_keep_it_for_good(tmp_path, monkeypatch):
    """A file that cannot be read is never deleted; this one can be."""
    directory = CheckpointDir(tmp_path, retention=Retention(max_to_keep=1, keep_best=True))
    save(directory, 0, loss=9)

    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention_module, "Checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(directory, 1, loss=1)
    save(directory, 2, loss=2)
    assert steps(directory) == [1, 2]


def test_a_file_that_cannot_be_read_is_told_of_once(tmp_path, caplog):
    directory = CheckpointDir(tmp_path, retention=Retention(max_to_keep=1, keep_best=True))
    (tmp_path / "model.ckpt-0.h5").write_bytes(b"not HDF5")
    for step in (1, 2, 3):
        save(directory, step, loss=1 / step)
    assert steps(directory) == [0, 3]
    assert caplog.text.count("it is neither counted nor deleted") == 1
