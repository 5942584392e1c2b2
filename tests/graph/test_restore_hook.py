"""Evaluation beside training: restores, never writes."""

import os

import numpy as np
import pytest

import tf_h5_callback as h5
from tf_h5_callback.file.writer import write_checkpoint

tf = pytest.importorskip("tensorflow.compat.v1")

from tf_h5_callback.graph import restore_hook  # noqa: E402


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as g:
        yield g


@pytest.fixture
def clock(clock, monkeypatch):
    monkeypatch.setattr(restore_hook, "time", clock)
    return clock


def save(folder, step, **more):
    folder.mkdir(exist_ok=True)
    tensors = {"w:0": np.full(3, step, "f4"), "w/Adam:0": np.zeros(3, "f4")}
    tensors["global_step:0"] = np.array(step)
    path = folder / "model.ckpt-{}.h5".format(step)
    write_checkpoint(path, dict(tensors, **more), global_step=step)
    return str(path)


def model():
    return tf.get_variable("w", [3], initializer=tf.zeros_initializer())


def evaluate(hook, w, times=1):
    with tf.train.SingularMonitoredSession(hooks=[hook]) as session:
        return [session.run(w).tolist() for _ in range(times)][-1]


def test_extra_tensors_are_ignored_and_nothing_is_written(tmp_path):
    save(tmp_path / "run", 1)
    save(tmp_path / "run", 7)
    before = sorted(os.listdir(tmp_path / "run"))
    assert evaluate(h5.H5RestoreHook(tmp_path / "run"), model()) == [7, 7, 7]
    assert sorted(os.listdir(tmp_path / "run")) == before


def test_a_file(tmp_path):
    path = save(tmp_path / "run", 1)
    save(tmp_path / "run", 7)
    assert evaluate(h5.H5RestoreHook(path), model()) == [1, 1, 1]


def test_the_global_step_is_restored_if_the_graph_has_one(tmp_path):
    save(tmp_path / "run", 7)
    step = tf.train.get_or_create_global_step()
    with tf.train.SingularMonitoredSession(hooks=[h5.H5RestoreHook(tmp_path / "run")]) as session:
        assert session.run(step) == 7


def test_what_the_graph_has_must_be_there(tmp_path):
    save(tmp_path / "run", 7)
    model()
    missing = tf.get_variable("missing", [2])
    with pytest.raises(h5.CheckpointMismatchError, match="missing:0: file no such tensor"):
        evaluate(h5.H5RestoreHook(tmp_path / "run"), missing)


def test_var_list_and_restore(tmp_path):
    save(tmp_path / "run", 7)
    w = tf.get_variable("other/name", [3])
    tf.get_variable("missing", [2])
    restore = h5.Restore(assignment_map={"w": "other/name"})
    assert evaluate(h5.H5RestoreHook(tmp_path / "run", [w], restore=restore), w) == [7, 7, 7]


def test_moving_averages_for_evaluation(tmp_path):
    """The usual dict of tf.train.ExponentialMovingAverage.variables_to_restore()."""
    save(tmp_path / "run", 7, **{"w/ExponentialMovingAverage:0": np.full(3, 0.5, "f4")})
    w = model()
    var_list = tf.train.ExponentialMovingAverage(0.9).variables_to_restore()
    assert list(var_list) == ["w/ExponentialMovingAverage"]
    assert evaluate(h5.H5RestoreHook(tmp_path / "run", var_list), w) == [0.5] * 3


def test_a_damaged_newest_one_is_left_where_it_is(tmp_path, damage):
    save(tmp_path / "run", 1)
    path = save(tmp_path / "run", 7)
    damage(path, "w:0")
    assert evaluate(h5.H5RestoreHook(tmp_path / "run"), model()) == [1, 1, 1]
    assert os.path.exists(path)


@pytest.mark.parametrize("wait_secs", [0, 5])
def test_no_checkpoint(tmp_path, clock, wait_secs):
    with pytest.raises(h5.CheckpointNotFoundError, match="nowhere"):
        evaluate(h5.H5RestoreHook(tmp_path / "nowhere", wait_secs=wait_secs), model())
    assert clock.now == 1000 + wait_secs


def test_waiting_for_the_first(tmp_path, clock):
    clock.meanwhile = [lambda: None, lambda: save(tmp_path / "run", 3)]
    assert evaluate(h5.H5RestoreHook(tmp_path / "run", wait_secs=60), model()) == [3, 3, 3]
    assert clock.meanwhile == []


def test_following_a_run(tmp_path, damage, caplog):
    save(tmp_path / "run", 1)
    w = model()
    hook = h5.H5RestoreHook(tmp_path / "run", follow_secs=0)
    with tf.train.SingularMonitoredSession(hooks=[hook]) as session:
        assert session.run(w).tolist() == [1, 1, 1]
        save(tmp_path / "run", 2)
        assert session.run(w).tolist() == [2, 2, 2]
        damage(save(tmp_path / "run", 3), "w:0")
        for _ in range(3):
            assert session.run(w).tolist() == [2, 2, 2]
        assert caplog.text.count("model.ckpt-3.h5 is damaged") == 1
        save(tmp_path / "run", 4)
        assert session.run(w).tolist() == [4, 4, 4]


def test_following_looks_only_now_and_then(tmp_path, clock):
    save(tmp_path / "run", 1)
    w = model()
    hook = h5.H5RestoreHook(tmp_path / "run", follow_secs=30)
    with tf.train.SingularMonitoredSession(hooks=[hook]) as session:
        save(tmp_path / "run", 2)
        clock.now += 29.5
        assert session.run(w).tolist() == [1, 1, 1]
        clock.now += 0.5
        assert session.run(w).tolist() == [2, 2, 2]


def test_a_path_in_restore_is_refused(tmp_path):
    with pytest.raises(ValueError, match="first argument"):
        h5.H5RestoreHook(tmp_path, restore=h5.Restore("x.h5"))


def test_a_checkpoint_of_tensorflow(tmp_path):
    w = model()
    saver = tf.train.Saver()
    with tf.Session() as session:
        session.run(w.initializer)
        session.run(w.assign([5.0, 5.0, 5.0]))
        prefix = saver.save(session, str(tmp_path / "theirs" / "model.ckpt"))
    assert evaluate(h5.H5RestoreHook(prefix), w) == [5, 5, 5]
