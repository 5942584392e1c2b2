"""The commit protocol, and disks that fail: real file systems, real system calls."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import tf_h5_callback as h5
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
    with open(log) as f:
        return process, f.read().splitlines()


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


def test_an_error_in_the_block_leaves_the_earlier_file(tmp_path):
    path = str(tmp_path / "f")
    with atomic_write(path, 3) as f:
        f.write(b"old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path, 3) as f:
            f.write(b"ne")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


# What killed processes leave behind


def start_writer(folder):
    """A process that is in the middle of a save."""
    code = """
        import sys, time
        from tf_h5_callback.file.atomic import atomic_write
        with atomic_write(sys.argv[1] + "/model.ckpt-5.h5", 10) as f:
            f.write(b"half")
            print("writing", flush=True)
            time.sleep(600)
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
