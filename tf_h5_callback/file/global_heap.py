"""Strings of variable length, which other programs write: references into global heaps.

They are not read through HDF5. Its versions before 1.12 copy what the heap holds into memory of the
size that the reference tells, and a crafted file makes the two differ. The layout: section III.E of
the HDF5 file format specification.
"""

from __future__ import annotations

import struct
from typing import IO, Dict, List

from tf_h5_callback._compat import read_at

_REFERENCE = struct.Struct("<IQI")  # length, address of a collection, index of an object in it
_COLLECTION = struct.Struct("<4sB3xQ")  # signature, version, size with this header
_OBJECT = struct.Struct("<H6xQ")  # index, size without this header and the padding to 8 bytes
REFERENCE_SIZE = _REFERENCE.size


class GlobalHeap:
    """The global heaps of one file.

    Many references can name one object, and so a small file terabytes of strings. An honest file
    refers to an object once: no more bytes are handed out than the file has.
    """

    def __init__(self, file: IO[bytes], file_size: int):
        self._file = file
        self._room = file_size
        self._collections: Dict[int, Dict[int, bytes]] = {}

    def strings(self, offset: int, count: int) -> List[bytes]:
        """Reads the strings of ``count`` references, which are at ``offset``.

        Raises:
          ValueError: they do not lead to strings in this file.
        """
        references = self._read(offset, count * REFERENCE_SIZE)
        strings = []
        for length, address, index in _REFERENCE.iter_unpack(references):
            self._take(length)
            value = self._collection(address).get(index, b"")[:length] if length else b""
            if len(value) != length:
                raise ValueError("its strings are not where it says")
            strings.append(value.split(b"\0")[0])  # some programs count the NUL of C strings
        return strings

    def _collection(self, address: int) -> Dict[int, bytes]:
        if address not in self._collections:
            signature, version, size = _COLLECTION.unpack(self._read(address, _COLLECTION.size))
            if (signature, version) != (b"GCOL", 1):
                raise ValueError("its strings are not where it says")
            self._take(size)
            self._collections[address] = _objects(self._read(address, size))
        return self._collections[address]

    def _take(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise ValueError("it refers to more strings than fit the file")

    def _read(self, offset: int, size: int) -> bytes:
        data = bytearray(size)
        if offset > 1 << 62 or read_at(self._file, memoryview(data), offset) != size:
            raise ValueError("the file ends before it does")
        return bytes(data)


def _objects(collection: bytes) -> Dict[int, bytes]:
    """Index -> content; index 0 is the free space at the end."""
    objects = {}
    position = _COLLECTION.size
    while position + _OBJECT.size <= len(collection):
        index, size = _OBJECT.unpack_from(collection, position)
        if not index:
            break
        position += _OBJECT.size
        objects[index] = collection[position : position + size]
        position += -(-size // 8) * 8
    return objects
