import io
import os
import random
import zlib

import h5py
import numpy as np
import pytest

from tf_h5_callback.file import plan as planned_file
from tf_h5_callback.file.plan import DatasetSpec

TENSORS = {
    "scalar": np.array(7, "<i8"),
    "empty": np.zeros((0, 3), "<f4"),
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


def test_a_plan_is_made_once():
    a = planned_file.plan(specs(TENSORS))
    assert planned_file.plan(specs(TENSORS)) is a


def test_a_plan_holds_no_data():
    gigabytes = (DatasetSpec("huge", (1 << 31,), np.dtype("<f4")),)
    layout = planned_file.plan(gigabytes)
    assert layout.size > 1 << 33
    assert sum(map(len, layout.gaps)) < 10000


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
    rng, sparse, plain = random.Random(seed), planned_file._SparseFile(), io.BytesIO()
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
    sparse = planned_file._SparseFile()
    for offset, data in [(5000, b"ab"), (10, b"xyz"), (13, b"more"), (11, b"Y"), (5001, b"c")]:
        sparse.seek(offset)
        sparse.write(data)
    assert list(sparse.changes()) == [(10, b"xYzmore"), (5000, b"ac")]
    assert list(sparse.copy().changes()) == []


def test_a_sparse_file_is_sparse():
    sparse = planned_file._SparseFile()
    sparse.seek(1 << 40)
    sparse.write(b"x")
    assert sparse.size == (1 << 40) + 1 and len(sparse._pages) == 1
    sparse.truncate(10)
    assert sparse.size == 10
