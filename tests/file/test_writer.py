import datetime
import errno
import json
import os
import re
import shutil
import subprocess
import zlib

import h5py
import numpy as np
import pytest

import tf_h5_callback as h5
from tf_h5_callback._compat import extension_dtype
from tf_h5_callback.file import output as block_output
from tf_h5_callback.file import reader as checkpoint_reader
from tf_h5_callback.file.format import ATTRIBUTES, Monitored, dataset_name
from tf_h5_callback.file.writer import write_checkpoint

needs_hdf5_tools = pytest.mark.skipif(
    shutil.which("h5dump") is None, reason="needs h5dump (Debian: hdf5-tools)"
)

STRINGS = np.array([[b"x", b"", b"ends in NUL\0"], [b"\0", b"\xff\0z", b"y"]], dtype=object)
TENSORS = {
    "rnn/cell/kernel:0": np.arange(12, dtype="f4").reshape(3, 4),
    "global_step:0": np.array(7, "i8"),
    "empty:0": np.zeros((0, 3), "f8"),
    "flags:0": np.array([True, False]),
    "complex:0": np.array([1 + 2j, -3.5j], "c16"),
    "half:0": np.array([[[1.5]]], "f2"),
    "tiny:0": np.array([-128, 127], "i1"),
    "large:0": np.arange(200000, dtype="f4"),
    "table-keys": STRINGS,
    "iterator": np.array(b"\x08\x01\0state\0", dtype=object),
}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.ckpt-7.h5")


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        got = actual[name]
        assert got.shape == value.shape and got.dtype == value.dtype, name
        assert got.tolist() == value.tolist(), name


def test_everything_comes_back(path):
    write_checkpoint(
        path, TENSORS, global_step=7, tensorflow_version="1.15.5", metadata={"commit": "abc"}
    )
    with h5.load_checkpoint(path) as checkpoint:
        assert_same(checkpoint, TENSORS)
        assert_same(checkpoint.read_all(), TENSORS)
        assert checkpoint.path == path
        assert checkpoint.step == 7
        assert checkpoint.metadata == {"commit": "abc"}
        assert checkpoint.tensorflow_version == "1.15.5"
        assert checkpoint.format_version == 1
        age = datetime.datetime.now(datetime.timezone.utc) - checkpoint.written_at
        assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)
        assert checkpoint.shape("rnn/cell/kernel:0") == (3, 4)
        assert checkpoint.dtype("rnn/cell/kernel:0") == "float32"
        assert checkpoint.dtype("table-keys") == "string"
        checkpoint.verify()


def test_what_is_not_given_is_none(path):
    write_checkpoint(path, {"w:0": np.ones(1)})
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint.step is None
        assert checkpoint.tensorflow_version is None
        assert checkpoint.metadata == {}


def test_no_tensors_at_all(path):
    write_checkpoint(path, {}, global_step=0)
    with h5.load_checkpoint(path) as checkpoint:
        assert len(checkpoint) == 0 and checkpoint.step == 0


def test_the_callers_arrays_are_not_touched(path):
    tensors = {"w": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "b": np.arange(3, dtype=">i4")}
    copies = {name: value.copy() for name, value in tensors.items()}
    write_checkpoint(path, tensors)
    with h5.load_checkpoint(path) as checkpoint:
        for name, value in tensors.items():
            np.testing.assert_array_equal(checkpoint[name], value)
            np.testing.assert_array_equal(value, copies[name])
    assert tensors["b"].dtype == ">i4" and tensors["w"].flags.f_contiguous


def test_arrays_are_aligned_for_tensorflow(path):
    write_checkpoint(path, TENSORS)
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint["large:0"].ctypes.data % 64 == 0


