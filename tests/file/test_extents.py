import os
import sys

import h5py
import numpy as np
import pytest

from tf_h5_callback.file import extents
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


def write_planned(path, tensors):
    layout = planned_file.plan(specs(tensors))
    with open(path, "wb", buffering=0) as f:
        planned_file.write(f, layout, layout.size, tensors.__getitem__, lambda crcs: {})


def locate(path):
    with h5py.File(path, "r") as f:
        return extents.locate(f, os.path.getsize(path))


def test_locate_finds_what_was_planned(tmp_path):
    path = tmp_path / "f.h5"
    write_planned(path, TENSORS)
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
    write_planned(path, {"w": np.ones(1000)})
    with h5py.File(path, "r") as f:
        with pytest.raises(ValueError, match="'w' ends beyond the end of the file"):
            extents.locate(f, 5000)


@pytest.mark.parametrize("text", [b"plain", "t\u00e9xt"])
def test_strings_of_variable_length_are_references(text, tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as f:
        f["w"] = text
    (extent,) = locate(tmp_path / "f.h5")
    assert extent.dtype == object and extent.nbytes == 16


def test_a_list_of_names_that_does_not_end(tmp_path):
    """As of a file whose structures lead in a circle: no more names than the file has room for."""
    path = tmp_path / "f.h5"
    with h5py.File(path, "w") as f:
        for i in range(100):
            f["name {}".format(i)] = i
    with h5py.File(path, "r") as f:
        with pytest.raises(ValueError, match="leads in a circle"):
            extents.locate(f, 500)


def test_an_interrupt_while_hdf5_lists_names_is_an_interrupt(tmp_path):
    """h5py 3 makes a SystemError of what is raised in a callback."""
    path = tmp_path / "f.h5"
    with h5py.File(path, "w") as f:
        f["a"] = 1

    def trace(frame, event, arg):
        if frame.f_code.co_name == "collect":
            raise KeyboardInterrupt
        return None

    earlier = sys.gettrace()
    with h5py.File(path, "r") as f:
        sys.settrace(trace)
        try:
            with pytest.raises(KeyboardInterrupt):
                extents.locate(f, 10000)
        finally:
            sys.settrace(earlier)
