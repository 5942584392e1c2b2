"""TensorFlow's private signs are there: where one goes, this says which."""

import pytest

tf = pytest.importorskip("tensorflow.compat.v1")

from tf_h5_callback.graph import _compat  # noqa: E402


def test_a_recoverable_session_is_recognised():
    assert _compat._RECOVERABLE_SESSION is not None
    seen = []

    class Look(tf.train.SessionRunHook):
        def before_run(self, run_context):
            seen.append(_compat.is_recovering())

    with tf.Graph().as_default():
        op = tf.train.get_or_create_global_step().assign_add(1)
        for make in (tf.train.MonitoredSession, tf.train.SingularMonitoredSession):
            with make(hooks=[Look()]) as session:
                session.run(op)
    assert seen == [True, False] and not _compat.is_recovering()


@pytest.mark.parametrize("use_resource", [False, True])
def test_parts_of_a_partitioned_variable(use_resource):
    with tf.Graph().as_default():
        whole = tf.get_variable(
            "w", [5, 2], partitioner=tf.fixed_size_partitioner(2), use_resource=use_resource
        )
        parts = _compat.parts_of(whole)
        slices = [_compat.slice_of(part) for part in parts]
        assert [s.name for s in slices] == ["w:0", "w:0"]
        assert slices[0].shape.as_list() == [5, 2]
        assert [s.slices[0] for s in slices] == [slice(0, 3), slice(3, 5)]
        assert _compat.name_of(parts[1]) == "w:0"
        plain = tf.get_variable("v", [3], use_resource=use_resource)
        assert _compat.slice_of(plain) is None and _compat.parts_of(plain) == [plain]
        assert _compat.is_ref_variable(plain) != use_resource
        assert _compat.is_variable(plain) and not _compat.is_saveable(plain)
        assert _compat.initial_value_of(plain) is not None


def test_a_table_is_a_saveable():
    from tensorflow.python.ops.lookup_ops import MutableHashTable

    with tf.Graph().as_default():
        MutableHashTable(tf.string, tf.int64, -1)
        (saveable,) = tf.get_collection(tf.GraphKeys.SAVEABLE_OBJECTS)
        assert _compat.is_saveable(saveable) and not _compat.is_variable(saveable)
