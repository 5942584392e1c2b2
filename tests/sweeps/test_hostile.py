"""Files made to harm: what they lead to is not followed, and what they claim is not believed."""

import json
import os
import struct
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
from fuzz import checksummed_blocks, lookup3

import tf_h5_callback as h5
from tf_h5_callback.file.format import ATTRIBUTES, Monitored, attributes_crc32
from tf_h5_callback.file.writer import write_checkpoint

FOLDER = os.path.dirname(os.path.abspath(__file__))
MEGABYTE = 1 << 20

CHILD = """
    import resource, sys
    import h5py
    import tf_h5_callback as h5
    import tf_h5_callback.file.reader

    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]),) * 2)
    try:
        with h5.load_checkpoint(sys.argv[1]) as checkpoint:
            for name in checkpoint:
                value = checkpoint[name]
                print("read", ascii(name[:40]), value.shape, value.reshape(-1)[:3].tolist())
            print("read all")
    except h5.CheckpointError as error:
        cause = type(error.__cause__).__name__
        print("refused", "for want of memory" * (cause == "MemoryError"), ascii(str(error))[:4000])
"""


def read_in_child(path, memory=32 * MEGABYTE):
    """What a child prints that may use so much memory for reading."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(CHILD), str(path), str(memory)],
        check=True,
        capture_output=True,
        timeout=300,  # only if it hangs
        text=True,
    ).stdout


def refused(path, why, memory=32 * MEGABYTE):
    output = read_in_child(path, memory)
    assert "refused" in output and "for want of memory" not in output, output
    assert why in output
    return True


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.ckpt-7.h5")


# --- nothing outside the file is read


def external_link(f, target):
    f["w"] = h5py.ExternalLink(target, "/secret")


def soft_link_to_an_external_link(f, target):
    f["elsewhere"] = h5py.ExternalLink(target, "/secret")
    f["w"] = h5py.SoftLink("/elsewhere")


def external_storage(f, target):
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_external(target.encode(), 0, 8)
    space = h5py.h5s.create_simple((1,))
    h5py.h5d.create(f.id, b"w", h5py.h5t.STD_I64LE, space, creation)


def virtual_dataset(f, target):
    layout = h5py.VirtualLayout(shape=(1,), dtype="i8")
    layout[:] = h5py.VirtualSource(target, "secret", shape=(1,))
    f.create_virtual_dataset("w", layout)


def path_through_an_external_link(f, target):
    """HDF5 follows a name with a slash; "w" becomes one where the file is patched."""
    f["a"] = h5py.ExternalLink(target, "/")
    f["a_secret"] = np.zeros(1)


@pytest.mark.parametrize(
    "make",
    [
        external_link,
        soft_link_to_an_external_link,
        external_storage,
        virtual_dataset,
        path_through_an_external_link,
    ],
)
def test_no_other_file_is_opened(make, path, tmp_path):
    target, name = str(tmp_path / "target"), "w"
    with h5py.File(target, "w") as f:
        f["secret"] = np.array([4711])
    with h5py.File(path, "w", libver="latest" if make is virtual_dataset else "earliest") as f:
        make(f, target)
    if make is path_through_an_external_link:
        name = "a/secret"
        patch(path, b"a_secret", b"a/secret")
    if make is external_storage:
        with open(target, "wb") as f:
            f.write(struct.pack("<q", 4711))
    with h5py.File(path, "r") as f:
        assert f[name][()].tolist() == [4711], "the file is not hostile at all"
    # Whoever opens a FIFO waits, here until the child's time is over.
    os.remove(target)
    os.mkfifo(target)
    assert "4711" not in read_in_child(path)
    assert refused(path, "")


def patch(path, old, new):
    """Replaces bytes and forges the checksums around them."""
    with open(path, "rb") as f:
        content = bytearray(f.read())
    blocks = checksummed_blocks(bytes(content))
    assert content.count(old) == 1 and len(old) == len(new)
    content[:] = content.replace(old, new)
    for block in blocks:
        block.repair(content)
    with open(path, "wb") as f:
        f.write(content)


def test_lookup3_is_that_of_its_author():
    assert lookup3(b"") == 0xDEADBEEF
    assert lookup3(b"Four score and seven years ago") == 0x17770551
    assert lookup3(b"Four score and seven years ago", 1) == 0xCD628161


# --- no more memory than the file has bytes


def huge_and_empty(f):
    f.create_dataset("w", (1 << 40,), "f4")


def huge_with_no_elements(f):
    f.create_dataset("w", (0, 1 << 40), "f4")


def compression_bomb(f):
    f.create_dataset("w", data=np.zeros(200 * MEGABYTE // 8), chunks=(MEGABYTE,), compression=9)


def unknown_filter(f):
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((10,))
    creation.set_filter(31999, h5py.h5z.FLAG_OPTIONAL)
    space = h5py.h5s.create_simple((10,))
    h5py.h5d.create(f.id, b"w", h5py.h5t.STD_I64LE, space, creation).write(
        h5py.h5s.ALL, h5py.h5s.ALL, np.zeros(10, "i8")
    )


def one_dataset_with_a_thousand_names(f):
    f["w"] = np.zeros(MEGABYTE // 8)
    for i in range(1000):
        f["w{}".format(i)] = f["w"]


@pytest.mark.parametrize(
    "make, why",
    [
        (huge_and_empty, "holds 0 bytes"),
        (huge_with_no_elements, ""),
        (compression_bomb, "compressed"),
        (unknown_filter, "compressed"),
        (one_dataset_with_a_thousand_names, "larger than the file"),
    ],
)
def test_what_is_larger_than_the_file_is_refused(make, why, path):
    with h5py.File(path, "w") as f:
        make(f)
    if make is huge_with_no_elements:
        assert "read all" in read_in_child(path) or refused(path, why)
    else:
        assert refused(path, why)


def test_the_limit_of_memory_is_one(path):
    """So that the other tests can fail."""
    write_checkpoint(path, {"w:0": np.zeros(64 * MEGABYTE, "u1")})
    assert "refused for want of memory" in read_in_child(path)
    assert "read all" in read_in_child(path, 200 * MEGABYTE)


def test_attributes_of_others_are_not_read(path):
    with h5py.File(path, "w", libver="latest") as f:
        f["w"] = np.ones(3)
        f.attrs["unrelated"] = np.zeros(64 * MEGABYTE, "u1")
    assert "read all" in read_in_child(path)


def test_a_string_that_many_refer_to(path):
    with h5py.File(path, "w") as f:
        f.create_dataset("w", (100000,), h5py.special_dtype(vlen=bytes))
        f["w"][0] = b"x" * MEGABYTE
        f["w"][1:] = b"y"
        offset, size = f["w"].id.get_offset(), f["w"].id.get_storage_size()
    with open(path, "r+b") as f:
        f.seek(offset)
        reference = f.read(16)
        f.seek(offset)
        f.write(reference * (size // 16))
    assert refused(path, "more strings than fit")


@pytest.mark.parametrize("at, value", [(0, 99), (4, 1 << 40), (12, 99)])
def test_strings_that_are_not_where_the_reference_says(at, value, path):
    with h5py.File(path, "w") as f:
        f["w"] = b"text"
        offset = f["w"].id.get_offset()
    with open(path, "r+b") as f:
        f.seek(offset + at)
        f.write(struct.pack("<Q" if at == 4 else "<I", value))
    with pytest.raises(h5.CheckpointCorruptError):
        h5.load_checkpoint(path)


# --- names


@pytest.mark.parametrize("name", ["..", ".. .. etc passwd", "x" * 60000, "\n", "\u202e"])
def test_strange_names_are_just_names(name, path):
    with h5py.File(path, "w", libver="latest") as f:
        f[name] = np.ones(2)
    with h5.load_checkpoint(path) as checkpoint:
        assert list(checkpoint) == [name.replace(" ", "/")]
        assert checkpoint[name.replace(" ", "/")].tolist() == [1, 1]


@pytest.mark.parametrize("forged", [b"../", b"\xff\xfe\xfd", b"axa"])
def test_names_that_hdf5_would_not_write(forged, path):
    write_checkpoint(path, {"axb": np.ones(2), "axa": np.ones(2)})
    patch(path, b"axb", forged)
    with pytest.raises(h5.CheckpointCorruptError):
        h5.load_checkpoint(path)


def test_a_name_ends_at_its_first_nul(path):
    write_checkpoint(path, {"axb": np.ones(2)})
    patch(path, b"axb", b"a\0b")
    with h5.load_checkpoint(path) as checkpoint:
        assert list(checkpoint) == ["a"]


def test_a_file_within_a_file(path):
    write_checkpoint(path, {"w": np.ones(2)})
    with open(path, "rb") as f:
        content = f.read()
    with open(path, "wb") as f:
        f.write(bytes(512) + content)
    with h5py.File(path, "r") as f:
        assert list(f) == ["w"]
    with pytest.raises(h5.CheckpointCorruptError, match="does not begin as"):
        h5.load_checkpoint(path)


# --- values and types


def test_booleans_that_are_neither(path):
    with h5py.File(path, "w") as f:
        f["flags"] = np.array([True, False])
        f["flags"].id.write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.array([2, 0], "u1"), f["flags"].id.get_type()
        )
    with h5.load_checkpoint(path) as checkpoint:
        with pytest.raises(h5.CheckpointCorruptError, match="neither true nor false"):
            checkpoint["flags"]


def five_bits():
    type_id = h5py.h5t.STD_I8LE.copy()
    type_id.set_precision(5)
    return type_id


def another_float():
    type_id = h5py.h5t.IEEE_F32LE.copy()
    type_id.set_ebias(126)
    return type_id


def padded_with_spaces():
    type_id = h5py.h5t.C_S1.copy()
    type_id.set_size(3)
    type_id.set_strpad(h5py.h5t.STR_SPACEPAD)
    return type_id


@pytest.mark.parametrize("make", [five_bits, another_float, padded_with_spaces])
def test_types_that_numpy_would_misread(make, path):
    with h5py.File(path, "w") as f:
        type_id, space = make(), h5py.h5s.create_simple((2,))
        data = np.zeros(2 * type_id.get_size(), "u1")
        h5py.h5d.create(f.id, b"w", type_id, space).write(h5py.h5s.ALL, h5py.h5s.ALL, data, type_id)
    with pytest.raises(h5.CheckpointCorruptError, match="unsupported datatype"):
        h5.load_checkpoint(path)


# --- attributes, with a checksum that fits


def forge(path, **changes):
    with h5py.File(path, "r+") as f:
        for key, value in changes.items():
            del f.attrs[key]
            if value is not None:
                f.attrs.create(key, value)
        raw = {key: np.asarray(f.attrs[key]).tobytes() for key in ATTRIBUTES if key in f.attrs}
        if "crc32" not in changes:
            raw["crc32"] = raw["crc32"][:-4]
            crcs = np.append(f.attrs["crc32"][:-1], attributes_crc32(raw))
            f.attrs["crc32"] = crcs.astype("u4")


def text(value):
    return np.bytes_(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": text("[" * 200000)},
        {"metadata": text('{"a": ' * 200000)},
        {"metadata": text('{"n": ' + "9" * 1000000 + "}")},
        {"metadata": text([1])},
        {"metadata": text("")},
        {"metadata": np.bytes_(b"\xff\xfe")},
        {"metadata": np.int64(5)},
        {"metadata": None},
        {"encoding": text([])},
        {"encoding": text({"names": []})},
        {"encoding": text({"names": {"a": 5}})},
        {"encoding": text({"names": {"a": "b", "b": "b"}})},
        {"encoding": text({"string_lengths": [1]})},
        {"encoding": text({"string_lengths": {"strings": 5}})},
        {"encoding": text({"string_lengths": {"strings": "abc"}})},
        {"encoding": text({"string_lengths": {"strings": [1, 1e300]}})},
        {"encoding": text({"string_lengths": {"strings": [1, -1]}})},
        {"encoding": text({"string_lengths": {"strings": [0.5, 1]}})},
        {"encoding": text({"string_shapes": {"strings": [1 << 40]}, "string_lengths": {}})},
        {"encoding": text({"string_shapes": {"bytes": [1 << 40]}})},
        {"encoding": text({"string_shapes": {"bytes": [2]}, "string_lengths": {"bytes": [9, -6]}})},
        {"encoding": text({"string_shapes": {"bytes": [-2]}, "string_lengths": {"bytes": [1, 2]}})},
        {"encoding": text({"string_shapes": {"bytes": "x"}, "string_lengths": {"bytes": [3]}})},
        {"encoding": text({"string_shapes": {"bytes": [1]}, "string_lengths": {"bytes": "x"}})},
        {"encoding": text({"dtypes": {"a": "int4"}})},
        {"encoding": text({"dtypes": {"bytes": ["int4"]}})},
        {"encoding": text({"dtypes": {"bytes": "U9999999"}})},
        {"crc32": np.uint32(5)},
        {"crc32": np.zeros((4, 4), "u4")},
        {"crc32": np.array([b"a", b"b", b"c", b"d"])},
        {"crc32": None},
        {"crc32": np.zeros(0, "u4")},
        {"format": text("tf_h5_callback x")},
        {"format": text("tf_h5_callback")},
        {"format": text("tf_h5_callback " + "9" * 1000000)},
        {"metrics": text([1])},
        {"metrics": text({"monitor": 5})},
        {"metrics": text({"monitor": {}})},
        {"metrics": text({"monitor": {"unknown": 1}})},
        {"global_step": np.arange(5)},
        {"global_step": np.float64(np.inf)},
        {"global_step": text("x")},
        {"written_at": text("yesterday")},
        {"written_at": None},
    ],
    ids=lambda changes: "{} {}".format(*(*changes, str(*changes.values())[:30])),
)
def test_attributes_of_the_wrong_kind(changes, path):
    tensors = {"a": np.ones(2), "b": np.ones(3), "bytes": np.zeros(3, "u1")}
    tensors["strings"] = np.array([b"x\0", b""], object)
    write_checkpoint(path, tensors, global_step=7, monitored=Monitored("loss:0", "min", 0.5))
    forge(path)
    with h5.load_checkpoint(path) as checkpoint:
        checkpoint.verify()  # the forger knows his trade
    forge(path, **changes)
    with pytest.raises(h5.CheckpointError):
        with h5.load_checkpoint(path) as checkpoint:
            checkpoint.verify()


def test_attributes_of_strange_types_in_the_file_of_another_program(path):
    with h5py.File(path, "w") as f:
        f["w"] = np.ones(2)
        f.attrs["format"] = np.arange(5)
        f.attrs["tensorflow_version"] = "of variable length, which only HDF5 could find"
        f.attrs["metadata"] = np.arange(100)
        f.attrs["global_step"] = np.zeros(2, [("a", "i4"), ("b", "S3")])
    with h5.load_checkpoint(path) as checkpoint:
        assert checkpoint.tensorflow_version is None and checkpoint.step is None
        assert checkpoint["w"].tolist() == [1, 1]


ACCIDENTS = """
    import os, signal, sys
    sys.path.insert(0, {!r})
    import isolation

    isolation.SECONDS = 2  # of a processor
    isolation.PATIENCE = 150  # times as long by the clock
    accidents = {{
        "read": lambda: None,
        "wrong": lambda: None,
        "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "hang": lambda: any(iter(int, 1)),
        "memory": lambda: b"x" * (isolation.MEMORY + (100 << 20)),
        "escaped": lambda: 1 / 0,
    }}

    def function(case, folder):
        accidents[case]()
        return "wrong" if case == "wrong" else "read", ""

    cases = [*accidents, "read", "memory", "crash", "escaped", "read"]
    outcomes = list(isolation.run(function, cases))
    assert [outcome.case for outcome in outcomes] == cases, outcomes
    assert [outcome.kind for outcome in outcomes] == cases, outcomes
    assert all(isolation.finish([o]) == (o.case != "read") for o in outcomes)
"""


def test_a_child_that_dies_is_noticed_and_replaced():
    code = textwrap.dedent(ACCIDENTS).format(FOLDER)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mutated_files():
    """A slice of what `python tests/sweeps/fuzz.py` does."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", os.path.join(FOLDER, "fuzz.py"), "--cases", "2000"],
        stdout=subprocess.PIPE,
        text=True,
    )
    print(process.stdout)
    assert process.returncode == 0
    total = process.stdout.split("\nall ")[1].split("\n")[0].split()
    assert int(total[0]) == 2000 and int(total[1]) > 1000 and int(total[2]) > 100
