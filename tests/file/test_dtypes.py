import h5py
import numpy as np
import pytest

from tf_h5_callback._compat import extension_dtype
from tf_h5_callback.file import dtypes

NATIVE = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
    "float16 float32 float64 complex64 complex128"
).split()


@pytest.mark.parametrize("name", NATIVE)
def test_native_types_keep_their_name(name):
    dtype, meaning = dtypes.numpy_type(dtypes.h5_type(np.dtype(name)))
    assert dtype == np.dtype(name).newbyteorder("<")
    assert meaning == name


@pytest.mark.parametrize("name, size", [("bfloat16", 2), ("float8_e5m2", 1)])
def test_short_floats_without_a_package_that_has_them(name, size, monkeypatch):
    monkeypatch.setattr(dtypes, "extension_dtype", lambda name: None)
    short = type("Short", (), {"name": name})
    type_id = dtypes.h5_type(short)
    assert type_id.get_class() == h5py.h5t.FLOAT and type_id.get_size() == size
    assert dtypes.numpy_type(type_id) == (np.dtype("<u{}".format(size)), name)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e5m2"])
def test_widening_is_exact_for_every_bit_pattern(name):
    dtype = extension_dtype(name)
    if dtype is None:
        pytest.skip("no package here has " + name)
    unsigned = np.dtype("u{}".format(dtype.itemsize))
    patterns = np.arange(1 << (8 * dtype.itemsize)).astype(unsigned)
    wide = dtypes.widen(patterns, name)
    assert wide.dtype == {"bfloat16": np.float32, "float8_e5m2": np.float16}[name]
    np.testing.assert_array_equal(wide, patterns.view(dtype).astype(wide.dtype))


def test_bfloat16_values_spelled_out():
    raw = np.array([0x3F80, 0xC010, 0x7F80, 0x0000], np.uint16)
    assert dtypes.widen(raw, "bfloat16").tolist() == [1.0, -2.25, np.inf, 0.0]


def test_other_types_are_not_widened():
    values = np.arange(3, dtype=np.uint16)
    assert dtypes.widen(values, "uint16") is values


@pytest.mark.parametrize("dtype", ["datetime64[s]", "U3", [("a", "i4")]])
def test_types_hdf5_has_no_place_for(dtype):
    with pytest.raises(TypeError, match="no HDF5 datatype"):
        dtypes.h5_type(np.dtype(dtype))


@pytest.mark.parametrize(
    "strings",
    [
        [],
        [b""],
        [b"", b"a", b"longer"],
        [b"\0"],
        [b"a\0b", b"\xff\xfe"],
        [b"ends in NUL\0", b"\0\0", b""],
        [b"x" * 5000],
    ],
)
def test_strings_come_back(strings):
    values = np.array(strings + [None], dtype=object)[:-1]
    stored = dtypes.store_strings(values)
    assert stored.values.dtype.kind == "S"
    back = dtypes.load_strings(stored)
    assert back.dtype == object and back.tolist() == strings


@pytest.mark.parametrize("shape", [(), (1, 1), (2, 0), (2, 1, 2)])
def test_strings_of_any_shape(shape):
    values = np.full(shape, b"\0s\0", dtype=object)
    stored = dtypes.store_strings(values)
    back = dtypes.load_strings(stored)
    assert stored.values.shape == back.shape == shape
    assert back.tolist() == values.tolist()


def test_lengths_are_kept_only_where_padding_loses_them():
    assert dtypes.store_strings(np.array([b"a\0b"], object)).lengths is None
    assert dtypes.store_strings(np.array([b"a\0"], object)).lengths == [2]


def test_text_becomes_utf8():
    assert dtypes.store_strings(np.array(["h\u00e9"], object)).values.tolist() == [b"h\xc3\xa9"]


def test_a_size_that_varies_a_little_keeps_the_type():
    sizes = {
        dtypes.store_strings(np.array(b"x" * n, object)).values.dtype for n in range(9000, 9200)
    }
    assert len(sizes) == 1


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="only byte strings, not 3"):
        dtypes.store_strings(np.array([b"a", 3], object))


@pytest.mark.parametrize("lengths", [[1], [1, 99], [-1, 0]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match="do not fit"):
        dtypes.load_strings(dtypes.StoredStrings(np.array([b"a", b"b"]), lengths))