@pytest.mark.parametrize("name", ["bfloat16", "float8_e5m2"])
def test_short_floats(name, path, monkeypatch):
    dtype = extension_dtype(name)
    if dtype is None:
        pytest.skip("no package here has " + name)
    value = np.array([1.0, -2.25, 0.0], "f4").astype(dtype)
    write_checkpoint(path, {"w:0": value})
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint.dtype("w:0") == name
        assert checkpoint["w:0"].dtype == dtype
        assert checkpoint["w:0"].tobytes() == value.tobytes()
    monkeypatch.setattr("tf_h5_callback.file.dtypes.extension_dtype", lambda name: None)
    with h5.load_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint["w:0"], value.astype("f4"))
        checkpoint.verify()


@pytest.mark.parametrize(
    "name, key",
    [
        ("rnn/cell/kernel:0", "rnn cell kernel:0"),
        ("w:0", "w:0"),
        ("a//b", "a  b"),
        ("../x", ".. x"),
        ("h\u00e9", "h\u00e9"),
        ("my layer/w:0", "%my%20layer w:0"),
        ("50%", "%50%25"),
        (".", "%."),
        ("", "%"),
        ("a\0b", "%a%00b"),
    ],
)
def test_names(name, key, path):
    assert dataset_name(name) == key
    write_checkpoint(path, {name: np.arange(3), "other:0": np.zeros(2)})
    with h5py.File(path, "r") as f:
        assert set(f) == {key, "other:0"}
    with h5.load_checkpoint(path) as checkpoint:
        assert sorted(checkpoint) == sorted([name, "other:0"])
        assert checkpoint[name].tolist() == [0, 1, 2]


def test_names_that_hdf5_alone_would_confuse(path):
    names = ["a/b", "a b", "a//b", "a  b", "%a%20b", ".", "", "a/", "a "]
    write_checkpoint(path, {name: np.array(i) for i, name in enumerate(names)})
    with h5.load_checkpoint(path) as checkpoint:
        assert {name: int(checkpoint[name]) for name in checkpoint} == {
            name: i for i, name in enumerate(names)
        }


def test_ten_thousand_tensors(path):
    tensors = {"layer_{}/w:0".format(i): np.full(3, i, "f4") for i in range(10000)}
    write_checkpoint(path, tensors)
    with h5.load_checkpoint(path) as checkpoint:
        values = checkpoint.read_all()
    assert len(values) == 10000
    assert all((values[name] == tensors[name]).all() for name in tensors)


def test_the_loop_of_the_post_reads_our_file(path):
    numbers = {name: value for name, value in TENSORS.items() if value.dtype != object}
    write_checkpoint(path, numbers, global_step=7)
    with h5py.File(path, "r") as f:
        loaded = {name.replace(" ", "/"): value[()] for name, value in f.items()}
    assert_same({name: np.asarray(value) for name, value in loaded.items()}, numbers)


def test_we_read_the_file_of_the_loop_of_the_post(path):
    with h5py.File(path, "w") as f:
        for name, value in TENSORS.items():
            if value.dtype != object:
                f.create_dataset(name.replace("/", " "), data=value)
        f.create_dataset("note:0", data="t\u00e9xt")
        f.attrs["tensorflow_version"] = np.bytes_("1.8.0")
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint["note:0"].tolist() == "t\u00e9xt".encode()
        for name, value in TENSORS.items():
            if value.dtype != object:
                np.testing.assert_array_equal(checkpoint[name], value)
        assert checkpoint.step is None and checkpoint.format_version is None
        assert checkpoint.tensorflow_version == "1.8.0"
        checkpoint.verify()


def test_a_file_of_a_big_endian_machine(path):
    with h5py.File(path, "w") as f:
        f["w"] = np.arange(3, dtype=">f4")
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint["w"].dtype.isnative
        assert checkpoint["w"].tolist() == [0, 1, 2]


def test_a_compact_dataset_of_another_program(path):
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.COMPACT)
    with h5py.File(path, "w") as f:
        space = h5py.h5s.create_simple((3,))
        dataset = h5py.h5d.create(f.id, b"w", h5py.h5t.STD_I32LE, space, creation)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array([4, 5, 6], "i4"))
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint["w"].tolist() == [4, 5, 6]


