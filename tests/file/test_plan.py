import bisect
import gc
import io
import os
import random
import subprocess
import sys
import threading
import tracemalloc
import zlib

import h5py
import numpy as np
import pytest

from tf_h5_callback._compat import extension_dtype
from tf_h5_callback.file import plan as planned_file
from tf_h5_callback.file.plan import DatasetSpec

TENSORS = {
    "scalar": np.array(7, "<i8"),
    "empty": np.zeros((0, 3), "<f4"),
    "empty, too": np.zeros((2, 0, 3), bool),
    "string": np.array(b"a scalar\0", "S9"),
    "strings": np.array([[b"ab", b"c"], [b"", b"def"]], "S3"),
    "small 0": np.arange(6, dtype="<f4").reshape(2, 3),
    "large": np.arange(70000, dtype="<f8"),
    "flags": np.array([True, False, True]),
    "small 1": np.arange(5, dtype="<c8"),
}


def specs(tensors):
    return tuple(DatasetSpec(name, t.shape, t.dtype) for name, t in tensors.items())


def write_planned(path, tensors, attributes=()):
    """Returns the checksums."""
    layout, told = planned_file.plan(specs(tensors)), {}

    def describe(crcs):
        told.update(crcs)
        return dict(attributes)

    with open(path, "wb", buffering=0) as f:
        size = planned_file.write(f, layout, layout.size, tensors.__getitem__, describe)
        assert size == os.fstat(f.fileno()).st_size
    return told


def test_h5py_reads_a_planned_file(tmp_path):
    path = tmp_path / "f.h5"
    crcs = write_planned(path, TENSORS)
    with h5py.File(path, "r") as f:
        assert set(f) == set(TENSORS)
        for name, value in TENSORS.items():
            assert f[name].dtype == value.dtype
            np.testing.assert_array_equal(f[name][()], value)
    assert crcs == {n: zlib.crc32(v.tobytes()) for n, v in TENSORS.items() if v.size}


def test_large_tensors_are_aligned_to_64_bytes(tmp_path):
    write_planned(tmp_path / "f.h5", TENSORS)
    with h5py.File(tmp_path / "f.h5", "r") as f:
        assert f["large"].id.get_offset() % 64 == 0


def test_short_floats_are_allocated_and_written(tmp_path):
    names = [n for n in ("bfloat16", "float8_e5m2") if extension_dtype(n) is not None]
    tensors = {n: np.arange(9).astype("f4").astype(extension_dtype(n)) for n in names}
    write_planned(tmp_path / "f.h5", tensors)
    content = (tmp_path / "f.h5").read_bytes()
    with h5py.File(tmp_path / "f.h5", "r") as f:
        for name, value in tensors.items():
            start = f[name].id.get_offset()
            assert content[start : start + value.nbytes] == value.tobytes()


def test_no_datasets_at_all(tmp_path):
    for tensors in ({}, {"empty": np.zeros(0)}):
        write_planned(tmp_path / "f.h5", tensors, {"a": np.int64(1)})
        with h5py.File(tmp_path / "f.h5", "r") as f:
            assert set(f) == set(tensors) and f.attrs["a"] == 1


def test_nothing_of_hdf5_stays_open():
    before = h5py.h5f.get_obj_count()
    for spec in (
        DatasetSpec("v", (3,), np.dtype("M8[s]")),
        DatasetSpec("a/b", (3,), np.dtype("f4")),
    ):
        with pytest.raises((TypeError, ValueError)):
            planned_file.plan((DatasetSpec("w", (3,), np.dtype("f4")), spec))
    planned_file._with_attributes(planned_file._plan(specs_of(3)), {"a": np.int64(1)})
    gc.collect()
    assert h5py.h5f.get_obj_count() == before


# Where HDF5's own bytes are


def many_tensors(count, largest):
    rng = np.random.RandomState(0)
    return {
        "layer_{}/kernel:0".format(i).replace("/", " "): rng.bytes(rng.randint(largest))
        for i in range(count)
    }


class CountingFile(io.FileIO):
    """Notes down where it is read."""

    def __init__(self, path):
        super().__init__(str(path))
        self.positions = []

    def readinto(self, buffer):
        self.positions.append(self.tell())
        return super().readinto(buffer)


def test_all_but_the_tensors_is_in_two_places(tmp_path):
    path = tmp_path / "f.h5"
    tensors = {n: np.frombuffer(b, np.uint8) for n, b in many_tensors(300, 100000).items()}
    attributes = {"a{}".format(i): "x" * 20000 for i in range(8)}
    write_planned(path, tensors, attributes)
    starts = sorted(offset for _, offset in planned_file.plan(specs(tensors)).extents)
    with CountingFile(path) as file, h5py.File(file, "r") as f:
        assert {name: f[name].shape for name in f} == {n: v.shape for n, v in tensors.items()}
        assert {key: f.attrs[key].decode() for key in f.attrs} == attributes
        positions = file.positions
    # A place is what lies between two tensors: HDF5 goes to the first and to the last.
    assert len(positions) > 300
    assert {bisect.bisect(starts, position) for position in positions} == {0, 300}


