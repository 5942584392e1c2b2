"""What belongs to the state of a graph. Real sessions."""

import pytest

import tf_h5_callback as h5

tf = pytest.importorskip("tensorflow.compat.v1")

from tf_h5_callback.file.writer import write_checkpoint  # noqa: E402
from tf_h5_callback.graph.state import GraphState  # noqa: E402
from tf_h5_callback.saving.save import Save  # noqa: E402


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as g:
        yield g


def test_one_name_for_two_tensors():
    kernel, bias = (tf.get_variable(name, [2]) for name in ("kernel", "bias"))
    tf.train.get_or_create_global_step()
    with pytest.raises(ValueError, match="two variables would be saved as 'global_step:0'"):
        GraphState({"global_step:0": kernel, "x": bias})


def test_tables(tmp_path):
    from tensorflow.python.ops.lookup_ops import MutableHashTable

    path = tmp_path / "model.ckpt-0.h5"
    table = MutableHashTable(tf.string, tf.int64, -1)
    keys = tf.constant([b"a\0", b"bc", b""])
    insert, clear = table.insert(keys, [1, 2, 3]), table.remove(keys)
    look_up = table.lookup(tf.constant([b"a\0", b"bc", b"", b"a"]))
    state = GraphState()
    with tf.Session() as session:
        session.run(insert)
        tensors, _ = state.snapshot(session, Save())
        write_checkpoint(path, tensors)
        session.run(clear)
        assert session.run(look_up).tolist() == [-1, -1, -1, -1]
        with h5.load_checkpoint(path) as checkpoint:
            assert len(state.match(checkpoint)) == 2
            state.assign(session, checkpoint.read_all())
        assert session.run(look_up).tolist() == [1, 2, 3, -1]


def test_a_state_is_found_again_in_a_finalised_graph(graph):
    tf.get_variable("kernel", [1000, 1000])
    tf.train.get_or_create_global_step()
    data = tf.data.Dataset.range(5)
    iterator = tf.data.make_initializable_iterator(data)
    GraphState(iterators=[iterator]).add_copies()
    nodes = len(graph.get_operations())
    graph.finalize()
    GraphState(iterators=[iterator]).add_copies()
    assert len(graph.get_operations()) == nodes


def test_the_global_step_always_belongs_to_the_state():
    kernel = tf.get_variable("kernel", [2])
    step = tf.train.get_or_create_global_step()
    assert set(GraphState([kernel])._items) == {kernel.name, step.name}
    assert set(GraphState({"step": step, "k": kernel})._items) == {"step", "k"}
