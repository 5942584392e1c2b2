"""Everything in a graph that has state goes through a file. Real sessions."""

import numpy as np
import pytest

import tf_h5_callback as h5
from tf_h5_callback.file.writer import write_checkpoint

tf = pytest.importorskip("tensorflow.compat.v1")

from tensorflow.python.ops import lookup_ops  # noqa: E402

from tf_h5_callback.graph.state import GraphState  # noqa: E402
from tf_h5_callback.saving.save import Save  # noqa: E402

# As tf.disable_v2_behavior() does: the moving averages of the newest TensorFlow cannot initialise
# themselves from ref variables inside the control flow of version 2.
tf.disable_control_flow_v2()


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as g:
        yield g


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.ckpt-0.h5")


def save(session, state, path):
    tensors, _ = state.snapshot(session, Save())
    write_checkpoint(path, tensors)


def restore(session, state, path):
    with h5.load_checkpoint(path) as checkpoint:
        matches = state.match(checkpoint)
        tensors = checkpoint.read_all()
        state.assign(session, {name: tensors[matches[name]] for name in matches})


def sorted_rows(session, table):
    """What is in a table, in the order of the keys: its own order is that of a hash."""
    keys, values = session.run(table.export())
    order = np.argsort(keys)
    return keys[order].tolist(), values[order].tolist()


PARTITIONERS = {
    "one": lambda: None,
    "two": lambda: tf.fixed_size_partitioner(2),
    "three": lambda: tf.fixed_size_partitioner(3),
    "seven": lambda: tf.fixed_size_partitioner(7),
    "columns": lambda: tf.fixed_size_partitioner(2, axis=1),
}


def table_variable(partitioner, use_resource, dtype=tf.float32):
    v = tf.get_variable(
        "table",
        [10, 3],
        dtype,
        partitioner=PARTITIONERS[partitioner](),
        use_resource=use_resource,
        initializer=tf.zeros_initializer(),
    )
    return tf.convert_to_tensor(v)


@pytest.mark.parametrize("after", list(PARTITIONERS))
@pytest.mark.parametrize("before", list(PARTITIONERS))
def test_any_partition_into_any_other(before, after, use_resource, path):
    expected = np.arange(30, dtype="f4").reshape(10, 3)
    with tf.Graph().as_default(), tf.Session() as session:
        full = table_variable(before, use_resource)
        assign, placeholder = h5.create_setters()["table:0"]
        session.run(assign, {placeholder: expected})
        assert session.run(full).tolist() == expected.tolist()
        save(session, GraphState(), path)
    assert h5.load_variable(path, "table:0").tolist() == expected.tolist()
    full = table_variable(after, not use_resource)
    state = GraphState()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        restore(session, state, path)
        assert session.run(full).tolist() == expected.tolist()


def test_the_slots_of_a_partitioned_variable(use_resource, path):
    """The slots of Adam are partitioned as their variable is."""

    def model(partitioner):
        full = table_variable(partitioner, use_resource)
        step = tf.train.get_or_create_global_step()
        loss = tf.reduce_sum(tf.square(full - np.arange(30).reshape(10, 3)))
        train_op = tf.train.AdamOptimizer(0.1).minimize(loss, step)
        return train_op, full

    def train(session, n, train_op, full):
        for _ in range(n):
            session.run(train_op)
        return session.run(full)

    with tf.Graph().as_default(), tf.Session() as session:
        nodes = model("three")
        session.run(tf.global_variables_initializer())
        train(session, 3, *nodes)
        save(session, GraphState(), path)
        expected = train(session, 3, *nodes)
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint.shape("table:0") == (10, 3)
        for slot in ("table/Adam:0", "table/Adam_1:0"):
            assert checkpoint.shape(slot) == (10, 3)
    nodes = model("two")
    state = GraphState()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        restore(session, state, path)
        # Vector units round the last elements of a part otherwise than those in the middle.
        np.testing.assert_allclose(train(session, 3, *nodes), expected, rtol=1e-6)


TABLES = {
    "string to int": (
        lambda: lookup_ops.MutableHashTable(tf.string, tf.int64, -1, name="t"),
        ([b"a\0", b"", b"\xff"], [1, 2, 3]),
    ),
    "int to string": (
        lambda: lookup_ops.MutableHashTable(tf.int64, tf.string, b"?", name="t"),
        ([5, 6], [b"a\0", b""]),
    ),
    "int to vector": (
        lambda: lookup_ops.MutableHashTable(tf.int64, tf.float32, [0.0, 0.0], name="t"),
        ([5, -6], [[1.5, 2], [3, 4]]),
    ),
    "dense": (
        lambda: lookup_ops.DenseHashTable(
            tf.int64, tf.int64, default_value=-1, empty_key=0, deleted_key=-9, name="t"
        ),
        ([5, 6, 7], [50, 60, 70]),
    ),
    "dense to vector": (
        lambda: lookup_ops.DenseHashTable(
            tf.int64, tf.float32, default_value=[0.0, 0.0], empty_key=0, deleted_key=-9, name="t"
        ),
        ([5], [[1.5, 2.5]]),
    ),
    "of strings, dense": (
        lambda: lookup_ops.DenseHashTable(
            tf.string, tf.int64, default_value=-1, empty_key=b"", deleted_key=b"\0", name="t"
        ),
        ([b"x", b"y\0"], [1, 2]),
    ),
}