def test_between_tensors_there_are_at_most_zeros(tmp_path):
    path = tmp_path / "f.h5"
    tensors = {n: np.frombuffer(b, np.uint8) | 1 for n, b in many_tensors(300, 200000).items()}
    write_planned(path, tensors, {"a": "x" * 100000})
    content = np.frombuffer(path.read_bytes(), np.uint8)
    with h5py.File(path, "r") as f:
        extents = sorted((f[n].id.get_offset(), f[n].id.get_storage_size()) for n in f)
    padding = 0
    for (start, size), (following, _) in zip(extents, extents[1:]):
        assert 0 <= following - (start + size) < 64
        assert not content[start + size : following].any()
        padding += following - (start + size)
    assert padding > 0


@pytest.fixture
def no_flush(monkeypatch):
    """Then HDF5 does put structures between the tensors, if there are very many."""
    monkeypatch.setattr(h5py.h5f, "flush", lambda fid: None)
    monkeypatch.setattr(planned_file, "_plans", ())


def structures_between(layout):
    tensors = {name: np.prod(shape) * dtype.itemsize for name, shape, dtype in layout.specs}
    position, found = layout.extents[0][1], 0
    for name, offset in layout.extents:
        found += any(layout.image.read_at(position, offset - position))
        position = offset + int(tensors[name])
    return found


VERY_MANY = {"v{}:0".format(i): np.full(3, i, "<f4") for i in range(10000)}


def test_no_structures_between_very_many_tensors():
    """HDF5 finds a place for some of its own only when it runs out of memory for them."""
    layout = planned_file.plan(specs(VERY_MANY))
    assert layout.extents[0][1] > 300 * len(VERY_MANY)
    assert structures_between(layout) == 0


def test_structures_are_written_wherever_hdf5_puts_them(tmp_path, no_flush):
    write_planned(tmp_path / "f.h5", VERY_MANY)
    assert structures_between(planned_file.plan(specs(VERY_MANY))) > 0
    with h5py.File(tmp_path / "f.h5", "r") as f:
        assert len(f) == len(VERY_MANY)
        for name, value in VERY_MANY.items():
            assert f[name][2] == value[2]


# Plans that are kept


@pytest.fixture
def cache_of(monkeypatch):
    """Empties the cache and sets its size."""

    def empty(size):
        monkeypatch.setattr(planned_file, "_plans", ())
        monkeypatch.setattr(planned_file, "_CACHE_SIZE", size)

    return empty


def specs_of(count, length=5):
    return tuple(DatasetSpec("v{}".format(i), (length,), np.dtype("<f4")) for i in range(count))


def test_a_plan_is_made_once():
    a = planned_file.plan(specs(TENSORS))
    assert planned_file.plan(specs(TENSORS)) is a


def test_the_plans_used_last_are_kept(cache_of):
    one = planned_file.plan(specs_of(10)).memory
    cache_of(3 * one)
    first, second, third = [planned_file.plan(specs_of(10, length)) for length in (1, 2, 3)]
    assert planned_file.plan(specs_of(10, 1)) is first
    fourth = planned_file.plan(specs_of(10, 4))
    assert planned_file._plans == (fourth, first, third)
    assert planned_file.plan(specs_of(10, 2)) is not second


def test_the_newest_plan_is_kept_however_large_it_is(cache_of):
    cache_of(1000)
    large = planned_file.plan(specs_of(1000))
    assert planned_file._plans == (large,)
    small = planned_file.plan(specs_of(1))
    assert planned_file._plans == (small,)


def test_what_plans_take_is_bounded_and_what_they_say_they_take(cache_of):
    cache_of(1 << 20)
    gc.collect()
    tracemalloc.start()
    try:
        for length in range(1, 9):  # more than fit
            planned_file.plan(specs_of(300, 1000 * length))
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    said = sum(layout.memory for layout in planned_file._plans)
    assert 3 << 18 < said <= 1 << 20
    assert 0.7 * said < taken < 1.4 * said


def test_a_plan_holds_no_data():
    gigabytes = (DatasetSpec("huge", (1 << 31,), np.dtype("<f4")),)
    layout = planned_file.plan(gigabytes)
    assert layout.size > 1 << 33
    assert layout.memory < 10000
    layout = planned_file.plan(specs_of(300, 5000))  # more than a page each
    assert layout.image.memory <= layout.extents[0][1] + 4096


# What goes wrong in the memory behind HDF5


