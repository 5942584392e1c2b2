"""Every dtype that a variable can have: through a file, a session, and h5dump."""

import os
import shutil
import subprocess

import h5py
import numpy as np
import pytest

import tf_h5_callback as h5
from tf_h5_callback._compat import extension_dtype
from tf_h5_callback.errors import CheckpointCorruptError
from tf_h5_callback.file import dtypes
from tf_h5_callback.file.writer import write_checkpoint
from tf_h5_callback.saving.save import Save

needs_hdf5_tools = pytest.mark.skipif(
    shutil.which("h5dump") is None, reason="needs h5dump (Debian: hdf5-tools)"
)
large = pytest.mark.skipif(
    "TF_H5_LARGE_TESTS" not in os.environ, reason="needs 10 GB of memory and 3 GB of disk"
)

NUMPY = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
    "float16 float32 float64 complex64 complex128"
).split()
QUANTISED = {"qint8": "i1", "quint8": "u1", "qint16": "<i2", "quint16": "<u2", "qint32": "<i4"}
SHORT = (
    "bfloat16 float8_e5m2 float8_e4m3fn float8_e4m3b11fnuz float8_e4m3fnuz float8_e5m2fnuz "
    "float4_e2m1fn int2 int4 uint2 uint4"
).split()

# The dtype -> what h5dump says of the type, and of the numbers of `numbers`.
SIGNED, UNSIGNED = "-2, 1, 0, 1", "2, 1, 0, 1"
H5DUMP = {
    "bool": ("H5T_ENUM", "TRUE, TRUE, FALSE, TRUE"),
    "float16": ("H5T_IEEE_F16LE|16-bit little-endian floating-point", SIGNED),
    "float32": ("H5T_IEEE_F32LE", SIGNED),
    "float64": ("H5T_IEEE_F64LE", SIGNED),
    "bfloat16": ("16-bit little-endian floating-point|H5T_FLOAT_BFLOAT16LE", SIGNED),
    "float8_e5m2": (
        "8-bit little-endian floating-point|8-bit floating-point|H5T_FLOAT_F8E5M2",
        SIGNED,
    ),
    "complex64": ("H5T_IEEE_F32LE", "-2"),
    "complex128": ("H5T_IEEE_F64LE", "-2"),
    **{"int" + n: ("H5T_STD_I{}LE".format(n), SIGNED) for n in ("8", "16", "32", "64")},
    **{"uint" + n: ("H5T_STD_U{}LE".format(n), UNSIGNED) for n in ("8", "16", "32", "64")},
    **{"qint" + n: ("H5T_STD_I{}LE".format(n), SIGNED) for n in ("8", "16", "32")},
    **{"quint" + n: ("H5T_STD_U{}LE".format(n), UNSIGNED) for n in ("8", "16")},
    "int2": ("H5T_STD_I8LE", SIGNED),
    "int4": ("H5T_STD_I8LE", SIGNED),
    "uint2": ("H5T_STD_U8LE", UNSIGNED),
    "uint4": ("H5T_STD_U8LE", UNSIGNED),
}


def numbers(name):
    """-2 or 2, 1, 0, 1 as a dtype has them, or a skip."""
    values = np.array([2 if name.startswith(("u", "qu")) else -2, 1, 0, 1])
    if name in QUANTISED:
        return values.astype(QUANTISED[name]).view([(name, QUANTISED[name])])
    dtype = np.dtype(name) if name in NUMPY else extension_dtype(name)
    if dtype is None:
        pytest.skip("no package here has " + name)
    return values.astype("i1" if "int" in name else "f4").astype(dtype)


def shaped(values, shape):
    """As many of the values as the shape has room for. (NumPy's resize knows no scalars.)"""
    return values[: int(np.prod(shape))].reshape(shape)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.ckpt-0.h5")


@pytest.mark.parametrize("name", NUMPY + list(QUANTISED) + SHORT)
@pytest.mark.parametrize("shape", [(4,), (), (0, 3), (2, 1, 1, 1, 1, 1, 1, 2)], ids=str)
def test_through_a_file(name, shape, path):
    value = shaped(numbers(name), shape)
    before = value.tobytes()
    write_checkpoint(path, {"v:0": value})
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint.dtype("v:0") == name
        assert checkpoint.shape("v:0") == shape
        back = checkpoint["v:0"]
    assert back.dtype == value.dtype and back.shape == shape
    assert back.tobytes() == value.tobytes() == before


@pytest.mark.parametrize("name", SHORT)
def test_every_bit_pattern_through_a_file(name, path):
    dtype = extension_dtype(name)
    if dtype is None:
        pytest.skip("no package here has " + name)
    bits = int(name[-1]) if "int" in name else 4 if name.startswith("float4") else 0
    patterns = np.arange(1 << (bits or 8 * dtype.itemsize))
    value = patterns.astype("u{}".format(dtype.itemsize)).view(dtype)
    write_checkpoint(path, {"v:0": value})
    back = h5.load_variable(path, "v:0")
    assert back.dtype == dtype
    mask = (1 << bits) - 1 if bits else 0xFF  # what is above belongs to no number
    assert (back.view("u1") & mask).tolist() == (value.view("u1") & mask).tolist()


