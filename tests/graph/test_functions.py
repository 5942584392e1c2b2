"""The seed's functions. Real sessions."""

import h5py
import numpy as np
import pytest

import tf_h5_callback as h5

tf = pytest.importorskip("tensorflow.compat.v1")


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as g:
        yield g


def rnn(use_resource=False):
    """A few variables in nested scopes, as an RNN has them."""
    with tf.variable_scope("rnn"), tf.variable_scope("cell"):
        kernel = tf.get_variable(
            "kernel", [3, 4], initializer=tf.ones_initializer(), use_resource=use_resource
        )
        bias = tf.get_variable("bias", [4], tf.float64, use_resource=use_resource)
    count = tf.get_variable("count", [], tf.int32, trainable=False, use_resource=use_resource)
    return kernel, bias, count


def values_of(session, variables):
    return {v.name: np.asarray(x) for v, x in zip(variables, session.run(list(variables)))}


def assert_equal(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes(), name


def test_the_posts_loop_saves_and_we_restore(tmp_path, use_resource):
    path = str(tmp_path / "model.h5")
    rnn(use_resource)
    setters = h5.create_setters(tf.trainable_variables())
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        saved = values_of(session, tf.trainable_variables())
        with h5py.File(path, "w") as f:  # the loop of the post
            for var in tf.trainable_variables():
                f.create_dataset(var.name.replace("/", " "), data=session.run(var))
        session.run(tf.global_variables_initializer())
        h5.restore_variables(session, path, setters=setters)
        assert_equal(values_of(session, tf.trainable_variables()), saved)


def test_we_save_and_the_posts_loop_restores(tmp_path, use_resource):
    path = str(tmp_path / "model.h5")
    rnn(use_resource)
    param_setters = {}  # the loop of the post
    for var in tf.trainable_variables():
        name = var.name.split(":")[0]
        placeholder = tf.placeholder(var.dtype.base_dtype, var.shape, name=name + "_setter_")
        param_setters[var.name] = (tf.assign(var, placeholder), placeholder)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        saved = values_of(session, tf.trainable_variables())
        h5.save_variables(session, path, tf.trainable_variables())
        session.run(tf.global_variables_initializer())
        with h5py.File(path, "r") as f:  # the loop of the post
            assert set(f) == {"rnn cell kernel:0", "rnn cell bias:0"}
            for name, value in f.items():
                assign, placeholder = param_setters[name.replace(" ", "/")]
                session.run(assign, {placeholder: value[()]})
        assert_equal(values_of(session, tf.trainable_variables()), saved)


def test_setters_are_what_the_post_says(use_resource):
    kernel, bias, _ = rnn(use_resource)
    with tf.name_scope("somewhere"), tf.control_dependencies([tf.no_op()]):
        setters = h5.create_setters()
    assert sorted(setters) == ["count:0", "rnn/cell/bias:0", "rnn/cell/kernel:0"]
    assign, placeholder = setters["rnn/cell/kernel:0"]
    assert placeholder.name == "rnn/cell/kernel_setter:0"
    assert placeholder.dtype == tf.float32 and placeholder.shape.as_list() == [3, 4]
    with tf.Session() as session:
        session.run(assign, {placeholder: np.full((3, 4), 2, "f4")})
        assert session.run(kernel).tolist() == [[2] * 4] * 3


def test_setters_are_made_once(graph):
    rnn()
    first = h5.create_setters()
    graph.finalize()
    assert h5.create_setters() == first


def test_save_variables_adds_no_nodes_and_stores_the_rest(graph, tmp_path):
    rnn()
    step = tf.train.get_or_create_global_step()
    init = [tf.global_variables_initializer(), step.assign(41)]
    graph.finalize()
    path = tmp_path / "model.h5"
    with tf.Session() as session:
        session.run(init[0])
        session.run(init[1])
        h5.save_variables(session, path, metadata={"a": 1})
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint.step == 41
        assert checkpoint.tensorflow_version == tf.VERSION
        assert checkpoint.metadata == {"a": 1}
        assert len(checkpoint) == 4


@pytest.mark.parametrize("kind", ["list", "dict", "callable"])
def test_var_list(kind, tmp_path):
    kernel, bias, count = rnn()
    var_list = {
        "list": [kernel, count],
        "dict": {"rnn/cell/kernel:0": kernel, "renamed": count},
        "callable": lambda v: "bias" not in v.name,
    }[kind]
    path = tmp_path / "model.h5"
    setters = h5.create_setters(var_list)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        h5.save_variables(session, path, var_list)
        saved = values_of(session, [kernel, count])
        session.run([kernel.assign_add(kernel), count.assign_add(3)])
        h5.restore_variables(session, path, setters)
        assert_equal(values_of(session, [kernel, count]), saved)
    names = ["renamed" if kind == "dict" else "count:0", "rnn/cell/kernel:0"]
    assert sorted(setters) == sorted(name for name, _ in h5.list_variables(path)) == sorted(names)


def test_wrong_var_lists():
    kernel, bias, _ = rnn()
    with pytest.raises(TypeError, match="'kernel', which is not a variable"):
        h5.create_setters(["kernel"])
    with pytest.raises(TypeError, match="not a variable"):
        h5.create_setters([tf.constant(1.0)])
    assert len(h5.create_setters([kernel, kernel])) == 1


def test_mismatch_lists_everything_and_assigns_nothing(tmp_path):
    path = tmp_path / "model.h5"
    with tf.Graph().as_default(), tf.Session() as session:
        tf.get_variable("same", [2])
        tf.get_variable("other_shape", [2, 3])
        tf.get_variable("other_dtype", [2], tf.float32)
        tf.get_variable("only_in_file", [5], tf.int32)
        session.run(tf.global_variables_initializer())
        h5.save_variables(session, path)
    same = tf.get_variable("same", [2], initializer=tf.zeros_initializer())
    tf.get_variable("other_shape", [3, 2])
    tf.get_variable("other_dtype", [2], tf.float64)
    tf.get_variable("only_in_graph", [])
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        with pytest.raises(h5.CheckpointMismatchError) as error:
            h5.restore_variables(session, path)
        assert session.run(same).tolist() == [0, 0]
    text = str(error.value)
    assert str(path) in text and "same:0" not in text
    for line in (
        "other_shape:0: file float32 (2, 3), graph float32 (3, 2)",
        "other_dtype:0: file float32 (2,), graph float64 (2,)",
        "only_in_file:0: file int32 (5,), graph no such tensor",
        "only_in_graph:0: file no such tensor, graph float32 ()",
    ):
        assert line in text


def test_unknown_static_shape(tmp_path, use_resource):
    path = tmp_path / "model.h5"
    initial = tf.placeholder_with_default(np.zeros((2, 3), "f4"), shape=None)
    v = tf.Variable(initial, validate_shape=False, use_resource=use_resource, name="v")
    setters = h5.create_setters()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        h5.save_variables(session, path)
        session.run(v.initializer, {initial: np.ones((5,), "f4")})
        h5.restore_variables(session, path, setters)
        assert session.run(v).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("name", ["bfloat16", "float16", "bool", "complex64", "uint8", "string"])
def test_dtypes_of_variables(name, tmp_path, use_resource):
    path = tmp_path / "model.h5"
    dtype = getattr(tf, name)
    initial = (
        tf.constant([b"a\0b", b"", b"\xff\0"]) if name == "string" else tf.cast([0, 1, 3], dtype)
    )
    v = tf.Variable(initial, name="v", use_resource=use_resource)
    zeros = tf.constant([b"", b"", b""]) if name == "string" else tf.cast([0, 0, 0], dtype)
    clear = v.assign(zeros).op
    setters = h5.create_setters()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        before = session.run(v)
        h5.save_variables(session, path)
        session.run(clear)
        assert session.run(v).tolist() != before.tolist()
        h5.restore_variables(session, path, setters)
        after = session.run(v)
    assert after.dtype == before.dtype and after.tolist() == before.tolist()


def partitioned(shards, use_resource):
    return tf.get_variable(
        "table",
        [10, 3],
        partitioner=tf.fixed_size_partitioner(shards),
        use_resource=use_resource,
        initializer=tf.random_normal_initializer(),
    )


def test_a_partitioned_variable_is_one_tensor(tmp_path, use_resource):
    path = tmp_path / "model.h5"
    with tf.Graph().as_default(), tf.Session() as session:
        full = partitioned(3, use_resource).as_tensor()
        session.run(tf.global_variables_initializer())
        expected = session.run(full)
        h5.save_variables(session, path)
    np.testing.assert_array_equal(h5.load_variable(path, "table:0"), expected)
    full = partitioned(4, use_resource).as_tensor()
    setters = h5.create_setters()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        h5.restore_variables(session, path, setters)
        np.testing.assert_array_equal(session.run(full), expected)


def test_a_partitioned_variable_in_var_list():
    v = partitioned(2, False)
    assert list(h5.create_setters([v])) == ["table:0"]
    assert list(h5.create_setters({"renamed": v})) == ["renamed"]
    with pytest.raises(ValueError, match="only some parts of the partitioned variable 'table:0'"):
        h5.create_setters([list(v)[0]])
