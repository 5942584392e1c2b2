"""Copies of large and small variables. Real sessions."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow.compat.v1")

from tf_h5_callback.graph import snapshot  # noqa: E402
from tf_h5_callback.graph.state import GraphState  # noqa: E402
from tf_h5_callback.saving.save import Save  # noqa: E402

SHAPE = [300, 1000]
LARGE = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool"] + [
    "int8", "int16", "int32", "int64", "uint8", "uint16"
]  # fmt: skip


def variable(name, dtype="float32", use_resource=True, shape=SHAPE):
    """A variable, and an operation that gives it other values each time."""
    with tf.variable_scope("", use_resource=use_resource):
        zeros = tf.zeros_initializer()
        v = tf.get_variable(name, shape, tf.as_dtype(dtype), initializer=zeros)
    count = tf.get_variable(name + "_count", [], initializer=zeros)
    values = tf.reshape(tf.range(np.prod(shape), dtype=tf.float32), shape) + count.assign_add(1.0)
    return v, v.assign(tf.cast(tf.math.floormod(values, 2 if dtype == "bool" else 100), v.dtype))


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as g:
        yield g


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(snapshot, "_LARGE", 1000)


@pytest.mark.parametrize("dtype", LARGE)
def test_large_variables_of_every_dtype(dtype, use_resource, everything_is_large):
    v, change = variable("v", dtype, use_resource)
    state = GraphState()
    state.add_copies()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        seen = []
        for _ in range(3):
            session.run(change)
            tensors, _ = state.snapshot(session, Save())
            expected = session.run(v)
            assert tensors["v:0"].dtype == expected.dtype
            assert tensors["v:0"].tobytes() == expected.tobytes()
            assert state.lazy_snapshot(session)["v:0"].tobytes() == expected.tobytes()
            seen.append((tensors["v:0"].ctypes.data, expected.tobytes()))
    assert len({values for _, values in seen}) > 1
    assert len({address for address, _ in seen}) == 1  # the same memory again and again


def test_the_memory_is_given_back(everything_is_large):
    variable("v")
    state = GraphState()
    state.add_copies()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        first = state.snapshot(session, Save())[0]["v:0"]
        assert state.snapshot(session, Save())[0]["v:0"].ctypes.data == first.ctypes.data
        state.forget_session()
        assert state.snapshot(session, Save())[0]["v:0"].ctypes.data != first.ctypes.data


def test_large_and_small_and_joined_ones_together(use_resource, everything_is_large):
    names = ["large", "small", "other", "third"]
    shapes = [SHAPE, [3], [2, 2], [40, 50]]
    changes = [variable(n, use_resource=use_resource, shape=s)[1] for n, s in zip(names, shapes)]
    partitioned = tf.get_variable(
        "parts", [100, 30], partitioner=tf.fixed_size_partitioner(3), use_resource=use_resource
    )
    change = [part.assign_add(tf.ones_like(part)) for part in partitioned]
    state = GraphState()
    state.add_copies()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for _ in range(2):
            session.run([changes, change])
            everything = tf.global_variables()
            expected = {v.name: x for v, x in zip(everything, session.run(everything))}
            parts = [k for k in expected if k.startswith("parts")]
            expected["parts:0"] = np.concatenate([expected.pop(k) for k in sorted(parts)])
            tensors, _ = state.snapshot(session, Save())
            lazy = state.lazy_snapshot(session)
            assert set(tensors) == set(lazy) == set(expected)
            for name in expected:
                np.testing.assert_array_equal(tensors[name], expected[name])
                np.testing.assert_array_equal(lazy[name], expected[name])


def test_a_session_of_another_process(everything_is_large):
    """It cannot write into our memory: what it is fed with is sent to it."""
    v, change = variable("v")
    state = GraphState()
    state.add_copies()
    server = tf.train.Server.create_local_server()
    with tf.Session(server.target) as session:
        session.run(tf.global_variables_initializer())
        for _ in range(2):
            session.run(change)
            tensors, _ = state.snapshot(session, Save())
            np.testing.assert_array_equal(tensors["v:0"], session.run(v))
            np.testing.assert_array_equal(state.lazy_snapshot(session)["v:0"], session.run(v))


def test_nothing_first_and_one_variable_under_two_names(everything_is_large):
    empty = tf.get_variable("empty", [0, 3])
    v, change = variable("v")
    state = GraphState({"empty": empty, "a": v, "b": v})
    state.add_copies()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        session.run(change)
        for tensors in (state.snapshot(session, Save())[0], state.lazy_snapshot(session)):
            assert tensors["empty"].shape == (0, 3)
            np.testing.assert_array_equal(tensors["a"], session.run(v))
            np.testing.assert_array_equal(tensors["b"], session.run(v))
