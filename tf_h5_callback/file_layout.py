"""Where the bytes of a checkpoint are: planned before writing, checked before reading.

HDF5 decides where things go, but the bulk of the bytes never passes through it. For a set of
datasets `plan` lets HDF5 lay out a file once, without data. From then on a file with those
datasets is plain output, in order: bytes of HDF5, a tensor, bytes of HDF5, a tensor. A thread that
makes h5py calls while the training thread runs Python waits up to 5 ms for the GIL after each of
them (400 small tensors: 9.4 s instead of 0.04 s); plain output needs a handful of calls.

Reading is the mirror: `locate` asks HDF5 where each dataset is, and refuses whatever is not a plain
block of bytes in this very file. A crafted HDF5 file can name other files to read from.
"""

from __future__ import annotations

import functools
import operator
import os
import tempfile
import zlib
from typing import IO, Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import h5py
import numpy as np

from tf_h5_callback import dtypes

# write() and crc32() give the GIL away at each call and may wait 5 ms to get it back.
BLOCK_SIZE = 16 << 20
# Tensors from this size on are written from where they are; smaller ones are collected first.
_LARGE = 64 << 10
_ALIGNMENT = 64

# The oldest file format with checksums in all of its metadata; read by HDF5 1.8 (2008) and newer.
_LIBVER = h5py.h5f.LIBVER_V18


class DatasetSpec(NamedTuple):
    """One dataset to plan: its name in the file, its shape, the NumPy dtype of its elements."""

    name: str
    shape: Tuple[int, ...]
    dtype: np.dtype


class Layout(NamedTuple):
    """The names of the datasets that have bytes, in file order, and HDF5's bytes around them.

    ``gaps[i]`` comes before the bytes of ``names[i]``, the last gap after all of them.
    """

    names: Tuple[str, ...]
    gaps: Tuple[bytes, ...]


class Extent(NamedTuple):
    """A dataset found in a file.

    Where ``offset`` is None HDF5 must read it, and ``nbytes`` is -1 if only HDF5 knows the size.
    """

    name: str
    shape: Tuple[int, ...]
    dtype: np.dtype
    meaning: str  # the dtype's name; differs from `dtype` only as `dtypes.numpy_type` tells
    nbytes: int
    offset: Optional[int]


@functools.lru_cache(maxsize=16)
def plan(specs: Tuple[DatasetSpec, ...], folder: str) -> Layout:
    """Lets HDF5 lay out a file of contiguous, allocated, unwritten datasets.

    The file is made in ``folder`` and removed again; as it is sparse it takes a few blocks of disk,
    whatever the size of the tensors.
    """
    handle, path = tempfile.mkstemp(prefix=".layout-", suffix=".tmp", dir=folder)
    try:
        os.close(handle)
        offsets = _create(path, specs)
        sizes = {s.name: _count(s.shape) * s.dtype.itemsize for s in specs}
        names = tuple(sorted(offsets, key=offsets.__getitem__))
        gaps, position = [], 0
        with open(path, "rb") as f:
            for name in names:
                f.seek(position)
                gaps.append(f.read(offsets[name] - position))
                position = offsets[name] + sizes[name]
            f.seek(position)
            gaps.append(f.read())
    finally:
        os.remove(path)
    return Layout(names, tuple(gaps))