@needs_hdf5_tools
def test_h5dump_prints_the_numbers(path):
    write_checkpoint(path, TENSORS, global_step=7, metadata={"a": 1})

    def h5dump(*args):
        return subprocess.run(
            ["h5dump", *args, path], check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    text = h5dump("-d", "rnn cell kernel:0")
    assert "H5T_IEEE_F32LE" in text and "( 3, 4 )" in text
    numbers = re.findall(r"\(\d,\d\): (.*?),?\n", text)
    assert [float(n) for row in numbers for n in row.split(",")] == list(range(12))
    assert re.search(r"\(0\): 7\b", h5dump("-a", "global_step"))
    assert '{"a": 1}' in h5dump("-a", "metadata").replace('\\"', '"')
    assert "TRUE, FALSE" in h5dump("-d", "flags:0")


@needs_hdf5_tools
def test_h5dump_shows_bfloat16_as_numbers(path):
    dtype = extension_dtype("bfloat16")
    if dtype is None:
        pytest.skip("no package here has bfloat16")
    write_checkpoint(path, {"w:0": np.array([1.5, -2.25, 0.0078125]).astype(dtype)})
    text = subprocess.run(
        ["h5dump", "-d", "w:0", path], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert "(0): 1.5, -2.25, 0.0078125" in text


@needs_hdf5_tools
def test_h5ls_lists_the_tensors(path):
    write_checkpoint(path, TENSORS)
    text = subprocess.run(["h5ls", path], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert re.search(r"rnn\\ cell\\ kernel:0 +Dataset \{3, 4\}", text)
    assert len(text.splitlines()) == len(TENSORS)


@needs_hdf5_tools
def test_a_reader_made_of_h5dump_and_the_specification(path, tmp_path):
    """Shares no code with ours: what docs/format.rst says is enough to read and verify a file."""
    write_checkpoint(path, TENSORS, global_step=7)

    def h5dump(*args):
        return subprocess.run(
            ["h5dump", *args, path], check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    listing = re.findall(r"^ dataset +/(.*)$", h5dump("-n"), re.MULTILINE)
    assert len(listing) == len(TENSORS)
    data = h5dump("-a", "crc32").split("DATA {")[1].split("}")[0]
    crcs = [int(n) for n in re.sub(r"\(\d+\):", "", data).replace(",", " ").split()]
    raw = str(tmp_path / "raw")
    assert len(crcs) == len(listing) + 1  # the last one is that of the attributes
    for name, crc in zip(sorted(listing, key=str.encode), crcs):
        h5dump("-d", name, "-b", "FILE", "-o", raw)
        with open(raw, "rb") as f:
            content = f.read()
        assert zlib.crc32(content) == crc, name
        expected = TENSORS[name.replace(" ", "/")]
        if expected.dtype != object:
            assert content == expected.tobytes()


def test_each_damaged_tensor_is_noticed(path, damage):
    for name in TENSORS:
        if name == "empty:0":
            continue
        write_checkpoint(path, TENSORS)
        damage(path, dataset_name(name))
        with h5.load_checkpoint(path) as checkpoint:
            message = "checkpoint {} is damaged: '{}': its checksum".format(path, name)
            for read in (
                checkpoint.verify,
                checkpoint.read_all,
                lambda name=name: checkpoint[name],
            ):
                with pytest.raises(h5.CheckpointCorruptError, match=re.escape(message)):
                    read()
            assert checkpoint["global_step:0" if name != "global_step:0" else "tiny:0"] is not None


def test_large_tensors_are_verified_in_pieces(path, damage, monkeypatch):
    monkeypatch.setattr(checkpoint_reader, "_COMPARED_SIZE", 1000)
    tensors = {"a": np.arange(2500, dtype="f4"), "b": np.arange(1001, dtype="u1")}
    write_checkpoint(path, tensors)
    with h5.load_checkpoint(path) as checkpoint:
        checkpoint.verify()
    damage(path, "a")
    with h5.load_checkpoint(path) as checkpoint:
        with pytest.raises(h5.CheckpointCorruptError, match="is damaged: 'a': its checksum"):
            checkpoint.verify()


def test_damaged_metadata_is_noticed(path):
    write_checkpoint(path, TENSORS, metadata={"note": "x" * 10000})
    with open(path, "r+b") as f:
        content = f.read()
        f.seek(content.index(b"xxxxx") + 50)
        f.write(b"y")
    with pytest.raises(h5.CheckpointCorruptError, match="is damaged"):
        h5.load_checkpoint(path)


def test_all_attributes_are_where_hdf5_keeps_checksums(path):
    """That is in the root group's header, as long as there are no more than eight."""
    write_checkpoint(
        path,
        {"a b": np.ones(1)},
        global_step=1,
        tensorflow_version="1.15.5",
        metadata={"note": "x" * 50000},
        monitored=Monitored("loss:0", "min", 0.5),
    )
    with h5py.File(path, "r") as f:
        assert sorted(f.attrs) == sorted(ATTRIBUTES)
    with open(path, "rb") as f:
        assert b"FRHP" not in f.read()  # the fractal heap, where they would be otherwise


def test_a_missing_dataset_is_noticed(path):
    write_checkpoint(path, TENSORS)
    with h5py.File(path, "r+") as f:
        del f["tiny:0"]
    with pytest.raises(h5.CheckpointCorruptError, match="9 tensors where there should be 10"):
        h5.load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all", b"\x89HDF\r\n\x1a\n" + b"\0" * 100])
def test_what_is_not_hdf5(content, path):
    with open(path, "wb") as f:
        f.write(content)
    with pytest.raises(h5.CheckpointCorruptError, match=re.escape(path)):
        h5.load_checkpoint(path)


def test_a_folder_is_not_a_checkpoint(tmp_path):
    with pytest.raises(h5.CheckpointError, match="cannot open checkpoint .*" + tmp_path.name):
        h5.Checkpoint(tmp_path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_cut_short(part, path):
    write_checkpoint(path, TENSORS)
    os.truncate(path, int(os.path.getsize(path) * part))
    with pytest.raises(h5.CheckpointCorruptError, match=re.escape(path)):
        h5.load_checkpoint(path)


def test_cut_short_while_open(path):
    write_checkpoint(path, TENSORS)
    with h5.load_checkpoint(path) as checkpoint:
        os.truncate(path, 5000)
        with pytest.raises(h5.CheckpointCorruptError, match="the file ends before"):
            checkpoint["large:0"]


def test_a_newer_format_version(path):
    write_checkpoint(path, TENSORS)
    with h5py.File(path, "r+") as f:
        f.attrs["format"] = np.bytes_("tf_h5_callback 2")
    with pytest.raises(h5.CheckpointError, match="format version 2.*upgrade"):
        h5.load_checkpoint(path)


def test_a_closed_checkpoint_says_so(path):
    write_checkpoint(path, TENSORS)
    checkpoint = h5.load_checkpoint(path)
    checkpoint.close()
    with pytest.raises(ValueError):
        checkpoint["tiny:0"]


def test_an_open_checkpoint_survives_its_deletion(path):
    write_checkpoint(path, TENSORS)
    with h5.load_checkpoint(path) as checkpoint:
        os.remove(path)
        assert_same({"large:0": checkpoint["large:0"]}, {"large:0": TENSORS["large:0"]})


def test_replacing_is_atomic(path):
    write_checkpoint(path, TENSORS, global_step=1)
    with h5.load_checkpoint(path) as old:
        write_checkpoint(path, {"w:0": np.ones(2)}, global_step=2)
        assert_same({"large:0": old["large:0"]}, {"large:0": TENSORS["large:0"]})
        with h5.load_checkpoint(path) as new:
            assert new.step == 2 and list(new) == ["w:0"]


def test_nothing_is_left_beside_the_file(path, tmp_path):
    write_checkpoint(path, TENSORS)
    assert os.listdir(tmp_path) == [os.path.basename(path)]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(path, tmp_path, monkeypatch):
    write_checkpoint(path, TENSORS, global_step=1)

    def full(file, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(block_output, "write_all", full)
    with pytest.raises(h5.CheckpointError, match="cannot save .*" + re.escape(path)):
        write_checkpoint(path, TENSORS, global_step=2)
    assert os.listdir(tmp_path) == [os.path.basename(path)]
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint.step == 1
        checkpoint.verify()


@pytest.mark.parametrize("text", ["Unable to allocate 8.00 MiB for an array", ""])
@pytest.mark.parametrize("lookup", [1, 2], ids=["planned", "written"])
def test_not_enough_memory(text, lookup, path, tmp_path):
    """For the tensors themselves, which a mapping may make when they are asked for, or for ours."""
    write_checkpoint(path, TENSORS, global_step=1)
    lookups = []

    class Tensors(dict):
        def __getitem__(self, name):
            lookups.append(name)
            if lookups.count(name) == lookup:
                raise MemoryError(*[text] * bool(text))
            return super().__getitem__(name)

    message = "cannot save checkpoint {}: not enough memory".format(path)
    with pytest.raises(h5.CheckpointError, match=re.escape(message)) as error:
        write_checkpoint(path, Tensors(TENSORS), global_step=2)
    assert isinstance(error.value.__cause__, MemoryError) and text in str(error.value)
    assert os.listdir(tmp_path) == [os.path.basename(path)]
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint.step == 1


def test_a_folder_that_does_not_exist(tmp_path):
    path = tmp_path / "nowhere" / "f.h5"
    with pytest.raises(h5.CheckpointError, match=re.escape(str(path))):
        write_checkpoint(path, TENSORS)


def test_a_dtype_without_a_place_in_hdf5(path, tmp_path):
    with pytest.raises(h5.CheckpointError, match="no HDF5 datatype"):
        write_checkpoint(path, {"t": np.zeros(1, "M8[s]")})
    assert os.listdir(tmp_path) == []


def test_metadata(path):
    metadata = {
        "text": "h\u00e9",
        "nested": {"list": [1, 2.5, None, True]},
        "scalar": np.float32(0.5),
        "array": np.arange(3),
        "nan": float("nan"),
    }
    write_checkpoint(path, {}, metadata=metadata)
    with h5.load_checkpoint(path) as checkpoint:
        nan = checkpoint.metadata.pop("nan")
        assert nan != nan
        assert checkpoint.metadata == {
            "text": "h\u00e9",
            "nested": {"list": [1, 2.5, None, True]},
            "scalar": 0.5,
            "array": [0, 1, 2],
        }
    with h5py.File(path, "r") as f:
        assert json.loads(f.attrs["metadata"].decode())["text"] == "h\u00e9"


def test_metadata_of_any_size(path):
    """Attributes of more than 64 KB: keras#5253, keras#6766."""
    write_checkpoint(path, {}, metadata={"big": "x" * 1000000})
    with h5.load_checkpoint(path) as checkpoint:
        assert len(checkpoint.metadata["big"]) == 1000000


def test_metadata_that_json_cannot_hold(path):
    with pytest.raises(TypeError, match="metadata holds .*object"):
        write_checkpoint(path, {}, metadata={"x": object()})


def test_repr(path):
    write_checkpoint(path, {"w:0": np.ones(1)}, global_step=3)
    with h5.load_checkpoint(path) as checkpoint:
        assert repr(checkpoint) == "<Checkpoint {!r}: step 3, 1 tensors>".format(path)
