"""The commit protocol, and disks that fail: real file systems, real system calls."""

import contextlib
import errno
import gc
import linecache
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import tf_h5_callback as h5
from tf_h5_callback.file import output as block_output
from tf_h5_callback.file import plan
from tf_h5_callback.file.atomic import atomic_write, is_temporary, temporary_name
from tf_h5_callback.file.writer import write_checkpoint
from tf_h5_callback.folder.directory import CheckpointDir
from tf_h5_callback.folder.lock import WriterLock

TENSORS = {"w:0": np.arange(50000, dtype="f4"), "b:0": np.arange(10, dtype="f4")}


def can_trace():
    return (
        shutil.which("strace")
        and not subprocess.run(
            ["strace", "-qq", "-o", "/dev/null", "true"], stderr=subprocess.DEVNULL
        ).returncode
    )


needs_strace = pytest.mark.skipif(not can_trace(), reason="needs strace and the right to use it")


@pytest.fixture
def tmpfs(tmp_path):
    """Mounts small file systems."""
    with contextlib.ExitStack() as stack:

        def mount(options):
            folder = str(tmp_path / "tmpfs")
            os.makedirs(folder, exist_ok=True)
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
                stderr=subprocess.DEVNULL,
            )
            if done.returncode:
                pytest.skip("needs the right to mount a tmpfs")
            stack.callback(subprocess.run, ["umount", "-l", folder], check=True)
            return folder

        yield mount


def temporaries(folder):
    return [name for name in os.listdir(folder) if is_temporary(name)]


# Names


def test_names_of_temporary_files():
    name = os.path.basename(temporary_name("/x/model.ckpt-5.h5"))
    assert name.startswith(".model.ckpt-5.h5.tf-h5-") and is_temporary(name)
    for foreign in ("model.ckpt-5.h5", ".model.ckpt-5.h5.tmp", ".x.tf-h5-12.tmp", name[1:]):
        assert not is_temporary(foreign)


# The order of things