def _create(path: str, specs: Tuple[DatasetSpec, ...]) -> Dict[str, int]:
    """Creates the file and tells the offset of each dataset that has bytes."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(_LIBVER, _LIBVER)
    access.set_alignment(_LARGE, _ALIGNMENT)
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    link = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    link.set_char_encoding(h5py.h5t.CSET_UTF8)
    offsets = {}
    fid = h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, fapl=access)
    try:
        for name, shape, dtype in specs:
            space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
            dataset = h5py.h5d.create(
                fid, name.encode("utf-8"), dtypes.h5_type(dtype), space, creation, link
            )
            offset = dataset.get_offset()
            if offset is not None:
                offsets[name] = offset
    finally:
        fid.close()
    return offsets


def write(file: IO[bytes], layout: Layout, tensors: Mapping[str, np.ndarray]) -> Dict[str, int]:
    """Writes a planned file from its first byte to its last.

    Args:
      file: an unbuffered binary file, at its start.
      layout: the plan for exactly these tensors.
      tensors: name in the file -> C-contiguous, little-endian array.

    Returns:
      The CRC-32 (that of zlib) of each tensor's bytes.
    """
    crcs = dict.fromkeys(tensors, 0)
    small = bytearray()
    for name, gap in zip(layout.names, layout.gaps):
        small += gap
        data = memoryview(tensors[name].reshape(-1).view(np.uint8))
        if len(data) < _LARGE:
            crcs[name] = zlib.crc32(data)
            small += data
            continue
        _write_all(file, small)
        small = bytearray()
        crc = 0
        for start in range(0, len(data), BLOCK_SIZE):
            block = data[start : start + BLOCK_SIZE]
            crc = zlib.crc32(block, crc)
            _write_all(file, block)
        crcs[name] = crc
    _write_all(file, small + layout.gaps[-1])
    return crcs


def _count(shape: Tuple[int, ...]) -> int:
    """The number of elements; exact where NumPy's product would overflow."""
    return functools.reduce(operator.mul, shape, 1)


def _write_all(file: IO[bytes], data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def locate(file: h5py.File, file_size: int) -> List[Extent]:
    """Finds the datasets of a file and checks that reading them is safe.

    Raises:
      ValueError: something in the file is not a plain block of bytes inside this file; the text
        says what, and begins with the name of the dataset.
    """
    names: List[bytes] = []
    file.id.links.iterate(names.append)
    return [_locate_one(file.id, name, file_size) for name in names]


def _locate_one(fid: Any, raw_name: bytes, file_size: int) -> Extent:
    def refuse(why: str) -> ValueError:
        return ValueError("{!r} {}".format(raw_name.decode("utf-8", "replace"), why))

    if fid.links.get_info(raw_name).type != h5py.h5l.TYPE_HARD:
        raise refuse("is a link to somewhere else, which is not followed")
    dataset = h5py.h5o.open(fid, raw_name)
    if not isinstance(dataset, h5py.h5d.DatasetID):
        raise refuse("is not a dataset; a checkpoint has datasets in its root group only")
    creation = dataset.get_create_plist()
    layout = creation.get_layout()
    if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT) or creation.get_nfilters():
        raise refuse(
            "is chunked, compressed or virtual, not a plain block of bytes "
            "(h5repack -l CONTI -f NONE makes one of it)"
        )
    if creation.get_external_count():
        raise refuse("keeps its data in another file, which is not followed")
    space = dataset.get_space()
    if space.get_simple_extent_type() not in (h5py.h5s.SIMPLE, h5py.h5s.SCALAR):
        raise refuse("has no dataspace")
    shape = tuple(int(n) for n in space.get_simple_extent_dims())
    type_id = dataset.get_type()
    if isinstance(type_id, h5py.h5t.TypeStringID) and type_id.is_variable_str():
        # Pointers to strings elsewhere in this file, which other programs write: HDF5 reads them.
        return Extent(raw_name.decode(), shape, np.dtype(object), "object", -1, None)
    nbytes = _count(shape) * type_id.get_size()
    if dataset.get_storage_size() != nbytes:
        raise refuse(
            "holds {} bytes where its shape {} and type want {}".format(
                dataset.get_storage_size(), shape, nbytes
            )
        )
    try:
        dtype, meaning = dtypes.numpy_type(type_id)
    except (TypeError, ValueError) as error:
        raise refuse("has a datatype that is not supported: {}".format(error)) from error
    if dtype.kind not in "biufcS" and meaning not in dtypes.SHORT_FLOATS:
        raise refuse("has the unsupported datatype {}".format(dtype))
    offset = dataset.get_offset()
    if layout == h5py.h5d.COMPACT or not nbytes:
        offset = None
    elif offset is None or offset + nbytes > file_size:
        raise refuse("ends beyond the end of the file ({} bytes)".format(file_size))
    return Extent(raw_name.decode("utf-8"), shape, dtype, meaning, nbytes, offset)
