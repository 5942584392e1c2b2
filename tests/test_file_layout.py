import io
import os
import zlib

import h5py
import numpy as np
import pytest

from tf_h5_callback import file_layout
from tf_h5_callback.file_layout import DatasetSpec

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


def planned_file(path, tensors):
    layout = file_layout.plan(specs(tensors), os.path.dirname(str(path)))
    with open(path, "wb", buffering=0) as f:
        return file_layout.write(f, layout, tensors)


def test_h5py_reads_a_planned_file(tmp_path):
    path = tmp_path / "f.h5"
    crcs = planned_file(path, TENSORS)
    with h5py.File(path, "r") as f:
        assert set(f) == set(TENSORS)
        for name, value in TENSORS.items():
            assert f[name].dtype == value.dtype
            np.testing.assert_array_equal(f[name][()], value)
    assert crcs == {name: zlib.crc32(value.tobytes()) for name, value in TENSORS.items()}


def test_large_tensors_are_aligned_to_64_bytes(tmp_path):
    planned_file(tmp_path / "f.h5", TENSORS)
    with h5py.File(tmp_path / "f.h5", "r") as f:
        assert f["large"].id.get_offset() % 64 == 0


def test_a_plan_leaves_no_file_and_is_made_once(tmp_path):
    a = file_layout.plan(specs(TENSORS), str(tmp_path))
    assert os.listdir(tmp_path) == []
    assert file_layout.plan(specs(TENSORS), str(tmp_path)) is a


def test_a_plan_holds_no_data(tmp_path):
    gigabytes = (DatasetSpec("huge", (1 << 31,), np.dtype("<f4")),)
    layout = file_layout.plan(gigabytes, str(tmp_path))
    assert sum(map(len, layout.gaps)) < 10000


def test_short_writes_are_continued():
    class Reluctant(io.BytesIO):
        def write(self, data):
            return super().write(bytes(data)[:1000])

    tensors = {"x": np.arange(100000, dtype="<f4")}
    layout = file_layout.Layout(("x",), (b"head", b"tail"))
    f = Reluctant()
    file_layout.write(f, layout, tensors)
    assert f.getvalue() == b"head" + tensors["x"].tobytes() + b"tail"


def locate(path):
    with h5py.File(path, "r") as f:
        return file_layout.locate(f, os.path.getsize(path))


def test_locate_finds_what_was_planned(tmp_path):
    path = tmp_path / "f.h5"
    planned_file(path, TENSORS)
    extents = {e.name: e for e in locate(path)}
    content = path.read_bytes()
    for name, value in TENSORS.items():
        e = extents[name]
        assert (e.shape, e.dtype, e.nbytes) == (value.shape, value.dtype, value.nbytes)
        if value.size:
            assert content[e.offset : e.offset + e.nbytes] == value.tobytes()


def hostile_soft_link(f, tmp_path):
    f["w"] = h5py.SoftLink("/data")


def hostile_external_link(f, tmp_path):
    f["w"] = h5py.ExternalLink("other.h5", "/data")


def hostile_external_storage(f, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 16)
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_external(str(secret).encode(), 0, 16)
    space = h5py.h5s.create_simple((16,))
    h5py.h5d.create(f.id, b"w", h5py.h5t.NATIVE_UINT8, space, creation)


def hostile_virtual(f, tmp_path):
    layout = h5py.VirtualLayout(shape=(3,), dtype="f4")
    layout[:] = h5py.VirtualSource("other.h5", "data", shape=(3,))
    f.create_virtual_dataset("w", layout)


def chunked(f, tmp_path):
    f.create_dataset("w", data=np.ones(10), chunks=(5,))


def compressed(f, tmp_path):
    f.create_dataset("w", data=np.ones(10), compression="gzip")


def group(f, tmp_path):
    f.create_group("w")


def never_written(f, tmp_path):
    f.create_dataset("w", (1 << 40,), "f4")


def no_dataspace(f, tmp_path):
    f["w"] = h5py.Empty("f4")


def references(f, tmp_path):
    f.create_dataset("w", data=np.array([f.ref], dtype=h5py.ref_dtype), dtype=h5py.ref_dtype)


def opaque(f, tmp_path):
    f["w"] = np.zeros(2, "V7")


@pytest.mark.parametrize(
    "make, why",
    [
        (hostile_soft_link, "link to somewhere else"),
        (hostile_external_link, "link to somewhere else"),
        (hostile_external_storage, "another file|holds 0 bytes"),
        (hostile_virtual, "virtual"),
        (chunked, "chunked.*h5repack"),
        (compressed, "compressed"),
        (group, "is not a dataset"),
        (never_written, "holds 0 bytes where .* want 4398046511104"),
        (no_dataspace, "no dataspace"),
        (references, "unsupported datatype|holds"),
        (opaque, "unsupported datatype"),
    ],
)
def test_what_is_not_a_plain_block_in_this_file_is_refused(make, why, tmp_path):
    path = tmp_path / "f.h5"
    with h5py.File(path, "w") as f:
        make(f, tmp_path)
    with pytest.raises(ValueError, match="'w' .*({})".format(why)):
        locate(path)


def test_data_beyond_the_end_of_the_file_is_refused(tmp_path):
    path = tmp_path / "f.h5"
    planned_file(path, {"w": np.ones(1000)})
    with h5py.File(path, "r") as f:
        with pytest.raises(ValueError, match="'w' ends beyond the end of the file"):
            file_layout.locate(f, 5000)


@pytest.mark.parametrize("text", [b"plain", "t\u00e9xt"])
def test_strings_of_variable_length_are_left_to_hdf5(text, tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as f:
        f["w"] = text
    (extent,) = locate(tmp_path / "f.h5")
    assert extent.offset is None
