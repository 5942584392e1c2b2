"""Plain output of a file in large blocks, past the page cache where the file system allows it.

With direct output (O_DIRECT) the disk takes the bytes from where they are. That saves more than the
copy into the page cache: the pages for it are neither looked for nor freed again, and the user's
data is not pushed out of it. In return, memory and offsets must be multiples of 4096, so everything
is copied once, into blocks, where its checksum is computed while it is in the processor's cache.
Two blocks are on their way to the disk while the next one is filled.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from typing import IO, Any, Deque, List, Optional, Tuple

import numpy as np

from tf_h5_callback._compat import crc32, set_direct, write_at

# Each call that gives the GIL away may wait 5 ms to get it back: few, large blocks.
_BLOCK_SIZE = 8 << 20
_IN_FLIGHT = 2
_PAGE = 4096
# What is smaller is copied and summed up without giving the GIL away.
_LARGE = 1 << 20
_CRC_STEP = 5 << 10  # up to this size, crc32() keeps the GIL


class BlockOutput:
    """Writes a file from its first byte to its last; a context manager.

    At the end of the block everything is written, or an error raised; nothing is in flight any
    more, whatever happened.

    Args:
      file: an unbuffered binary file, empty.
      size: how many bytes there will be, about.
    """

    def __init__(self, file: IO[bytes], size: int):
        self._file = file
        self._direct = size > _BLOCK_SIZE and set_direct(file, True)
        count = min(_IN_FLIGHT + 1, size // _BLOCK_SIZE + 1)
        size = min(size + 1, _BLOCK_SIZE)
        buffer = np.empty(count * size + _PAGE, np.uint8)
        start = -buffer.ctypes.data % _PAGE
        self._blocks: List[memoryview] = [
            memoryview(buffer)[start + i * size : start + (i + 1) * size] for i in range(count)
        ]
        self._fill = 0  # bytes of the first of them
        self._offset = 0  # where it goes
        self._in_flight: Deque[_Output] = deque()
        self._replaced: List[Tuple[int, memoryview]] = []  # offset, new bytes, of earlier blocks

    def write(self, data: Any) -> int:
        """Appends bytes; returns their CRC-32."""
        source, crc = memoryview(data), 0
        while source:
            if self._fill == len(self._blocks[0]):
                self._put()
            start = self._fill
            end = self._fill = min(start + len(source), len(self._blocks[0]))
            target, part = self._blocks[0][start:end], source[: end - start]
            source = source[end - start :]
            if len(part) <= _CRC_STEP:
                target[:] = part
                crc = crc32(part, crc)
            elif len(part) < _LARGE:
                target[:] = part
                for i in range(0, len(part), _CRC_STEP):
                    crc = crc32(target[i : i + _CRC_STEP], crc)
            else:
                np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(part, np.uint8))
                crc = crc32(target, crc)
        return crc

    def replace(self, offset: int, data: Any) -> None:
        """Changes bytes that were written before."""
        source = memoryview(data)
        count = max(0, self._offset - offset)  # those of earlier blocks
        if count:
            self._replaced.append((offset, source[:count]))
        start = max(0, offset - self._offset)
        source = source[count:]
        self._blocks[0][start : start + len(source)] = source

    def _put(self) -> None:
        """Sends the first block on its way and takes the next one."""
        output = _Output(self._file, self._blocks[0], self._offset, self._direct)
        try:
            output.start()
        except RuntimeError:  # since Python 3.12 there are no new threads once the main one is over
            output.run()
        self._in_flight.append(output)
        self._offset += self._fill
        self._fill = 0
        self._blocks.append(self._blocks.pop(0))
        if len(self._in_flight) == len(self._blocks):  # or the next one is still in use
            self._in_flight.popleft().result()

    def __enter__(self) -> BlockOutput:
        return self

    def __exit__(self, kind: Any, *exc_info: Any) -> None:
        try:
            while self._in_flight:
                self._in_flight.popleft().result()
        finally:
            for output in self._in_flight:
                output.finish()
        if kind is None:
            if self._direct:
                set_direct(self._file, False)  # the rest is no whole page
            write_all(self._file, self._blocks[0][: self._fill], self._offset)
            for offset, data in self._replaced:
                write_all(self._file, data, offset)


class _Output(threading.Thread):
    """A block on its way to the disk."""

    def __init__(self, file: IO[bytes], block: memoryview, offset: int, direct: bool):
        super().__init__(name="tf_h5_callback-output")
        self._file, self._block, self._offset, self._direct = file, block, offset, direct
        self._error: Optional[BaseException] = None

    def run(self) -> None:
        try:
            try:
                write_all(self._file, self._block, self._offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                # The file system wants larger pages, or has written a part of one (it may be full).
                set_direct(self._file, False)
                write_all(self._file, self._block, self._offset)
        except BaseException as error:
            self._error = error  # raised by result(), in the thread that asks

    def finish(self) -> None:
        """Returns when the file is not used any more."""
        if self.ident is not None:
            self.join()

    def result(self) -> None:
        """Returns when the block is written; raises what happened to it."""
        self.finish()
        if self._error is not None:
            raise self._error


def write_all(file: IO[bytes], data: Any, offset: int) -> None:
    """Writes bytes at an offset of an unbuffered file, all of them."""
    view = memoryview(data)
    while view:
        n = write_at(file, view, offset)
        view, offset = view[n:], offset + n
