import numpy as np

import tf_h5_callback as h5
from tf_h5_callback.file.writer import write_checkpoint


def save(folder, step):
    folder.mkdir(exist_ok=True)
    path = folder / "model.ckpt-{}.h5".format(step)
    write_checkpoint(path, {"w:0": np.array(step)}, global_step=step)
    return str(path)


def test_each_new_checkpoint_once(tmp_path, clock):
    folder = tmp_path / "not there yet"
    iterator = h5.checkpoints_iterator(folder, timeout=30)
    clock.meanwhile = [lambda: None, lambda: save(folder, 3)]
    assert next(iterator) == str(folder / "model.ckpt-3.h5")
    assert clock.meanwhile == [] and clock.now == 1002
    save(folder, 4)
    newest = save(folder, 10)
    assert next(iterator) == newest
    assert clock.now == 1002  # without waiting
    clock.meanwhile = [lambda: save(folder, 11)]
    assert next(iterator) == str(folder / "model.ckpt-11.h5")


def test_without_a_timeout_it_waits_for_ever(tmp_path, clock):
    clock.meanwhile = [lambda: None] * 10000 + [lambda: save(tmp_path, 1)]
    assert next(h5.checkpoints_iterator(tmp_path)) == str(tmp_path / "model.ckpt-1.h5")


def test_a_timeout_ends_it(tmp_path, clock):
    path = save(tmp_path, 1)
    assert list(h5.checkpoints_iterator(tmp_path, timeout=2.5)) == [path]
    assert clock.now == 1002.5


def test_timeout_fn_decides(tmp_path, clock):
    answers = [False, True]
    iterator = h5.checkpoints_iterator(tmp_path, timeout=2, timeout_fn=lambda: answers.pop(0))
    assert list(iterator) == []
    assert answers == [] and clock.now == 1004


def test_min_interval(tmp_path, clock):
    save(tmp_path, 1)
    iterator = h5.checkpoints_iterator(tmp_path, min_interval_secs=20, timeout=5)
    next(iterator)
    save(tmp_path, 2)
    clock.now += 3  # what the caller does with the first
    next(iterator)
    assert clock.now == 1020
