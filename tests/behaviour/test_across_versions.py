"""A run may go on under another TensorFlow. The files of ``data/`` were written by several.

``data/make.py`` makes them and has the graph; see there.
"""

import importlib.util
import pathlib

import numpy as np
import pytest

import tf_h5_callback as h5

DATA = pathlib.Path(__file__).parents[1] / "data"
FILES = sorted(DATA.glob("tensorflow-*.h5"))
LAST = 12

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_the_files_are_there():
    assert [path.stem.split("-")[1].split(".")[0] for path in FILES] == ["1", "2", "2"]
    assert all(path.stat().st_size < 20000 for path in FILES)


@every_file
def test_a_file_is_read_for_ever(path):
    with h5.load_checkpoint(path) as checkpoint:
        checkpoint.verify()
        assert checkpoint.format_version == 1
        assert checkpoint.step == 6
        assert checkpoint.metadata == {"made_by": "make.py"}
        assert path.name == "tensorflow-{}.h5".format(checkpoint.tensorflow_version)
        assert checkpoint.written_at.year == 2026
        values = checkpoint.read_all()
        found = {name: (checkpoint.dtype(name), checkpoint.shape(name)) for name in checkpoint}
    assert len(found) == 20 and found["IteratorV2:0"] == ("string", ())
    assert found["net/w/Momentum:0"] == ("float32", (4, 3))
    names = "bool int8 int32 int64 uint8 uint16 float16 float64 complex64 bfloat16 qint8 quint8"
    for name in names.split():
        assert found["net/a_{}:0".format(name)] == (name, (3,))
        value = values["net/a_{}:0".format(name)]
        if value.dtype.names:
            value = value[name]
        assert (value.real if value.dtype.kind == "c" else value).astype("i4").tolist() == [1, 0, 1]
    assert values["net/words:0"].tolist() == [b"ends in NUL\0", b"", b"\xff"]
    assert dict(zip(values["table-keys"], values["table-values"])) == {
        b"ends in NUL\0": 1,
        b"": 2,
        b"\xff": 3,
    }
    assert values["global_step:0"] == 6
    assert values["net/w:0"][0].tolist() == [-0.111572265625, 1.0, 2.111572265625]


def read(path):
    with h5.load_checkpoint(path) as checkpoint:
        return checkpoint.read_all()


def test_the_files_differ_only_in_the_state_of_the_iterator():
    first, *others = map(read, FILES)
    for other in others:
        assert list(other) == list(first)
        for name in set(first) - {"IteratorV2:0", "table-keys", "table-values"}:
            assert np.asarray(other[name]).tolist() == np.asarray(first[name]).tolist(), name


def make():
    """The module ``data/make.py``."""
    tf = pytest.importorskip("tensorflow.compat.v1")
    # As tf.disable_v2_behavior() does: the moving averages of the newest TensorFlow cannot
    # initialise themselves from ref variables inside the control flow of version 2.
    tf.disable_control_flow_v2()
    spec = importlib.util.spec_from_file_location("make", str(DATA / "make.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tf, module.Run


def final(folder):
    with h5.load_checkpoint(folder) as checkpoint:
        assert checkpoint.step == LAST
        values = {n: v for n, v in checkpoint.items() if not n.startswith("Iterator")}
    values["table"] = sorted(zip(values.pop("table-keys"), values.pop("table-values")))
    return {name: np.asarray(value).tolist() for name, value in values.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses and the final state of an uninterrupted run with this TensorFlow."""
    tf, run = make()
    folder = str(tmp_path_factory.mktemp("whole"))
    with tf.Graph().as_default():
        losses = run(folder, iterators=False).train(LAST)
    return losses, final(folder)


@every_file
@pytest.mark.parametrize("use_resource", [False, True], ids=["ref", "resource"])
@pytest.mark.parametrize("partitions", [2, 3])
def test_a_run_goes_on_under_another_tensorflow(path, use_resource, partitions, whole, tmp_path):
    tf, run = make()
    with tf.Graph().as_default():
        losses = run(
            str(tmp_path),
            use_resource,
            partitions,
            iterators=False,
            restore=h5.Restore(path, strict=False),  # without the iterator
        ).train(LAST)
    assert losses == whole[0][6:]
    assert final(tmp_path) == whole[1]


@every_file
def test_the_state_of_iterators(path, tmp_path):
    """Versions 2 understand each other's; that of version 1 would abort the process."""
    tf, run = make()
    with h5.load_checkpoint(path) as checkpoint:
        same = checkpoint.tensorflow_version[0] == tf.VERSION[0]
    with tf.Graph().as_default():
        resumed = run(str(tmp_path), restore=h5.Restore(path))
        if not same:
            with pytest.raises(h5.CheckpointMismatchError) as error:
                resumed.train(LAST)
            for part in (tf.VERSION, "IteratorV2:0", "nothing was restored", "strict=False"):
                assert part in str(error.value)
            return
        with tf.train.MonitoredTrainingSession(hooks=[resumed.hook]) as session:
            batch = session.run(resumed.batch).tolist()
    with tf.Graph().as_default(), tf.Session() as session:
        data = tf.data.Dataset.range(100).shuffle(30, seed=3).repeat().batch(4)
        element = tf.data.make_one_shot_iterator(data).get_next()
        assert [session.run(element).tolist() for _ in range(7)][6] == batch


@every_file
def test_nothing_is_assigned_where_an_iterator_is_refused(path):
    tf, _ = make()
    from tf_h5_callback.graph.state import GraphState

    with h5.load_checkpoint(path) as checkpoint:
        if checkpoint.tensorflow_version[0] == tf.VERSION[0]:
            pytest.skip("it is not refused")
        values = checkpoint.read_all(["net/words:0", "IteratorV2:0"])
    with tf.Graph().as_default(), tf.Session() as session:
        data = tf.data.Dataset.range(100).shuffle(30, seed=3).repeat().batch(4)
        iterator = tf.data.make_initializable_iterator(data)
        words = tf.get_variable("net/words", initializer=tf.constant([b"1", b"2", b"3"]))
        state = GraphState([words], [iterator])
        session.run([iterator.initializer, words.initializer])
        with pytest.raises(h5.CheckpointMismatchError):
            state.assign(session, values)
        assert session.run(words).tolist() == [b"1", b"2", b"3"]
