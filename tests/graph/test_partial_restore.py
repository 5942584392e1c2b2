"""Restoring parts of a checkpoint, under other names, into other graphs, and TensorFlow's own."""

import logging
import os

import numpy as np
import pytest

import tf_h5_callback as h5

tf = pytest.importorskip("tensorflow.compat.v1")


@pytest.fixture
def source(tmp_path, use_resource):
    """A checkpoint of a small model with optimizer slots, at step 3."""
    folder = str(tmp_path / "source")
    run(folder, {"a/w": [2, 3], "a/b": [3], "c": []}, use_resource, last_step=3)
    return os.path.join(folder, "model.ckpt-3.h5")


def model(shapes, use_resource, dtype=None):
    with tf.variable_scope("", use_resource=use_resource):
        return {
            name: tf.get_variable(
                name,
                shape,
                dtype or tf.float32,
                tf.random_normal_initializer(dtype=dtype or tf.float32),
            )
            for name, shape in shapes.items()
        }


def run(folder, shapes, use_resource, last_step=None, dtype=None, after=None, **kwargs):
    """Builds a graph, trains up to a step (None: only creates the session), returns its values."""
    with tf.Graph().as_default():
        tf.set_random_seed(11)
        step = tf.train.get_or_create_global_step()
        variables = model(shapes, use_resource, dtype)
        if last_step is not None:
            loss = tf.add_n([tf.reduce_sum(v * v) for v in variables.values()])
            train_op = tf.train.MomentumOptimizer(0.1, 0.9).minimize(loss, step)
        if after:
            kwargs.update(after(variables))
        hooks = [h5.H5CheckpointHook(folder, save_steps=100, **kwargs)]
        if last_step is not None:
            hooks.append(tf.train.StopAtStepHook(last_step=last_step))
        with tf.train.SingularMonitoredSession(hooks=hooks) as session:
            while last_step is not None and not session.should_stop():
                session.run(train_op)
            if last_step is None:
                values = session.raw_session().run(dict(variables, step=step))
                return {name: np.asarray(value) for name, value in values.items()}


@pytest.fixture
def restored(tmp_path, use_resource):
    def restore(shapes, **kwargs):
        return run(str(tmp_path / "new"), shapes, use_resource, **kwargs)

    return restore


def test_scopes(source, restored):
    values = restored(
        {"x/w": [2, 3], "x/b": [3], "other": [2]},
        restore=h5.Restore(source, assignment_map={"a/": "x/"}),
    )
    np.testing.assert_array_equal(values["x/w"], h5.load_variable(source, "a/w:0"))
    np.testing.assert_array_equal(values["x/b"], h5.load_variable(source, "a/b:0"))
    assert values["step"] == 0  # nobody asked for it


def test_a_variable_as_value_and_one_tensor_for_two(source, tmp_path, use_resource, restored):
    def after(variables):
        rows = [("a/w", variables["one"]), ("a/w:0", "two"), ("global_step", "global_step")]
        return {"restore": h5.Restore(source, assignment_map=rows)}

    values = restored({"one": [2, 3], "two": [2, 3]}, after=after)
    for name in ("one", "two"):
        np.testing.assert_array_equal(values[name], h5.load_variable(source, "a/w:0"))
    assert values["step"] == 3


def test_two_variables_from_one_tensor_do_not_share_a_buffer(source, tmp_path, use_resource):
    with tf.Graph().as_default():
        step = tf.train.get_or_create_global_step()
        v = model({"one": [2, 3], "two": [2, 3]}, use_resource)
        rows = [("a/w", "one"), ("a/w", "two")]
        hook = h5.H5CheckpointHook(
            str(tmp_path / "new"), save_steps=9, restore=h5.Restore(source, assignment_map=rows)
        )
        with tf.control_dependencies([v["one"].assign_add(tf.ones([2, 3]))]):
            train_op = step.assign_add(1)
        with tf.train.SingularMonitoredSession(hooks=[hook]) as session:
            session.run(train_op)
            one, two = session.run([v["one"], v["two"]])
    np.testing.assert_array_equal(two, h5.load_variable(source, "a/w:0"))
    np.testing.assert_array_equal(one, two + 1)