@pytest.mark.parametrize("kind", list(TABLES))
def test_tables(kind, path):
    make, (keys, values) = TABLES[kind]
    table = make()
    keys = tf.constant(keys, table.key_dtype)
    insert = table.insert(keys, tf.constant(values, table.value_dtype))
    remove = table.remove(keys)
    look_up = table.lookup(keys)
    state = GraphState()
    with tf.Session() as session:
        session.run(insert)
        before = session.run(look_up).tolist()
        save(session, state, path)
        session.run(remove)
        assert session.run(look_up).tolist() != before
        restore(session, state, path)
        assert session.run(look_up).tolist() == before == values
    assert {"t-keys", "t-values"} == set(dict(h5.list_variables(path)))


@pytest.mark.parametrize("size", [0, 10000])
def test_a_table_is_replaced_as_a_whole(size, path):
    table = lookup_ops.MutableHashTable(tf.int64, tf.int64, -1)
    keys = tf.placeholder(tf.int64, [None])
    insert = table.insert(keys, 2 * keys)
    state = GraphState()
    with tf.Session() as session:
        session.run(insert, {keys: np.arange(size)})
        save(session, state, path)
        session.run(insert, {keys: np.arange(5, size + 20)})
        restore(session, state, path)
        keys, values = sorted_rows(session, table)
    assert keys == list(range(size)) and values == [2 * k for k in keys]


def test_a_table_that_is_not_to_be_saved():
    lookup_ops.MutableHashTable(tf.int64, tf.int64, -1, checkpoint=False)
    assert not GraphState()._items


def test_several_iterators(path):
    def pipelines():
        data = tf.data.Dataset.range(50)
        yield data.shuffle(20, seed=1).repeat().batch(4).prefetch(2)
        yield data.map(lambda i: tf.strings.as_string(i)).batch(3)
        yield tf.data.Dataset.zip((data, data.shuffle(7, seed=2))).repeat(2)

    iterators = [tf.data.make_initializable_iterator(data) for data in pipelines()]
    elements = [iterator.get_next() for iterator in iterators]
    state = GraphState(iterators=iterators)
    with tf.Session() as session:
        session.run([iterator.initializer for iterator in iterators])
        for n, element in enumerate(elements):
            for _ in range(2 + n):
                session.run(element)
        save(session, state, path)
        expected = [repr(session.run(elements)) for _ in range(5)]
        session.run([iterator.initializer for iterator in iterators])
        restore(session, state, path)
        assert [repr(session.run(elements)) for _ in range(5)] == expected


def test_an_iterator_at_its_end(path):
    iterator = tf.data.make_initializable_iterator(tf.data.Dataset.range(2))
    element = iterator.get_next()
    state = GraphState(iterators=[iterator])
    with tf.Session() as session:
        session.run(iterator.initializer)
        session.run(element), session.run(element)
        with pytest.raises(tf.errors.OutOfRangeError):
            session.run(element)
        save(session, state, path)
        session.run(iterator.initializer)
        restore(session, state, path)
        with pytest.raises(tf.errors.OutOfRangeError):
            session.run(element)


def test_the_state_of_another_pipeline_is_refused_before_anything_is_assigned(path, use_resource):
    def make(data):
        tf.get_variable("w", [], initializer=tf.zeros_initializer(), use_resource=use_resource)
        iterator = tf.data.make_initializable_iterator(data)
        return iterator, GraphState(iterators=[iterator])

    with tf.Graph().as_default(), tf.Session() as session:
        iterator, state = make(tf.data.Dataset.range(5).shuffle(3))
        session.run([iterator.initializer, tf.global_variables()[0].assign(1.0)])
        save(session, state, path)
    iterator, state = make(tf.data.Dataset.from_tensor_slices(np.arange(5.0)).repeat())
    with tf.Session() as session:
        session.run([iterator.initializer, tf.global_variables_initializer()])
        with pytest.raises(h5.CheckpointMismatchError, match="refuses the state of the iterator"):
            restore(session, state, path)
        assert session.run(tf.global_variables()[0]) == 0


