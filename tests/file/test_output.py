import errno
import os
import shutil
import signal
import subprocess
import threading
import zlib

import numpy as np
import pytest

from tf_h5_callback import _compat
from tf_h5_callback.file import output as block_output
from tf_h5_callback.file.output import BlockOutput

BLOCK = block_output._BLOCK_SIZE
RANDOM = np.random.RandomState(0).bytes(3 * BLOCK)


def nothing_in_flight():
    """Waits for threads, which end some time after their work; none may hang."""
    ours = [t for t in threading.enumerate() if t.name.startswith("tf_h5_callback")]
    for thread in ours:
        thread.join(300)
    return not any(thread.is_alive() for thread in ours)


def write(path, pieces):
    """Writes pieces, checks their checksums and the file, and that it can be appended to."""
    with open(path, "wb", buffering=0) as f:
        with BlockOutput(f, sum(map(len, pieces))) as output:
            crcs = [output.write(piece) for piece in pieces]
        assert nothing_in_flight()
        f.seek(0, os.SEEK_END)
        f.write(b"more")  # not aligned: an error if output were still direct
    assert crcs == [zlib.crc32(piece) for piece in pieces]
    with open(path, "rb") as f:
        assert f.read() == b"".join(pieces) + b"more"


@pytest.mark.parametrize(
    "sizes",
    [
        [1],
        [0, 5, 0],
        [BLOCK],
        [BLOCK - 1, 2],
        [BLOCK + 1],
        [10, 2 * BLOCK, 10],
        [7, 5 * BLOCK + 4096, 3 << 20, 100, 64 << 10],
        [30000] * 2000,
    ],
)
def test_what_is_written(sizes, tmp_path):
    data = RANDOM * 2
    pieces = [data[i : i + size] for i, size in enumerate(sizes)]
    write(tmp_path / "f", pieces)


def test_arrays_of_any_alignment(tmp_path):
    array = np.frombuffer(RANDOM, np.uint8)[1 : 2 * BLOCK]
    with open(tmp_path / "f", "wb", buffering=0) as f:
        with BlockOutput(f, len(array)) as output:
            assert output.write(array) == zlib.crc32(array)
    assert (tmp_path / "f").read_bytes() == array.tobytes()


def test_more_than_was_said(tmp_path):
    with open(tmp_path / "f", "wb", buffering=0) as f:
        with BlockOutput(f, 100) as output:
            for _ in range(50):
                output.write(RANDOM[:30])
    assert (tmp_path / "f").read_bytes() == RANDOM[:30] * 50


@pytest.mark.parametrize("size", [100, BLOCK, 2 * BLOCK + 100])
def test_what_is_replaced(size, tmp_path):
    """In blocks that are sent already, in the last one, and across the boundary."""
    expected = bytearray(RANDOM[:size])
    with open(tmp_path / "f", "wb", buffering=0) as f:
        with BlockOutput(f, size) as output:
            output.write(RANDOM[:size])
            for offset in (0, 50, BLOCK - 5, 2 * BLOCK - 5, size - 10):
                if offset + 10 <= size:
                    output.replace(offset, b"0123456789")
                    expected[offset : offset + 10] = b"0123456789"
            output.replace(20, b"")
            output.write(b"end")
    assert (tmp_path / "f").read_bytes() == expected + b"end"


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = _compat.write_at
    monkeypatch.setattr(block_output, "write_at", lambda f, data, at: real(f, data[:8192], at))
    write(tmp_path / "f", [RANDOM[: BLOCK + 5000]])


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs direct output")
def test_output_is_direct_where_it_can_be(tmp_path, monkeypatch):
    import fcntl

    seen = []
    real = block_output.write_all

    def write_all(file, data, offset):
        flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
        seen.append((offset, len(data), bool(flags & os.O_DIRECT)))
        real(file, data, offset)

    monkeypatch.setattr(block_output, "write_all", write_all)
    path = tmp_path / "f"
    with open(path, "wb", buffering=0) as f:
        can = _compat.set_direct(f, True)
    write(path, [RANDOM[: 2 * BLOCK + 100]])
    assert sorted(seen) == [(0, BLOCK, can), (BLOCK, BLOCK, can), (2 * BLOCK, 100, False)]


def test_a_file_system_without_direct_output(tmp_path, monkeypatch):
    monkeypatch.setattr(block_output, "set_direct", lambda file, on: False)
    write(tmp_path / "f", [RANDOM])


def test_a_file_system_that_refuses_a_direct_write(tmp_path, monkeypatch):
    """Some take the flag, and then want larger pages than ours."""
    state = {"direct": False}

    def set_direct(file, on):
        state["direct"] = on
        return True

    def write_at(file, data, offset):
        if state["direct"]:
            raise OSError(errno.EINVAL, "Invalid argument")
        return _compat.write_at(file, data, offset)

    monkeypatch.setattr(block_output, "set_direct", set_direct)
    monkeypatch.setattr(block_output, "write_at", write_at)
    write(tmp_path / "f", [RANDOM])


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_any_block_is_raised_and_nothing_stays_in_flight(
    failing, tmp_path, monkeypatch
):
    real = block_output.write_all

    def write_all(file, data, offset):
        if offset == failing * BLOCK:
            raise OSError(errno.EIO, "Input/output error")
        real(file, data, offset)

    monkeypatch.setattr(block_output, "write_all", write_all)
    with open(tmp_path / "f", "wb", buffering=0) as f:
        with pytest.raises(OSError, match="Input/output error"):
            with BlockOutput(f, len(RANDOM)) as output:
                output.write(RANDOM[: 2 * BLOCK + 9])
    assert nothing_in_flight()