def test_a_callable(source, restored):
    def rename(name):
        if name.endswith("Momentum:0") or name == "c:0":
            return None
        return name.replace("a/", "deep/er/")

    values = restored(
        {"deep/er/w": [2, 3], "deep/er/b": [3]},
        restore=h5.Restore(source, assignment_map=rename),
    )
    np.testing.assert_array_equal(values["deep/er/w"], h5.load_variable(source, "a/w:0"))
    assert values["step"] == 3


def test_what_the_map_names_must_exist_and_fit(source, restored):
    with pytest.raises(h5.CheckpointMismatchError) as error:
        restored(
            {"w": [3, 2], "b": [3]},
            restore=h5.Restore(source, assignment_map={"a/w": "w", "nothing": "b", "c": "gone"}),
        )
    for line in (
        "a/w:0 -> w:0: file float32 (2, 3), graph float32 (3, 2)",
        "nothing -> b:0: file no such tensor, graph float32 (3,)",
        "c:0 -> gone: file float32 (), graph no such tensor",
    ):
        assert line in str(error.value)


def test_not_strict_restores_what_fits_and_reports_the_rest(source, restored, caplog):
    values = restored(
        {"a/w": [2, 3], "a/b": [4], "new": []}, restore=h5.Restore(source, strict=False)
    )
    np.testing.assert_array_equal(values["a/w"], h5.load_variable(source, "a/w:0"))
    assert values["step"] == 3
    for line in (
        "restoring 2 tensors of {}; these do not fit".format(source),
        "a/b:0: file float32 (3,), graph float32 (4,)",
        "c:0: file float32 (), graph no such tensor",
        "new:0: file no such tensor, graph float32 ()",
    ):
        assert line in caplog.text


def test_cast_is_explicit(source, restored):
    shapes = {"a/w": [2, 3], "a/b": [3], "c": []}
    names = {name: name for name in shapes}
    with pytest.raises(h5.CheckpointMismatchError, match="file float32 .*, graph float64"):
        restored(shapes, dtype=tf.float64, restore=h5.Restore(source, assignment_map=names))
    values = restored(
        shapes, dtype=tf.float64, restore=h5.Restore(source, assignment_map=names, cast=True)
    )
    assert values["a/w"].dtype == np.float64
    np.testing.assert_array_equal(values["a/w"], h5.load_variable(source, "a/w:0"))


def test_cast_does_not_reshape(source, restored):
    with pytest.raises(h5.CheckpointMismatchError, match=r"\(2, 3\).*\(3, 2\)"):
        restored({"w": [3, 2]}, restore=h5.Restore(source, assignment_map={"a/w": "w"}, cast=True))


@pytest.mark.parametrize("run_local_init", [False, True])
def test_local_variables(source, tmp_path, use_resource, run_local_init):
    with tf.Graph().as_default():
        tf.train.get_or_create_global_step()
        v = model({"a/b": [3]}, use_resource)["a/b"]
        local = tf.Variable(
            v * 1.0,  # local variables are initialised after global ones
            collections=[tf.GraphKeys.LOCAL_VARIABLES],
            name="local",
        )
        restore = h5.Restore(source, assignment_map={"a/b": "a/b"}, run_local_init=run_local_init)
        hook = h5.H5CheckpointHook(str(tmp_path / "new"), save_steps=9, restore=restore)
        with tf.train.SingularMonitoredSession(hooks=[hook]) as session:
            now, then = session.run([v, local])
    assert np.array_equal(now, then) == run_local_init


def test_a_lost_session_goes_on_from_its_own_checkpoint(source, tmp_path, use_resource):
    class Lost(tf.train.SessionRunHook):
        runs = 0

        def before_run(self, run_context):
            self.runs += 1
            if self.runs == 5:
                raise tf.errors.AbortedError(None, None, "the worker went away")

    folder = str(tmp_path / "new")
    with tf.Graph().as_default():
        step = tf.train.get_or_create_global_step()
        model({"x/w": [2, 3]}, use_resource)
        train_op = step.assign_add(1)
        hooks = [
            h5.H5CheckpointHook(
                folder, save_steps=2, restore=h5.Restore(source, assignment_map={"a/w": "x/w"})
            ),
            Lost(),
            tf.train.StopAtStepHook(last_step=6),
        ]
        with tf.train.MonitoredTrainingSession(hooks=hooks) as session:
            while not session.should_stop():
                session.run(train_op)
    assert [step for step, _ in h5.list_checkpoints(folder)] == [0, 2, 4, 6]
    np.testing.assert_array_equal(
        h5.load_variable(folder, "x/w:0"), h5.load_variable(source, "a/w:0")
    )


