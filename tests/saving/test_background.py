import os
import subprocess
import sys
import threading

import pytest

from tf_h5_callback.saving.background import BackgroundWriter


def test_background_job_runs_in_another_thread():
    writer, go, where = BackgroundWriter(), threading.Event(), []

    def job():
        assert go.wait(30)
        where.append(threading.current_thread())

    writer.submit(job)
    assert writer.busy and not where
    go.set()
    writer.wait()
    assert not writer.busy
    assert where[0] is not threading.current_thread()


def test_foreground_job_runs_at_once():
    writer, where = BackgroundWriter(background=False), []
    writer.submit(lambda: where.append(threading.current_thread()))
    assert where == [threading.current_thread()]
    writer.wait()


@pytest.mark.parametrize("background", [True, False])
def test_an_error_is_raised_once_by_wait(background):
    writer = BackgroundWriter(background)

    def job():
        raise OSError("disk on fire")

    writer.submit(job)
    with pytest.raises(OSError, match="disk on fire"):
        writer.wait()
    writer.wait()
    writer.submit(lambda: None)
    writer.wait()


def test_no_thread_is_left():
    before = threading.active_count()
    writer = BackgroundWriter()
    for _ in range(20):
        writer.submit(lambda: None)
        writer.wait()
    assert threading.active_count() == before


def test_the_process_ends_after_the_job_even_if_nobody_waits(tmp_path):
    done = tmp_path / "done"
    code = (
        "import time, threading\n"
        "from tf_h5_callback.saving.background import BackgroundWriter\n"
        "started = threading.Event()\n"
        "def job():\n"
        "    started.set()\n"
        "    time.sleep(0.3)\n"
        "    open({!r}, 'w').close()\n"
        "BackgroundWriter().submit(job)\n"
        "started.wait()\n"
        "raise ValueError('training failed')\n".format(str(done))
    )
    process = subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert process.returncode == 1
    assert "ValueError: training failed" in process.stderr
    assert os.path.exists(done)
