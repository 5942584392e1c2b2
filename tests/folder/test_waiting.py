import threading
import time

import numpy as np

import tf_h5_callback as h5
from tf_h5_callback.file.writer import write_checkpoint
from tf_h5_callback.folder import waiting


def save(folder, step):
    folder.mkdir(exist_ok=True)
    path = folder / "model.ckpt-{}.h5".format(step)
    write_checkpoint(path, {"w:0": np.array(step)}, global_step=step)
    return str(path)


def test_each_new_checkpoint_once(tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "_POLL_SECS", 0.01)
    folder = tmp_path / "not there yet"
    iterator = h5.checkpoints_iterator(folder, timeout=30)
    thread = threading.Timer(0.1, save, (folder, 3))
    thread.start()
    assert next(iterator) == str(folder / "model.ckpt-3.h5")
    thread.join()
    save(folder, 4)
    newest = save(folder, 10)
    assert next(iterator) == newest


def test_a_timeout_ends_it(tmp_path):
    path = save(tmp_path, 1)
    assert list(h5.checkpoints_iterator(tmp_path, timeout=0.05)) == [path]


def test_timeout_fn_decides(tmp_path):
    answers = [False, True]
    assert (
        list(h5.checkpoints_iterator(tmp_path, timeout=0.02, timeout_fn=lambda: answers.pop(0)))
        == []
    )
    assert answers == []


def test_min_interval(tmp_path):
    save(tmp_path, 1)
    iterator = h5.checkpoints_iterator(tmp_path, min_interval_secs=0.2, timeout=5)
    next(iterator)
    begin = time.monotonic()
    save(tmp_path, 2)
    next(iterator)
    assert time.monotonic() - begin >= 0.15