def run_traced(tmp_path, code, *options):
    """Runs a piece of Python under strace; returns the process and the lines of the trace."""
    log = str(tmp_path / "trace")
    process = subprocess.run(
        ["strace", "-f", "-y", "-o", log, *options, sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1"),
    )
    lines, begun = [], {}
    with open(log) as f:
        for line in f.read().splitlines():
            # A call during which another thread did something is in two lines.
            pid, text = line.split(None, 1)
            if text.endswith(" <unfinished ...>"):
                begun[pid] = line[: -len(" <unfinished ...>")]
                continue
            if text.startswith("<... "):
                line = begun.pop(pid) + text.split(">", 1)[1]
            lines.append(line)
    return process, lines


SAVE = """
    import sys, os, numpy as np
    from tf_h5_callback.folder.directory import CheckpointDir
    from tf_h5_callback.file.writer import write_checkpoint
    from tf_h5_callback.folder.retention import Retention
    folder = CheckpointDir({folder!r}, retention=Retention(max_to_keep=1))
    tensors = {{"w:0": np.arange(50000, dtype="f4"), "b:0": np.arange(10, dtype="f4")}}
    for step in {steps!r}:
        write_checkpoint(folder.path_for(step), tensors, global_step=step)
        folder.remove_surplus(step)
"""


@needs_strace
def test_write_sync_rename_sync_and_only_then_delete(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    process, trace = run_traced(
        tmp_path,
        SAVE.format(folder=str(folder), steps=(1, 2)),
        "-e",
        "trace=openat,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat",
    )
    assert process.returncode == 0, process.stderr
    # When the disk fails under HDF5, errors get lost: it works in memory and opens no file.
    assert len([line for line in trace if "openat" in line and ".model.ckpt-2.h5.tf" in line]) == 1
    events = []
    for line in trace:
        if "model.ckpt-2" not in line and (str(folder) + ">") not in line and "unlink" not in line:
            continue
        call = re.sub(r"^\d+ +", "", line).split("(")[0]
        if "rename" in call:
            assert re.search(r'\.model\.ckpt-2\.h5\.tf-h5-\w+\.tmp".*/model\.ckpt-2\.h5"', line)
            events.append("rename")
        elif "unlink" in call and "model.ckpt-1.h5" in line:
            events.append("delete the old one")
        elif "fsync" in call:
            events.append("sync the folder" if (str(folder) + ">") in line else "sync the file")
        elif call == "pwrite64":
            events.append("write")
    events = events[events.index("write") :]
    first_sync = events.index("sync the file")
    assert set(events[:first_sync]) == {"write"}
    assert events[first_sync:] == [
        "sync the file",
        "rename",
        "sync the folder",
        "delete the old one",
    ]


# Faults that are injected


@needs_strace
@pytest.mark.parametrize(
    "call, error, elements",
    [(call, "EIO", 50000) for call in ("pwrite64", "fsync", "rename")]
    + [("pwrite64", "ENOSPC", 50000), ("pwrite64", "EDQUOT", 50000), ("fsync", "EDQUOT", 50000)]
    + [("pwrite64", "EIO", 3 << 20), ("pwrite64", "ENOSPC", 3 << 20)],  # direct output
)
def test_an_error_of_any_call_of_a_save(tmp_path, call, error, elements):
    """An error at the n-th call, for each n until none is left: all old files stay, no new mess."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_checkpoint(folder / "model.ckpt-1.h5", TENSORS, global_step=1)
    before = (folder / "model.ckpt-1.h5").read_bytes()
    calls = call + ",renameat,renameat2" if call == "rename" else call
    failures = 0
    for n in range(1, 100):
        process, trace = run_traced(
            tmp_path,
            SAVE.format(folder=str(folder), steps=(2,))
            .replace("max_to_keep=1", "")
            .replace("50000", str(elements)),
            "-e",
            "trace=" + calls,
            "-e",
            "inject={}:error={}:when={}".format(calls, error, n),
        )
        if not any("(INJECTED)" in line for line in trace):
            break
        assert (folder / "model.ckpt-1.h5").read_bytes() == before
        assert temporaries(folder) == []
        if process.returncode:
            failures += 1
            assert "CheckpointError: cannot save checkpoint" in process.stderr, process.stderr
            assert "model.ckpt-2.h5" in process.stderr
            if error != "EIO" and call == "pwrite64":
                assert re.search(r"[\d,]+ bytes are needed, [\d,]+ are free", process.stderr)
        for _, path in h5.list_checkpoints(folder):
            with h5.load_checkpoint(path) as checkpoint:
                checkpoint.verify()
        with contextlib.suppress(FileNotFoundError):
            os.remove(folder / "model.ckpt-2.h5")
    else:
        pytest.fail("never ended")
    assert failures >= 1


# File systems that are full


def test_preflight_says_what_is_needed_and_what_there_is(tmpfs):
    folder = tmpfs("size=1m")
    write_checkpoint(os.path.join(folder, "model.ckpt-1.h5"), TENSORS, global_step=1)
    big = {"w:0": np.zeros(1 << 19, "f4")}
    with pytest.raises(h5.CheckpointError) as error:
        write_checkpoint(os.path.join(folder, "model.ckpt-2.h5"), big, global_step=2)
    needed, free = (
        int(n.replace(",", ""))
        for n in re.search(
            r"([\d,]+) bytes are needed, ([\d,]+) are free in", str(error.value)
        ).groups()
    )
    assert 2 << 20 < needed < (2 << 20) + 50000 and free < 1 << 20
    assert os.listdir(folder) == ["model.ckpt-1.h5"]


def test_a_disk_that_fills_up_at_every_stage_of_a_save(tmpfs, monkeypatch):
    """The space check sees enough, then somebody else takes it: the save fails further and further
    on, until it fits."""
    folder = tmpfs("size=2m")
    path = os.path.join(folder, "model.ckpt-2.h5")
    write_checkpoint(os.path.join(folder, "model.ckpt-1.h5"), TENSORS, global_step=1)
    monkeypatch.setattr(
        "tf_h5_callback.file.atomic.shutil.disk_usage",
        lambda folder: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40),
    )
    filler = os.path.join(folder, "filler")
    outcomes = []
    for free in range(0, 300000, 4096):
        status = os.statvfs(folder)
        with open(filler, "wb") as f:
            f.write(b"\0" * (status.f_bavail * status.f_frsize - free))
        try:
            write_checkpoint(path, TENSORS, global_step=2)
            outcomes.append("saved")
            os.remove(path)
        except h5.CheckpointError as error:
            assert "model.ckpt-2.h5" in str(error)
            outcomes.append("failed")
        os.remove(filler)
        assert os.listdir(folder) == ["model.ckpt-1.h5"]
    with h5.load_checkpoint(folder) as checkpoint:
        checkpoint.verify()
    first = outcomes.index("saved")
    assert first > 40 and set(outcomes[first:]) == {"saved"}


def test_no_inodes_left(tmpfs):
    folder = tmpfs("size=8m,nr_inodes=3")
    write_checkpoint(os.path.join(folder, "model.ckpt-1.h5"), TENSORS, global_step=1)
    with open(os.path.join(folder, "filler"), "w"):
        pass
    with pytest.raises(h5.CheckpointError, match="cannot save checkpoint .*model.ckpt-2.h5"):
        write_checkpoint(os.path.join(folder, "model.ckpt-2.h5"), TENSORS, global_step=2)
    assert sorted(os.listdir(folder)) == ["filler", "model.ckpt-1.h5"]
    h5.load_checkpoint(folder).close()


def test_a_read_only_folder(tmpfs):
    folder = tmpfs("size=8m")
    write_checkpoint(os.path.join(folder, "model.ckpt-1.h5"), TENSORS, global_step=1)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    with pytest.raises(h5.CheckpointError, match="model.ckpt-2.h5: .*Read-only"):
        write_checkpoint(os.path.join(folder, "model.ckpt-2.h5"), TENSORS, global_step=2)
    assert h5.latest_checkpoint(folder).endswith("model.ckpt-1.h5")


def test_a_folder_that_is_deleted(tmp_path):
    folder = tmp_path / "run"
    directory = CheckpointDir(folder)
    directory.open_for_writing()
    write_checkpoint(directory.path_for(1), TENSORS)
    shutil.rmtree(str(folder))
    with pytest.raises(h5.CheckpointError, match="model.ckpt-2.h5: .*No such file or directory"):
        write_checkpoint(directory.path_for(2), TENSORS)
    directory.close()


def test_an_error_leaves_the_earlier_file(tmp_path):
    path = str(tmp_path / "f")
    assert atomic_write(path, 3, lambda f: f.write(b"old")) == 3

    def fail(f):
        f.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, 3, fail)
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


# Interrupts


class Interrupt:
    """Raises an exception where this thread begins the n-th line of the package."""

    def __init__(self, error, n):
        self._error, self._n = error, n
        self.lines, self.where = 0, ""

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(os.path.dirname(h5.__file__)):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self._n:
                path = frame.f_code.co_filename
                line = linecache.getline(path, frame.f_lineno).strip()
                self.where = "{}:{}: {}".format(os.path.basename(path), frame.f_lineno, line)
                raise self._error
        return self

    def during(self, function):
        """Calls a function; returns the type of what it raised."""
        before = sys.gettrace()  # coverage measures with it
        sys.settrace(self)
        try:
            function()
        except BaseException as error:
            return type(error)
        finally:
            sys.settrace(before)
        return None


def ours():
    return [t for t in threading.enumerate() if t.name.startswith("tf_h5_callback")]


def sweep(folder, error, every=1, fails=False):
    """An exception at every line of a save, or at each n-th; it replaces an earlier file.

    What must hold: it is raised; the earlier file is there or, whole, the new one; no temporary
    file is left, unless a save that failed was interrupted while it removed it, and then the next
    one to look for left-overs does; no descriptor is left; no block reaches a file that somebody
    opened since.

    Returns:
      Where it was raised.
    """
    path, victims = str(folder / "model.ckpt-1.h5"), [str(folder / str(i)) for i in range(4)]
    new = {name: np.full(30000, 2.0) for name in "abcde"}

    def state_of_descriptors():
        return sorted(os.listdir("/proc/self/fd"))

    def save():
        plan._plans = ()
        write_checkpoint(path, new, global_step=2)

    write_checkpoint(path, {"a": np.ones(3)}, global_step=1)
    with open(path, "rb") as f:
        earlier = f.read()
    interrupt, where = Interrupt(error, 0), []
    expected = interrupt.during(save)
    assert expected is (h5.CheckpointError if fails else None)
    descriptors = state_of_descriptors()
    for n in range(1, interrupt.lines + 1, every):
        with open(path, "wb") as f:
            f.write(earlier)
        interrupt = Interrupt(error, n)
        raised = interrupt.during(save)
        where.append(interrupt.where)
        # They get the numbers of descriptors that were closed too early.
        files = [open(victim, "w+b", buffering=0) for victim in victims]
        for thread in ours():
            thread.join(60)
        assert not ours(), interrupt.where
        for f in files:
            assert os.fstat(f.fileno()).st_size == 0, interrupt.where
            f.close()
            os.remove(f.name)
        if interrupt.where:  # not one of the last lines, which do not always come as many
            allowed = {error} | ({h5.CheckpointError} if error is MemoryError or fails else set())
            if error is MemoryError and "job.py" in interrupt.where:
                allowed.add(None)  # there was none for a thread: the work is done here
            assert raised in allowed, interrupt.where
        if fails and state_of_descriptors() != descriptors:
            gc.collect()  # two exceptions can make circles that hold a descriptor
            if ": with " in interrupt.where:
                # Python 3.11 to 3.13 never free what a tracer raises where another exception ends a
                # `with` block, nor what is in its frames.
                descriptors = state_of_descriptors()
        assert state_of_descriptors() == descriptors, interrupt.where
        if fails and temporaries(folder):
            assert "atomic.py" in interrupt.where
            with WriterLock(str(folder)) as lock:
                assert lock.remove_leftovers() == []
        assert os.listdir(str(folder)) == [os.path.basename(path)], interrupt.where
        with open(path, "rb") as f:
            content = f.read()
        if content != earlier:
            assert not fails, interrupt.where
            with h5.load_checkpoint(path) as checkpoint:
                assert checkpoint.step == 2
                assert all((value == 2).all() for value in checkpoint.read_all().values())
    return where


@pytest.fixture
def small_blocks(monkeypatch):
    """Of which some are in flight at any time."""
    real = block_output.write_at

    def write_at(file, data, offset):
        time.sleep(0.001)
        return real(file, data, offset)

    monkeypatch.setattr(block_output, "_BLOCK_SIZE", 128 << 10)
    monkeypatch.setattr(block_output, "write_at", write_at)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


EVERY = int(os.environ.get("EVERY_NTH_LINE", "11"))  # 1: all; takes a minute

# Files that were open in a frame that was left so are closed by Python, which says so.
interrupts = pytest.mark.filterwarnings("ignore::ResourceWarning")


@interrupts
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_at_any_line(error, tmp_path, small_blocks):
    where = sweep(tmp_path, error, EVERY)
    assert {w.split(":")[0] for w in where if w} >= {
        *("writer.py", "plan.py", "atomic.py", "output.py", "job.py")
    }


@interrupts
def test_an_interrupt_at_each_line_of_a_small_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    sweep(tmp_path, KeyboardInterrupt)


@interrupts
def test_an_interrupt_at_any_line_without_threads(tmp_path, small_blocks, monkeypatch):
    """For blocks; HDF5 itself does not survive an interrupt, and has its thread."""
    real = threading.Thread.start

    def start(thread):
        if thread.name == "tf_h5_callback-output":
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    sweep(tmp_path, KeyboardInterrupt, EVERY)


@interrupts
def test_an_interrupt_at_any_line_of_a_save_that_fails(tmp_path, small_blocks, monkeypatch):
    real = block_output.write_all

    def write_all(file, data, offset):
        if offset > 300000:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, data, offset)

    monkeypatch.setattr(block_output, "write_all", write_all)
    sweep(tmp_path, KeyboardInterrupt, EVERY, fails=True)


# What killed processes leave behind


def start_writer(folder):
    """A process that is in the middle of a save."""
    code = """
        import sys, time
        from tf_h5_callback.file.atomic import atomic_write

        def write(f):
            f.write(b"half")
            print("writing", flush=True)
            time.sleep(600)

        atomic_write(sys.argv[1] + "/model.ckpt-5.h5", 10, write)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"writing\n"
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_left_overs_of_the_dead_are_removed_those_of_the_living_never(tmp_path):
    (tmp_path / "somebody's.tmp").write_bytes(b"")
    dead, living = start_writer(tmp_path), start_writer(tmp_path)
    try:
        kill(dead)
        assert len(temporaries(tmp_path)) == 2
        with WriterLock(str(tmp_path)) as lock:
            assert len(lock.remove_leftovers()) == 2  # one is alive: none is touched
        assert len(temporaries(tmp_path)) == 2
    finally:
        kill(living)
    with WriterLock(str(tmp_path)) as lock:
        assert lock.remove_leftovers() == []
    assert os.listdir(tmp_path) == ["somebody's.tmp"]


def test_looking_for_left_overs_in_vain_keeps_the_lock(tmp_path):
    """flock() gives up the lock it had when it cannot be made exclusive."""
    (tmp_path / os.path.basename(temporary_name("x"))).write_bytes(b"")
    first, second = WriterLock(str(tmp_path)), WriterLock(str(tmp_path))
    assert len(second.remove_leftovers()) == 1
    first.close()
    with WriterLock(str(tmp_path)) as third:
        assert len(third.remove_leftovers()) == 1
    second.close()
    with WriterLock(str(tmp_path)) as fourth:
        assert fourth.remove_leftovers() == []


def test_a_second_process_is_named(tmp_path, caplog):
    other = start_writer(tmp_path)
    directory = CheckpointDir(tmp_path)
    try:
        directory.open_for_writing()
        assert "is used for writing by another process: pid {} (".format(other.pid) in caplog.text
        assert "atomic_write" in caplog.text  # its command line
    finally:
        directory.close()
        kill(other)
    caplog.clear()
    directory.open_for_writing()
    directory.open_for_writing()
    directory.close()
    assert caplog.text == ""


def test_locks_are_no_leak(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        CheckpointDir(tmp_path).open_for_writing()
    assert len(os.listdir("/proc/self/fd")) == before