@needs_hdf5_tools
@pytest.mark.parametrize("name", list(H5DUMP))
def test_h5dump_shows_the_numbers(name, path):
    value = numbers(name)
    write_checkpoint(path, {"v:0": value})
    text = subprocess.check_output(["h5dump", "-d", "v:0", path]).decode()
    types, shown = H5DUMP[name]
    assert any(t in text for t in types.split("|"))
    assert shown in " ".join(text.split())


@pytest.mark.parametrize(
    "name, stored",
    [("float8_e4m3fn", [0xC0, 0x38, 0, 0x38]), ("int4", [-2, 1, 0, 1]), ("uint4", [2, 1, 0, 1])],
)
def test_without_a_package_that_has_the_dtype(name, stored, path, monkeypatch):
    write_checkpoint(path, {"v:0": numbers(name)})
    monkeypatch.setattr(dtypes, "extension_dtype", lambda name: None)
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint.dtype("v:0") == name  # no graph can take it for an int8
        assert checkpoint["v:0"].dtype == ("i1" if name == "int4" else "u1")
        assert checkpoint["v:0"].tolist() == stored
        checkpoint.verify()


def test_the_name_of_the_dtype_is_kept_in_the_file(path):
    write_checkpoint(path, {"a/q:0": numbers("quint8"), "w:0": np.ones(1)})
    with h5py.File(path, "r") as f:
        assert bytes(f.attrs["encoding"]) == b'{"dtypes": {"a q:0": "quint8"}}'


@pytest.mark.parametrize("name", ["qint8", "float32", "nonsense", "", 3, ["qint8"]])
def test_a_name_that_does_not_fit_the_dataset_is_damage(name, path, monkeypatch):
    monkeypatch.setattr(dtypes, "store_numbers", lambda values: (values, name))
    write_checkpoint(path, {"v:0": np.arange(3, dtype="u1")})
    with pytest.raises(CheckpointCorruptError, match="'v:0'"):
        h5.load_checkpoint(path)


STRINGS = {
    "none": np.zeros((0,), object),
    "empty": np.array([b"", b""], object),
    "NUL": np.array([b"a\0b", b"\0", b"ends\0\0"], object),
    "not UTF-8": np.array([[b"\xff\xfe"], [b"\x80"]], object),
    "scalar": np.array(b"one\0", object),
    "rank 8": np.full((1, 2, 1, 1, 1, 1, 1, 2), b"x\0", object),
    "no elements": np.zeros((2, 0, 3), object),
    "long": np.array([b"x" * 100000, b"\0"], object),
    "one long": np.array([[b"x" * 1000000, b"", b"\0y\0"], [b"a", b"", b""]], object),
}


@pytest.mark.parametrize("kind", list(STRINGS))
def test_strings_through_a_file(kind, path):
    value = STRINGS[kind]
    write_checkpoint(path, {"v:0": value})
    with h5.load_checkpoint(path) as checkpoint:
        assert (checkpoint.dtype("v:0"), checkpoint.shape("v:0")) == ("string", value.shape)
        back = checkpoint["v:0"]
    assert back.dtype == object and back.shape == value.shape
    assert back.tolist() == value.tolist()


def test_one_long_string_among_a_million_short_ones(path):
    value = np.array([b"%d" % i for i in range(1000000)], object)
    value[500000] = b"y" * (10 << 20)  # padded, this would be 10 TB
    write_checkpoint(path, {"v:0": value.reshape(1000, 1000)})
    assert os.path.getsize(path) < 40 << 20
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint.shape("v:0") == (1000, 1000)
        assert checkpoint.dtype("v:0") == "string"
        assert checkpoint["v:0"].reshape(-1).tolist() == value.tolist()


@pytest.mark.parametrize(
    "lengths, shape",
    [
        ([1, 2, 3], [3]),
        ([9, 1], [2]),
        ([-1, 4], [2]),
        ([1, 2], [3]),
        ([1, 2], [-1, -2]),
        ([1, 2], [2, 1.0]),
        ([1, 2], "ab"),
        ([1, "2"], [2]),
        (None, [2]),
    ],
)
def test_joined_strings_that_do_not_fit_are_damage(lengths, shape, path, monkeypatch):
    stored = dtypes.StoredStrings(np.arange(3, dtype="u1"), lengths, shape)
    monkeypatch.setattr(dtypes, "store_strings", lambda values: stored)
    write_checkpoint(path, {"v:0": np.array([b""], object)})
    with pytest.raises(CheckpointCorruptError):
        with h5.load_checkpoint(path) as checkpoint:
            checkpoint["v:0"]


def variables_can_have(tf, name):
    """Whether this TensorFlow has an assignment for resource variables of a dtype."""
    with tf.Graph().as_default(), tf.Session() as session:
        v = tf.Variable(tf.placeholder(name, []), use_resource=True, dtype=name)
        value = np.zeros((), tf.as_dtype(name).as_numpy_dtype)
        try:
            session.run(v.initializer, {v.initializer.inputs[1]: value})
        except (tf.errors.InvalidArgumentError, tf.errors.NotFoundError):
            return False
    return True


