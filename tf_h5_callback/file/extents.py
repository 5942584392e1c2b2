"""Where the tensors of a file are, checked before anything is read.

HDF5 is asked where each dataset is; the bytes are then read without it. Whatever is not a plain
block of bytes in this very file is refused: a crafted HDF5 file can name other files to read from.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Tuple

import h5py
import numpy as np

from tf_h5_callback.file import dtypes, global_heap
from tf_h5_callback.file.memory import count


class Extent(NamedTuple):
    """A dataset found in a file.

    Strings of variable length have dtype object; their bytes are references (`global_heap`).
    """

    name: str
    shape: Tuple[int, ...]
    dtype: np.dtype
    meaning: str  # the dtype's name; differs from `dtype` only as `dtypes.numpy_type` tells
    nbytes: int
    offset: Optional[int]
    data: bytes = b""  # the bytes themselves where there is no offset


def locate(file: h5py.File, file_size: int) -> List[Extent]:
    """Finds the datasets of a file and checks that reading them is safe.

    Raises:
      ValueError: something in the file is not a plain block of bytes inside this file; the text
        says what, and begins with the name of the dataset.
    """
    names: List[bytes] = []
    room = file_size

    def collect(name: bytes) -> Optional[bool]:
        nonlocal room
        room -= len(name) + 8  # and the address it leads to
        names.append(name)
        return True if room < 0 else None  # True: that is enough

    try:
        # Any other order makes HDF5 build a table; if that fails it frees what it never filled in.
        file.id.links.iterate(collect, order=h5py.h5.ITER_NATIVE)
    except SystemError as error:
        # What h5py 3 makes of an exception in there, a KeyboardInterrupt too.
        raise (error.__cause__ or error) from None
    if room < 0:
        raise ValueError("its list of names leads in a circle")
    extents = [_locate_one(file.id, name, file_size) for name in names]
    if sum(extent.nbytes for extent in extents) > file_size:
        # Many datasets can share bytes, and so a small file terabytes of tensors.
        raise ValueError("its tensors together are larger than the file")
    return extents


def _locate_one(fid: Any, raw_name: bytes, file_size: int) -> Extent:
    def refuse(why: str) -> ValueError:
        # A name can be as long as the file.
        return ValueError("{!r} {}".format(raw_name[:1000].decode("utf-8", "replace"), why))

    if b"/" in raw_name:
        raise refuse("has a slash in its name, which HDF5 would follow as a path")
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
    try:
        dtype, meaning = dtypes.numpy_type(type_id)
    except (TypeError, ValueError) as error:
        raise refuse("has an unsupported datatype: {}".format(error)) from error
    itemsize = global_heap.REFERENCE_SIZE if dtype.hasobject else type_id.get_size()
    nbytes = count(shape) * itemsize
    if dataset.get_storage_size() != nbytes:
        raise refuse(
            "holds {} bytes where its shape {} and type want {}".format(
                dataset.get_storage_size(), shape, nbytes
            )
        )
    extent = Extent(raw_name.decode("utf-8"), shape, dtype, meaning, nbytes, None)
    if not nbytes:
        return extent
    if layout == h5py.h5d.COMPACT:
        if dtype.hasobject:
            raise refuse("is both compact and of variable length")
        # At most 64 KB within HDF5's own structures; only HDF5 can find them.
        data = np.empty(nbytes, np.uint8)
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, data, type_id)
        return extent._replace(data=data.tobytes())
    offset = dataset.get_offset()
    if offset is None or offset + nbytes > file_size:
        raise refuse("ends beyond the end of the file ({} bytes)".format(file_size))
    return extent._replace(offset=offset)


def read_attribute(file: h5py.File, name: str, file_size: int) -> Optional[np.ndarray]:
    """Reads an attribute of the root group.

    Returns:
      An array; None where there is no such attribute, or none of a type that a checkpoint has.
      Strings of variable length are not among them: only HDF5 could find them, and some versions,
      2.0 among them, search a damaged heap for ever.

    Raises:
      ValueError: it is larger than the file.
    """
    if not h5py.h5a.exists(file.id, name.encode()):
        return None
    attribute = h5py.h5a.open(file.id, name.encode())
    space, type_id = attribute.get_space(), attribute.get_type()
    if space.get_simple_extent_type() not in (h5py.h5s.SIMPLE, h5py.h5s.SCALAR):
        return None
    shape = tuple(int(n) for n in space.get_simple_extent_dims())
    try:
        dtype, _ = dtypes.numpy_type(type_id)
    except (TypeError, ValueError):
        return None
    if dtype.hasobject or len(shape) > 1:
        return None
    if count(shape) * max(1, type_id.get_size()) > file_size:
        raise ValueError("its attribute {} is larger than the file".format(name))
    value = np.empty(shape, dtype)
    attribute.read(value, type_id)
    return value