OUT_OF_MEMORY = """
import os, sys
import pytest
sys.path.insert(0, {!r})
from test_plan import planned_file, specs_of

real, calls_left = planned_file.SparseFile.read_at, [-1]

def read_at(self, offset, size):
    calls_left[0] -= 1
    if calls_left[0] == 0:
        raise MemoryError("Unable to allocate a page")
    return real(self, offset, size)

planned = planned_file.plan(specs_of(20, 1))
planned_file.SparseFile.read_at = read_at
for n in range(1, 40):
    calls_left[0], before = n, planned_file._plans
    with pytest.raises(MemoryError, match="Unable to allocate a page"):
        planned_file.plan(specs_of(20, 2))
    assert planned_file._plans is before
for n in range(1, 6):
    calls_left[0] = n
    with pytest.raises(MemoryError, match="Unable to allocate a page"):
        planned_file._with_attributes(planned, {{"a": "x" * 1000}})
assert planned_file.plan(specs_of(20, 2)).size == planned.size + 20 * 4
print("as it should be", flush=True)
os._exit(0)
"""


def test_an_error_in_memory_is_raised_and_nothing_is_kept():
    """Some h5py return as if nothing had happened, others make something else of it.

    In a process of its own, which ends without HDF5: with h5py 3 that crashes when it closes what
    it could not read.
    """
    code = OUT_OF_MEMORY.format(os.path.dirname(os.path.abspath(__file__)))
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert process.stdout.endswith("as it should be\n"), process.stderr


def test_hdf5_works_where_no_interrupt_comes(monkeypatch):
    real, threads = planned_file.SparseFile.write, set()

    def write(self, data):
        threads.add(threading.current_thread())
        return real(self, data)

    monkeypatch.setattr(planned_file.SparseFile, "write", write)
    layout = planned_file.plan(specs_of(3, 123))
    planned_file._with_attributes(layout, {"a": "x"})
    assert threads and threading.main_thread() not in threads
    threads.clear()
    thread = threading.Thread(target=planned_file.plan, args=(specs_of(3, 124),))
    thread.start()
    thread.join()
    assert threads == {thread}


# The file


@pytest.mark.parametrize("elements", [1, 100000, 3 << 20])
def test_attributes(elements, tmp_path):
    """Those of a file of one block, of several, and such as take more than one themselves."""
    path = tmp_path / "f.h5"
    attributes = {"text": "h\u00e9", "number": np.int64(7), "array": np.arange(100000)}
    tensors = {**TENSORS, "more": np.arange(elements, dtype="<f8")}
    for n in (7, 8):  # the plan is not changed by it
        write_planned(path, tensors, {**attributes, "number": np.int64(n)})
        with h5py.File(path, "r") as f:
            assert f.attrs["text"].decode("utf-8") == "h\u00e9"
            assert f.attrs["number"] == n
            np.testing.assert_array_equal(f.attrs["array"], np.arange(100000))
            for name, value in tensors.items():
                np.testing.assert_array_equal(f[name][()], value)


@pytest.mark.parametrize("seed", range(5))
def test_a_sparse_file_is_like_a_file(seed):
    rng, sparse, plain = random.Random(seed), planned_file.SparseFile(), io.BytesIO()
    for _ in range(200):
        offset, size = rng.randrange(20000), rng.randrange(1, 9000)
        if rng.random() < 0.5:
            data = bytes([rng.randrange(256)]) * size
            for f in (sparse, plain):
                f.seek(offset)
                assert f.write(data) == size
        else:
            size = min(size, max(0, sparse.size - offset))
            for f in (sparse, plain):
                f.seek(offset)
            if size:
                assert sparse.read(size) == plain.read(size)
        assert sparse.tell() == plain.tell()
        assert sparse.size == len(plain.getvalue()) == sparse.seek(0, io.SEEK_END)
    copy = sparse.copy()
    copy.seek(0)
    copy.write(b"changed")
    assert sparse.read_at(0, sparse.size) == plain.getvalue()
    assert copy.read_at(7, copy.size - 7) == plain.getvalue()[7:]
    assert list(copy.changes()) == [(0, b"changed")]


def test_changes_are_told_once_and_together():
    sparse = planned_file.SparseFile()
    for offset, data in [(5000, b"ab"), (10, b"xyz"), (13, b"more"), (11, b"Y"), (5001, b"c")]:
        sparse.seek(offset)
        sparse.write(data)
    assert list(sparse.changes()) == [(10, b"xYzmore"), (5000, b"ac")]
    assert list(sparse.copy().changes()) == []


def test_a_sparse_file_is_sparse():
    sparse = planned_file.SparseFile()
    sparse.seek(1 << 40)
    sparse.write(b"x")
    assert sparse.size == (1 << 40) + 1 and sparse.memory == 4096
    sparse.write(bytes(100000))
    sparse.seek(1 << 40)
    sparse.write(b"\0")
    assert sparse.size == (1 << 40) + 100001 and sparse.memory == 0
    sparse.truncate(10)
    assert sparse.size == 10
