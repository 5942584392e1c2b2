"""Writing a file whose layout HDF5 has planned, as plain output.

HDF5 decides where things go, but it never touches the disk. For a set of datasets `plan` lets it
lay out a file in memory, without data; a file of many gigabytes takes a few kilobytes there. From
then on a file with those datasets is plain output (`output`), in order: all that HDF5 has to say of
them, and the tensors. Before the end HDF5 adds the attributes to the plan, in memory again: the
bytes that it changed are replaced, and what is new comes last.

There are two reasons. A thread that makes h5py calls while the training thread runs Python waits up
to 5 ms for the GIL after each of them (400 small tensors: 9.4 s instead of 0.04 s); plain output
needs a handful of calls. And when the disk fails under HDF5 while it closes a file, h5py cannot
raise the error, and HDF5 may crash at exit; errors of plain output are raised.
"""

from __future__ import annotations

import contextlib
import threading
from typing import IO, Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Tuple

import h5py
import numpy as np

from tf_h5_callback.file import dtypes
from tf_h5_callback.file.output import BlockOutput, finish
from tf_h5_callback.file.sparse_file import SparseFile
from tf_h5_callback.job import Job

_LARGE = 64 << 10  # tensors from this size on are aligned
_ALIGNMENT = 64

# The oldest file format with checksums in all of its metadata; read by HDF5 1.8 (2008) and newer.
_LIBVER = h5py.h5f.LIBVER_V18

_CACHE_SIZE = 16 << 20  # bytes of plans that are kept
_SPEC_SIZE = 450  # bytes that Python needs for a dataset's name, shape and offset, about


class DatasetSpec(NamedTuple):
    """One dataset to plan: its name in the file, its shape, the NumPy dtype of its elements."""

    name: str
    shape: Tuple[int, ...]
    dtype: np.dtype


class Layout(NamedTuple):
    """Where everything goes.

    Attributes:
      specs: of all datasets.
      extents: name and offset of those that have bytes, in file order.
      image: the file without the data: HDF5's bytes, and zeros. HDF5 puts all of its own in front
        of the first dataset; wherever else it put some, they would be written as well.
    """

    specs: Tuple[DatasetSpec, ...]
    extents: Tuple[Tuple[str, int], ...]
    image: SparseFile

    @property
    def size(self) -> int:
        """That of the file, in bytes."""
        return self.image.size

    @property
    def memory(self) -> int:
        """The bytes that the plan itself takes, about."""
        return self.image.memory + _SPEC_SIZE * len(self.specs)


@contextlib.contextmanager
def _opened(image: SparseFile, create: bool = False) -> Iterator[Any]:
    """HDF5's handle of a file in memory; closes it, and all that was opened in it."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(_LIBVER, _LIBVER)
    access.set_alignment(_LARGE, _ALIGNMENT)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, image)
    try:
        if create:
            fid = h5py.h5f.create(b"plan", h5py.h5f.ACC_EXCL, fapl=access)
        else:
            fid = h5py.h5f.open(b"plan", h5py.h5f.ACC_RDWR, fapl=access)
        try:
            yield fid
        finally:
            fid.close()
    finally:
        if image.error is not None:
            raise image.error  # in place of what HDF5 and h5py made of it


def _uninterrupted(work: Callable[[], None]) -> None:
    """Lets HDF5 work in another thread than the main one, where no interrupt comes.

    HDF5 calls `SparseFile`. An interrupt in there gets lost, or becomes another error, and HDF5
    knows nothing of the bytes that were not written.
    """
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    job = Job(work)
    job.start("tf_h5_callback-plan")
    finish(job)


# Those used last, the newest first; replaced as a whole, since an interrupt comes at any line.
_plans: Tuple[Layout, ...] = ()


def plan(specs: Tuple[DatasetSpec, ...]) -> Layout:
    """Lets HDF5 lay out a file of contiguous, allocated, unwritten datasets, once.

    Raises:
      TypeError: a dtype has no place in HDF5.
      ValueError: a name cannot be one of a dataset.
    """
    global _plans
    known = _plans
    layout = next((layout for layout in known if layout.specs == specs), None)
    if layout is None:
        layout = _plan(specs)
    plans, memory = [layout], layout.memory
    for other in known:
        if other is not layout:
            memory += other.memory
            if memory > _CACHE_SIZE:
                break
            plans.append(other)
    _plans = tuple(plans)
    return layout


def _plan(specs: Tuple[DatasetSpec, ...]) -> Layout:
    image = SparseFile()
    extents: List[Tuple[int, str]] = []

    def work() -> None:
        with _opened(image, create=True) as fid:
            extents.extend(_allocate(specs, _create(fid, specs)))

    _uninterrupted(work)
    in_order = tuple((name, offset) for offset, name in sorted(extents))
    return Layout(specs, in_order, image.copy())


_SCALAR = h5py.h5s.create(h5py.h5s.SCALAR)


def _create(fid: Any, specs: Tuple[DatasetSpec, ...]) -> List[Any]:
    """Creates datasets whose bytes have no place yet."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    link = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    link.set_char_encoding(h5py.h5t.CSET_UTF8)
    datasets = []
    for name, shape, dtype in specs:
        space = h5py.h5s.create_simple(shape) if shape else _SCALAR
        type_id = dtypes.h5_type(dtype)
        datasets.append(h5py.h5d.create(fid, name.encode("utf-8"), type_id, space, creation, link))
    # Some of its structures get their place when they are first written: now, not amid the data.
    h5py.h5f.flush(fid)
    return datasets