# TensorFlow 1.2 renamed the variables of RNN cells


def test_rnn_names_are_offered_and_work(tmp_path, restored):
    from tf_h5_callback.file.writer import write_checkpoint

    old = str(tmp_path / "old.h5")
    tensors = {
        "rnn/basic_lstm_cell/weights:0": np.arange(6, dtype="f4").reshape(2, 3),
        "rnn/basic_lstm_cell/biases:0": np.arange(3, dtype="f4"),
        "global_step:0": np.array(3),
    }
    write_checkpoint(old, tensors, tensorflow_version="1.1.0")
    shapes = {"rnn/basic_lstm_cell/kernel": [2, 3], "rnn/basic_lstm_cell/bias": [3]}
    with pytest.raises(h5.CheckpointMismatchError, match="rnn_names_of_tensorflow_1_2"):
        restored(shapes, restore=old)
    values = restored(
        shapes, restore=h5.Restore(old, assignment_map=h5.rnn_names_of_tensorflow_1_2)
    )
    assert values["rnn/basic_lstm_cell/bias"].tolist() == [0, 1, 2]
    write_checkpoint(old, tensors, tensorflow_version="1.4.0")
    with pytest.raises(h5.CheckpointMismatchError, match="fits the graph that wrote it"):
        restored(shapes, restore=old)


# Coming from TensorFlow's own checkpoints


@pytest.mark.parametrize("by", ["prefix", "folder"])
def test_a_run_of_checkpoint_saver_hook_goes_on_with_ours(tmp_path, use_resource, by):
    """Names, slots and partitions included."""
    theirs, ours = str(tmp_path / "theirs"), str(tmp_path / "ours")

    def build():
        step = tf.train.get_or_create_global_step()
        with tf.variable_scope("net", use_resource=use_resource):
            w = tf.get_variable("w", [3])
            p = tf.get_variable("p", [7, 2], partitioner=tf.fixed_size_partitioner(2))
        loss = tf.reduce_sum(w * w) + tf.reduce_sum(tf.convert_to_tensor(p) ** 2)
        return tf.train.AdamOptimizer().minimize(loss, step)

    def train(hook, last_step):
        with tf.Graph().as_default():
            tf.set_random_seed(3)
            train_op = build()
            hooks = [hook(), tf.train.StopAtStepHook(last_step=last_step)]
            with tf.train.SingularMonitoredSession(hooks=hooks) as session:
                while not session.should_stop():
                    session.run(train_op)

    train(lambda: tf.train.CheckpointSaverHook(theirs, save_steps=100), 4)
    path = theirs if by == "folder" else os.path.join(theirs, "model.ckpt-4")
    train(lambda: h5.H5CheckpointHook(ours, save_steps=100, restore=path), 9)
    whole = str(tmp_path / "whole")
    train(lambda: h5.H5CheckpointHook(whole, save_steps=100), 9)
    assert [step for step, _ in h5.list_checkpoints(ours)] == [4, 9]
    with h5.load_checkpoint(ours) as a, h5.load_checkpoint(whole) as b:
        assert list(a) == list(b) and "net/p/Adam_1:0" in a
        for name in a:
            assert a[name].tobytes() == b[name].tobytes(), name


def test_a_missing_or_broken_checkpoint_of_tensorflow(tmp_path, restored):
    with pytest.raises(h5.CheckpointNotFoundError, match="nowhere"):
        restored({"w": []}, restore=str(tmp_path / "nowhere"))
    prefix = str(tmp_path / "broken")
    for suffix in (".index", ".data-00000-of-00001"):
        with open(prefix + suffix, "wb") as f:
            f.write(b"nonsense" * 100)
    with pytest.raises(h5.CheckpointCorruptError, match="TensorFlow cannot read .*broken"):
        restored({"w": []}, restore=prefix)


def test_a_folder_of_ours(source, restored, caplog):
    with caplog.at_level(logging.INFO, logger="tf_h5_callback"):
        values = restored(
            {"a/w": [2, 3]},
            restore=h5.Restore(os.path.dirname(source), assignment_map={"a/w": "a/w"}),
        )
    np.testing.assert_array_equal(values["a/w"], h5.load_variable(source, "a/w:0"))
    assert "resumed from " + source in caplog.text