def round_trip(tf, path, value, dtype, use_resource, shape="static"):
    """Saves and restores a variable; returns what was in it before and after."""
    with tf.Graph().as_default():
        static = value.shape if shape == "static" else None
        initial = tf.placeholder(dtype, static)
        v = tf.Variable(initial, False, validate_shape=static is not None, name="v", dtype=dtype,
                        use_resource=use_resource)  # fmt: skip
        setters = h5.create_setters([v])
        other = np.zeros_like(value) if value.dtype != object else np.full(value.shape, b"?", "O")

        def state(session):
            now = session.run(v)
            return np.array(now, object) if isinstance(now, bytes) else np.asarray(now)

        with tf.Session() as session:
            session.run(v.initializer, {initial: value})
            before = state(session)
            h5.save_variables(session, path, [v])
            session.run(v.initializer, {initial: other})
            if value.size:
                assert state(session).tolist() != before.tolist()
            h5.restore_variables(session, path, setters)
            after = state(session)
    return before, after


@pytest.mark.parametrize("name", NUMPY + list(QUANTISED) + SHORT)
@pytest.mark.parametrize("shape", [(4,), (), (0, 3), (2, 1, 1, 1, 1, 1, 1, 2)], ids=str)
def test_through_a_session(name, shape, use_resource, path):
    tf = pytest.importorskip("tensorflow.compat.v1")
    try:
        dtype = tf.as_dtype(name)
        value = np.zeros(shape, dtype.as_numpy_dtype)
    except (TypeError, KeyError):
        pytest.skip("TensorFlow {} has no {}".format(tf.VERSION, name))
    value[...] = shaped(numbers(name), shape)
    try:
        before, after = round_trip(tf, path, value, dtype, use_resource)
    except (tf.errors.InvalidArgumentError, tf.errors.NotFoundError) as error:
        assert "OpKernel" in str(error) and "Assign" in str(error)
        pytest.skip("TensorFlow {} cannot assign {}".format(tf.VERSION, name))
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint.dtype("v:0") == name
        assert checkpoint["v:0"].tobytes() == value.tobytes()
    assert after.dtype == before.dtype and after.tobytes() == before.tobytes() == value.tobytes()


def test_which_dtypes_variables_have():
    """So that the skips above hide nothing."""
    tf = pytest.importorskip("tensorflow.compat.v1")
    new = tf.VERSION.startswith("2.")
    expected = set(NUMPY) | {"bfloat16", "qint8", "quint8", "qint32"}
    expected |= {"float8_e5m2", "float8_e4m3fn", "int4", "uint4"} if new else {"qint16", "quint16"}
    for name in expected:
        assert variables_can_have(tf, name), name


@pytest.mark.parametrize("kind", list(STRINGS))
def test_strings_through_a_session(kind, use_resource, path):
    tf = pytest.importorskip("tensorflow.compat.v1")
    before, after = round_trip(tf, path, STRINGS[kind], tf.string, use_resource)
    assert after.shape == before.shape == STRINGS[kind].shape
    assert after.tolist() == before.tolist() == STRINGS[kind].tolist()


@pytest.mark.parametrize("name", ["float32", "int64", "string"])
@pytest.mark.parametrize("shape", [(4,), (), (0, 3), (2, 2)], ids=str)
def test_unknown_static_shape(name, shape, use_resource, path):
    tf = pytest.importorskip("tensorflow.compat.v1")
    value = np.full(shape, b"x\0", "O") if name == "string" else np.ones(shape, name)
    before, after = round_trip(tf, path, value, tf.as_dtype(name), use_resource, shape="unknown")
    assert after.shape == before.shape == shape and after.tolist() == before.tolist()


@large
def test_a_variable_of_more_than_2_gigabytes(use_resource, path):
    tf = pytest.importorskip("tensorflow.compat.v1")
    n = (2 << 30) // 4 + 12345
    with tf.Graph().as_default():
        # Fed, so that TensorFlow does not fold anything this large into the graph.
        length = tf.placeholder_with_default(n, [])
        numbers = tf.ensure_shape(tf.range(length), [n])
        v = tf.Variable(numbers, name="v", use_resource=use_resource)
        fill = v.initializer
        clear = v.assign(-numbers, read_value=False)
        right = tf.reduce_all(tf.equal(v, numbers))
        setters = h5.create_setters([v])
        from tf_h5_callback.graph.state import GraphState

        state = GraphState([v])
        state.add_copies()
        with tf.Session() as session:
            session.run(fill)
            h5.save_variables(session, path, [v])
            session.run(clear)
            assert not session.run(right)
            h5.restore_variables(session, path, setters)
            assert session.run(right)
            tensors, _ = state.snapshot(session, Save())
            assert np.array_equal(tensors["v:0"], np.arange(n, dtype=tensors["v:0"].dtype))
    assert os.path.getsize(path) > 2 << 30
