"""Plain output of a file in large blocks, past the page cache where the file system allows it.

With direct output (O_DIRECT) the disk takes the bytes from where they are. That saves more than the
copy into the page cache: the pages for it are neither looked for nor freed again, and the user's
data is not pushed out of it. In return, memory and offsets must be multiples of 4096, so everything
is copied once, into blocks, where its checksum is computed while it is in the processor's cache.
Two blocks are on their way to the disk while the next one is filled.

After an interrupt they may still be on their way when the file is closed, and the number of its
descriptor may soon be that of another file. So each block has a descriptor of its own, which is
closed when the block is written.
"""

from __future__ import annotations

import errno
import functools
import io
import os
from collections import deque
from typing import IO, Any, Deque, List, Tuple

import numpy as np

from tf_h5_callback._compat import crc32, set_direct, write_at
from tf_h5_callback.job import Job

# Each call that gives the GIL away may wait 5 ms to get it back: few, large blocks.
_BLOCK_SIZE = 8 << 20
_IN_FLIGHT = 2
_PAGE = 4096
# What is smaller is copied and summed up without giving the GIL away.
_LARGE = 1 << 20
_CRC_STEP = 5 << 10  # up to this size, crc32() keeps the GIL


class BlockOutput:
    """Writes a file from its first byte to its last; a context manager.

    At the end of the ``with`` block everything is written, or an error raised, and nothing is in
    flight any more. What still is, after an interrupt at the very end or a second one, does no
    harm: it goes into this file and no other, and whoever interrupted will have no use for that.

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
        self._in_flight: Deque[Job] = deque()
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
        own, block = _duplicate(self._file), self._blocks[0]
        job = Job(functools.partial(_write_block, own, block, self._offset, self._direct))
        self._in_flight.append(job)
        job.start("tf_h5_callback-output")
        self._offset += self._fill
        self._fill = 0
        self._blocks.append(self._blocks.pop(0))
        if len(self._in_flight) == len(self._blocks):  # or the next one is still in use
            finish(self._in_flight[0])
            self._in_flight.popleft()

    def __enter__(self) -> BlockOutput:
        return self

    def __exit__(self, kind: Any, *exc_info: Any) -> None:
        for job in self._in_flight:
            job.wait()
        if kind is not None:
            for job in self._in_flight:
                _take_error(job)
            return
        while self._in_flight:
            finish(self._in_flight.popleft())
        if self._direct:
            set_direct(self._file, False)  # the rest is no whole page
        write_all(self._file, self._blocks[0][: self._fill], self._offset)
        for offset, data in self._replaced:
            write_all(self._file, data, offset)


def finish(job: Job) -> None:
    """Returns when a job is over; raises what it has raised."""
    job.wait()
    if not job.succeeded:
        raise _take_error(job)


def _take_error(job: Job) -> Exception:
    # In the job it makes a circle with its traceback, and keeps all that is in the frames of that.
    error, job.error = job.error, None
    return error or OSError("a thread was ended in the middle of its work")


def _duplicate(file: IO[bytes]) -> io.FileIO:
    """The same file with a descriptor of its own."""
    # One call, in C: no interrupt comes between the descriptor and the object that will close it.
    return next(map(io.FileIO, map(os.dup, [file.fileno()]), ["wb"]))


def _write_block(file: IO[bytes], block: memoryview, offset: int, direct: bool) -> None:
    """Writes a block and closes the file."""
    with file:
        try:
            write_all(file, block, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            # The file system wants larger pages, or has written a part of one (it may be full).
            set_direct(file, False)
            write_all(file, block, offset)


def write_all(file: IO[bytes], data: Any, offset: int) -> None:
    """Writes bytes at an offset of an unbuffered file, all of them."""
    view = memoryview(data)
    while view:
        n = write_at(file, view, offset)
        view, offset = view[n:], offset + n
