"""A file in memory that HDF5 works on, without the data."""

from __future__ import annotations

import io
import os
from typing import Any, Dict, Iterator, List, Optional, Tuple


class SparseFile(io.RawIOBase):
    """A file in memory that holds only the pages that are not all zeros.

    HDF5 reads and writes it through h5py's driver for file objects. What is raised on the way can
    get lost in there, and when HDF5 cannot write it cannot close the file, and the process hangs
    or crashes at exit. So exceptions are kept for whoever has opened it, and writing never fails.

    Attributes:
      size: in bytes.
      error: the last exception, or None.
    """

    _PAGE = 4096
    _ZEROS = bytes(_PAGE)

    def __init__(self) -> None:
        self._pages: Dict[int, bytes] = {}
        self._position = 0
        self.size = 0
        self.error: Optional[BaseException] = None
        self._written: List[Tuple[int, int]] = []  # from where to where

    @property
    def memory(self) -> int:
        """The bytes that it takes in memory, about."""
        return len(self._pages) * self._PAGE

    def changes(self) -> Iterator[Tuple[int, bytes]]:
        """What was written, in order, each byte once, in as few pieces as possible."""
        start = end = 0
        for next_start, next_end in [*sorted(self._written), (self.size + 1, 0)]:
            if next_start > end:
                if end > start:
                    yield start, self.read_at(start, end - start)
                start = next_start
            end = max(end, next_end)

    def copy(self) -> SparseFile:
        """A file of the same content, with no changes yet."""
        other = SparseFile()
        other._pages = dict(self._pages)
        other.size = self.size
        return other

    def read_at(self, offset: int, size: int) -> bytes:
        """The bytes at an offset; the position stays where it is."""
        first, last = offset // self._PAGE, (offset + size - 1) // self._PAGE
        pages = b"".join(self._pages.get(page, self._ZEROS) for page in range(first, last + 1))
        start = offset - first * self._PAGE
        return pages[start : start + size]

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def writable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        try:
            view = memoryview(buffer).cast("B")
            view[:] = self.read_at(self._position, len(view))
        except BaseException as error:
            self.error = error
            raise
        self._position += len(view)
        return len(view)

    def write(self, data: Any) -> int:
        """See `io.RawIOBase`."""
        size = len(data)
        try:
            self._write_at(self._position, bytes(data))
        except BaseException as error:
            self.error = error
        self._position += size
        self.size = max(self.size, self._position)
        return size

    def _write_at(self, offset: int, new: bytes) -> None:
        self._written.append((offset, offset + len(new)))
        first, start = divmod(offset, self._PAGE)
        end = start + len(new)
        count = -(-end // self._PAGE)
        old = self.read_at(first * self._PAGE, count * self._PAGE)
        pages = old[:start] + new + old[end:]
        for i in range(count):
            page = pages[i * self._PAGE : (i + 1) * self._PAGE]
            if page != self._ZEROS:
                self._pages[first + i] = page
            else:
                self._pages.pop(first + i, None)

    def truncate(self, size: Any = None) -> int:
        """See `io.RawIOBase`."""
        self.size = self._position if size is None else size
        return self.size