def test_an_error_of_the_caller_waits_for_what_is_in_flight(tmp_path):
    with open(tmp_path / "f", "wb", buffering=0) as f:
        with pytest.raises(KeyError):
            with BlockOutput(f, len(RANDOM)) as output:
                output.write(RANDOM[: BLOCK + 9])
                raise KeyError
        assert nothing_in_flight()


def test_when_python_starts_no_more_threads(tmp_path, monkeypatch):
    def start(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    write(tmp_path / "f", [RANDOM])
    with open(tmp_path / "f", "wb", buffering=0) as f:
        monkeypatch.setattr(block_output, "write_at", full_disk)
        with pytest.raises(OSError, match="No space left"):
            with BlockOutput(f, len(RANDOM)) as output:
                output.write(RANDOM)


def full_disk(file, data, offset):
    raise OSError(errno.ENOSPC, "No space left on device")


# Interrupts. Those at every line are in test_atomic


def descriptors():
    return sorted(os.listdir("/proc/self/fd"))


def test_an_interrupted_output_ends_when_nothing_is_in_flight(tmp_path, monkeypatch):
    """A real interrupt; block_output waits for its first block, or is on its way there."""
    real, written = _compat.write_at, []

    def write_at(file, data, offset):
        if offset == 0:
            os.kill(os.getpid(), signal.SIGINT)
        n = real(file, data, offset)
        written.append(offset)
        return n

    monkeypatch.setattr(block_output, "write_at", write_at)
    before, handler = descriptors(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with open(tmp_path / "f", "wb", buffering=0) as f:
            with pytest.raises(KeyboardInterrupt):
                with BlockOutput(f, 3 * len(RANDOM)) as output:
                    for _ in range(3):
                        output.write(RANDOM)
            sent = output._offset // BLOCK
            assert {i * BLOCK for i in range(sent)} <= set(written)
            assert all(job.over for job in output._in_flight)
        assert nothing_in_flight()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert descriptors() == before


def test_blocks_that_nobody_waits_for_do_not_reach_another_file(tmp_path, monkeypatch):
    """Interrupted again and again while it waits; the descriptor's number then has another file."""
    go, real = threading.Event(), _compat.write_at

    def write_at(file, data, offset):
        assert go.wait(300)
        return real(file, data, offset)

    def interrupted(job):
        raise KeyboardInterrupt

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(block_output, "write_at", write_at)
        patch.setattr(block_output.Job, "wait", interrupted)
        with open(tmp_path / "f", "wb", buffering=0) as f:
            number = f.fileno()
            with pytest.raises(KeyboardInterrupt):
                with BlockOutput(f, len(RANDOM)) as output:
                    output.write(RANDOM * 2)
        assert not all(job.over for job in output._in_flight)
        with open(tmp_path / "another", "w+b") as another:
            assert another.fileno() == number
            go.set()
            assert nothing_in_flight()
            assert another.read() == b""
    assert all(job.succeeded for job in output._in_flight)
    assert (tmp_path / "f").read_bytes()[: 2 * BLOCK] == RANDOM[: 2 * BLOCK]
    assert descriptors() == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_block_given_up_is_an_error(tmp_path, monkeypatch):
    """By an exception that is no Exception, in its thread: nothing tells what it was."""

    def write_at(file, data, offset):
        raise SystemExit

    monkeypatch.setattr(block_output, "write_at", write_at)
    with open(tmp_path / "f", "wb", buffering=0) as f:
        with pytest.raises(OSError, match="a thread was ended"):
            with BlockOutput(f, len(RANDOM)) as output:
                output.write(RANDOM[: BLOCK + 1])
    assert nothing_in_flight()


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root to mount")
def test_a_disk_that_becomes_full_in_the_middle(tmp_path):
    """On a real file system that has direct output, made in a file."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with open(image, "wb") as f:
        f.truncate(24 << 20)
    make = shutil.which("mkfs.ext4") or "false"
    mount = ["mount", "-o", "loop", str(image), str(folder)]
    for command in ([make, "-q", str(image)], mount):
        if subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            pytest.skip("cannot make and mount a file system here")
    try:
        with open(folder / "f", "wb", buffering=0) as f:
            with pytest.raises(OSError, match="No space left"):
                with BlockOutput(f, len(RANDOM)) as output:
                    output.write(RANDOM)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_fast_checksum_is_the_slow_one():
    crc32 = pytest.importorskip("isal.isal_zlib").crc32
    assert _compat.crc32 is crc32
    for size in [0, 1, 2, 15, 16, 17, 63, 64, 255, 5119, 5120, 5121, 100003]:
        for start in (0, 1, 7):
            data = RANDOM[start : start + size]
            assert crc32(data) == zlib.crc32(data)
            assert crc32(data, 12345) == zlib.crc32(data, 12345)
