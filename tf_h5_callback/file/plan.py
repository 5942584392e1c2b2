"""Writing a file whose layout HDF5 has planned, as plain output.

HDF5 decides where things go, but it never touches the disk. For a set of datasets `plan` lets it
lay out a file in memory, without data; a file of many gigabytes takes a few kilobytes there. From
then on a file with those datasets is plain output (`output`), in order: bytes of HDF5, a
tensor, bytes of HDF5, a tensor. Before the end HDF5 adds the attributes to the plan, in memory
again, and the bytes that it changed are replaced.

There are two reasons. A thread that makes h5py calls while the training thread runs Python waits up
to 5 ms for the GIL after each of them (400 small tensors: 9.4 s instead of 0.04 s); plain output
needs a handful of calls. And when the disk fails under HDF5 while it closes a file, h5py cannot
raise the error, and HDF5 may crash at exit; errors of plain output are raised.
"""

from __future__ import annotations

import functools
import io
import os
from typing import IO, Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Tuple

import h5py
import numpy as np

from tf_h5_callback.file import dtypes
from tf_h5_callback.file.output import BlockOutput

_LARGE = 64 << 10  # tensors from this size on are aligned
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

    ``gaps[i]`` comes before the bytes of ``names[i]``, the last gap after all of them. ``size`` is
    that of the file in bytes, ``image`` the whole of it without the data.
    """

    names: Tuple[str, ...]
    gaps: Tuple[bytes, ...]
    size: int
    image: _SparseFile


class _SparseFile(io.RawIOBase):
    """A file in memory that holds only the pages that were written; the rest reads as zeros.

    HDF5 reads and writes it through h5py's driver for file objects.

    Attributes:
      size: in bytes.
    """

    _PAGE = 4096

    def __init__(self) -> None:
        self._pages: Dict[int, bytes] = {}
        self._position = 0
        self.size = 0
        self._written: List[Tuple[int, int]] = []  # from where to where

    def changes(self) -> Iterator[Tuple[int, bytes]]:
        """What was written, in order, each byte once, in as few pieces as possible."""
        start = end = 0
        for next_start, next_end in [*sorted(self._written), (self.size + 1, 0)]:
            if next_start > end:
                if end > start:
                    yield start, self.read_at(start, end - start)
                start = next_start
            end = max(end, next_end)

    def copy(self) -> _SparseFile:
        """A file of the same content, with no changes yet."""
        other = _SparseFile()
        other._pages = dict(self._pages)
        other.size = self.size
        return other

    def read_at(self, offset: int, size: int) -> bytes:
        """The bytes at an offset; the position stays where it is."""
        first, last = offset // self._PAGE, (offset + size - 1) // self._PAGE
        empty = bytes(self._PAGE)
        pages = b"".join(self._pages.get(page, empty) for page in range(first, last + 1))
        start = offset - first * self._PAGE
        return pages[start : start + size]

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view[:] = self.read_at(self._position, len(view))
        self._position += len(view)
        return len(view)

    def write(self, data: Any) -> int:
        new = bytes(data)
        self._written.append((self._position, self._position + len(new)))
        first, start = divmod(self._position, self._PAGE)
        end = start + len(new)
        count = -(-end // self._PAGE)
        old = self.read_at(first * self._PAGE, count * self._PAGE)
        pages = old[:start] + new + old[end:]
        for i in range(count):
            self._pages[first + i] = pages[i * self._PAGE : (i + 1) * self._PAGE]
        self._position += len(new)
        self.size = max(self.size, self._position)
        return len(new)

    def truncate(self, size: Any = None) -> int:
        self.size = self._position if size is None else size
        return self.size


def _access(file: _SparseFile) -> h5py.h5p.PropFAID:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(_LIBVER, _LIBVER)
    access.set_alignment(_LARGE, _ALIGNMENT)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, file)
    return access


_SCALAR = h5py.h5s.create(h5py.h5s.SCALAR)


@functools.lru_cache(maxsize=16)
def plan(specs: Tuple[DatasetSpec, ...]) -> Layout:
    """Lets HDF5 lay out a file of contiguous, allocated, unwritten datasets.

    Raises:
      TypeError: a dtype has no place in HDF5.
      ValueError: a name cannot be one of a dataset.
    """
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    link = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    link.set_char_encoding(h5py.h5t.CSET_UTF8)
    image = _SparseFile()
    extents = []
    fid = h5py.h5f.create(b"plan", h5py.h5f.ACC_EXCL, fapl=_access(image))
    try:
        for name, shape, dtype in specs:
            space = h5py.h5s.create_simple(shape) if shape else _SCALAR
            type_id = dtypes.h5_type(dtype)
            dataset = h5py.h5d.create(fid, name.encode("utf-8"), type_id, space, creation, link)
            offset = dataset.get_offset()
            if offset is not None:
                extents.append((offset, dataset.get_storage_size(), name))
            del dataset  # before the file, which is really closed with the last of its objects
    finally:
        fid.close()
    gaps, position = [], 0
    for offset, size, _ in sorted(extents):
        gaps.append(image.read_at(position, offset - position))
        position = offset + size
    gaps.append(image.read_at(position, image.size - position))
    return Layout(tuple(name for _, _, name in sorted(extents)), tuple(gaps), image.size, image)


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
        for name, gap in zip(layout.names, layout.gaps):
            output.write(gap)
            crcs[name] = output.write(read(name).reshape(-1).view(np.uint8))
        image = _with_attributes(layout, attributes(crcs))
        end = layout.size - len(layout.gaps[-1])  # that of the last tensor
        for offset, data in image.changes():
            output.replace(offset, data[: max(0, end - offset)])
        output.write(image.read_at(end, image.size - end))
    return image.size


def _with_attributes(layout: Layout, attributes: Mapping[str, Any]) -> _SparseFile:
    image = layout.image.copy()
    fid = h5py.h5f.open(b"plan", h5py.h5f.ACC_RDWR, fapl=_access(image))
    try:
        for key, value in attributes.items():
            if isinstance(value, str):
                value = np.array(value.encode("utf-8"))
                type_id = h5py.h5t.py_create(value.dtype)
                type_id.set_cset(h5py.h5t.CSET_UTF8)
            else:
                type_id = h5py.h5t.py_create(value.dtype)
            space = h5py.h5s.create_simple(value.shape) if value.shape else _SCALAR
            h5py.h5a.create(fid, key.encode(), type_id, space).write(np.asarray(value), type_id)
    finally:
        fid.close()
    return image