def _allocate(specs: Tuple[DatasetSpec, ...], datasets: List[Any]) -> Iterator[Tuple[int, str]]:
    """Lets HDF5 find places, by writing a zero to each first element; yields offsets and names."""
    for (name, shape, dtype), dataset in zip(specs, datasets):
        if 0 in shape:
            continue
        space = dataset.get_space()
        if shape:
            space.select_hyperslab((0,) * len(shape), (1,) * len(shape))
        dataset.write(_SCALAR, space, np.zeros((), dtype), dataset.get_type())
        yield dataset.get_offset(), name


def write(
    file: IO[bytes],
    layout: Layout,
    size: int,
    read: Callable[[str], np.ndarray],
    attributes: Callable[[Dict[str, int]], Mapping[str, Any]],
) -> int:
    """Writes a planned file from its first byte to its last, with attributes of the root group.

    Args:
      file: an unbuffered binary file, empty.
      layout: the plan.
      size: the size that it will have, with the attributes, about.
      read: name in the file -> C-contiguous, little-endian array of the planned dtype and shape;
        called once for each dataset that has bytes, in the order in which they are written.
      attributes: called in the end, with the CRC-32 (that of zlib) of the bytes of each of these.
        Name -> str (stored in UTF-8 with a fixed length: HDF5 keeps no checksum of strings of
        variable length), NumPy scalar or array.

    Returns:
      The size in bytes.
    """
    crcs = {}
    with BlockOutput(file, size) as output:
        position = 0
        for name, offset in layout.extents:
            if offset > position:
                output.write(layout.image.read_at(position, offset - position))
            data = read(name).reshape(-1).view(np.uint8)
            crcs[name] = output.write(data)
            position = offset + len(data)
        image = _with_attributes(layout, attributes(crcs))
        for offset, new in image.changes():
            output.replace(offset, new[: max(0, position - offset)])
        output.write(image.read_at(position, image.size - position))
    return image.size


def _with_attributes(layout: Layout, attributes: Mapping[str, Any]) -> SparseFile:
    image = layout.image.copy()

    def work() -> None:
        with _opened(image) as fid:
            for key, value in attributes.items():
                if isinstance(value, str):
                    value = np.array(value.encode("utf-8"))
                    type_id = h5py.h5t.py_create(value.dtype)
                    type_id.set_cset(h5py.h5t.CSET_UTF8)
                else:
                    type_id = h5py.h5t.py_create(value.dtype)
                space = h5py.h5s.create_simple(value.shape) if value.shape else _SCALAR
                h5py.h5a.create(fid, key.encode(), type_id, space).write(np.asarray(value), type_id)

    _uninterrupted(work)
    return image