OPTIMIZERS = {
    "Adam": lambda: tf.train.AdamOptimizer(0.1),
    "Momentum": lambda: tf.train.MomentumOptimizer(0.1, 0.9, use_nesterov=True),
    "RMSProp": lambda: tf.train.RMSPropOptimizer(0.1, momentum=0.9, centered=True),
    "Adagrad": lambda: tf.train.AdagradOptimizer(0.1),
    "Adadelta": lambda: tf.train.AdadeltaOptimizer(0.1),
    "Ftrl": lambda: tf.train.FtrlOptimizer(0.1),
    "AdagradDA": lambda: tf.train.AdagradDAOptimizer(0.1, tf.train.get_or_create_global_step()),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_slots_of_every_optimizer_and_moving_averages(name, use_resource, path):
    w = tf.get_variable("w", [3], initializer=tf.ones_initializer(), use_resource=use_resource)
    step = tf.train.get_or_create_global_step()
    loss = tf.reduce_sum(tf.square(w - tf.cast(step, tf.float32) - [1.0, 2.0, 3.0]))
    minimize = OPTIMIZERS[name]().minimize(loss, step)
    average = tf.train.ExponentialMovingAverage(0.9, step)
    with tf.control_dependencies([minimize]):
        train_op = average.apply([w])
    state = GraphState()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for _ in range(5):
            session.run(train_op)
        save(session, state, path)

        def train():
            for _ in range(5):
                session.run(train_op)
            return [x.tolist() for x in session.run(tf.global_variables())]

        expected = train()
        session.run(tf.global_variables_initializer())
        restore(session, state, path)
        assert train() == expected
    names = dict(h5.list_variables(path))
    assert {"w:0", "global_step:0", "w/ExponentialMovingAverage:0"} < set(names)
    assert names["w/ExponentialMovingAverage:0"] == (3,)


def test_a_random_generator_goes_on_where_it_was(path):
    """Its state is a global variable like any other, in all versions of TensorFlow."""
    module = tf.random.experimental
    generator_class = module.Generator if hasattr(module, "Generator") else tf.random.Generator
    # Version 1.15 knows the algorithm only by its number.
    algorithm = 1 if tf.VERSION.startswith("1.") else "philox"
    generator = generator_class.from_seed(5, alg=algorithm)
    numbers = generator.normal([3])
    state = GraphState()
    assert generator.state in tf.global_variables()
    assert list(state._items) == [generator.state.name]
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        session.run(numbers)
        save(session, state, path)
        expected = [session.run(numbers).tolist() for _ in range(3)]
        session.run(tf.global_variables_initializer())
        restore(session, state, path)
        assert [session.run(numbers).tolist() for _ in range(3)] == expected


def test_everything_at_once_with_the_hook(use_resource, tmp_path):
    """One graph with all of it, interrupted and resumed."""

    def run(folder, last_step):
        with tf.Graph().as_default():
            tf.set_random_seed(1)
            step = tf.train.get_or_create_global_step()
            data = tf.data.Dataset.range(40).shuffle(10, seed=1).repeat().batch(4)
            iterator = tf.data.make_initializable_iterator(data)
            tf.add_to_collection(tf.GraphKeys.TABLE_INITIALIZERS, iterator.initializer)
            ids = iterator.get_next()
            counts = lookup_ops.MutableHashTable(tf.int64, tf.int64, 0)
            dense = lookup_ops.DenseHashTable(
                tf.int64, tf.int64, default_value=0, empty_key=-1, deleted_key=-2
            )
            count = tf.group(
                counts.insert(ids, counts.lookup(ids) + 1), dense.insert(ids, dense.lookup(ids) + 2)
            )
            with tf.variable_scope("net", use_resource=use_resource):
                parts = tf.get_variable("e", [40, 2], partitioner=tf.fixed_size_partitioner(3))
                word = tf.get_variable("word", initializer=tf.constant([b"\0", b"\xff"]),
                                       trainable=False)  # fmt: skip
                flag = tf.get_variable("flag", initializer=tf.constant(True), trainable=False)
            used = tf.nn.embedding_lookup(parts, ids, partition_strategy="div")
            loss = tf.reduce_sum(tf.square(used - 1)) + tf.cast(flag, tf.float32)
            train_op = tf.train.AdamOptimizer(0.1).minimize(loss, step)
            hooks = [
                h5.H5CheckpointHook(folder, save_steps=4, iterators=[iterator]),
                tf.train.StopAtStepHook(last_step=last_step),
            ]
            seen = []
            with tf.train.MonitoredTrainingSession(hooks=hooks) as session:
                while not session.should_stop():
                    seen.append(session.run([ids, loss, word, train_op, count])[:3])
            return [(i.tolist(), float(x), w.tolist()) for i, x, w in seen]

    def final(folder):
        with h5.load_checkpoint(folder) as checkpoint:
            values = dict(checkpoint)
        for name in [name for name in values if name.endswith("-keys")]:
            order = np.argsort(values[name])
            for part in (name, name[: -len("keys")] + "values"):
                values[part] = values[part][order]
        return {n: v.tolist() for n, v in values.items() if not n.startswith("Iterator")}

    whole = run(tmp_path / "whole", 15)
    assert run(tmp_path / "parts", 6) + run(tmp_path / "parts", 15) == whole
    assert final(tmp_path / "parts") == final(tmp_path / "whole")
