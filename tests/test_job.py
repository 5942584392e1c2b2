import os
import subprocess
import sys
import threading

import pytest

from tf_h5_callback.job import Job, finally_twice


def test_a_job_runs_in_another_thread_and_is_over_when_it_says_so():
    go, where = threading.Event(), []

    def work():
        assert go.wait(300)
        where.append(threading.current_thread())

    job = Job(work)
    job.start("tf_h5_callback-test")
    assert not job.over and not job.succeeded and not where
    go.set()
    job.wait()
    assert job.over and job.succeeded and job.error is None
    assert where[0] is not threading.current_thread()
    assert where[0].name == "tf_h5_callback-test"


def test_an_error_is_kept_for_whoever_asks():
    def work():
        raise OSError("disk on fire")

    job = Job(work)
    job.start("test")
    job.wait()
    job.wait()
    assert job.over and not job.succeeded and str(job.error) == "disk on fire"


def test_run_and_wait_do_the_work_here_and_once():
    for do in (Job.run, Job.wait):
        where = []
        job = Job(lambda where=where: where.append(threading.current_thread()))
        do(job)
        job.run()
        job.wait()
        assert where == [threading.current_thread()] and job.succeeded


def test_many_threads_wait_and_one_of_them_works():
    done, barrier = [], threading.Barrier(8)
    job = Job(lambda: done.append(1))

    def wait():
        barrier.wait()
        job.wait()
        assert job.over and done == [1]

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [1]


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_where_no_thread_can_be_started_the_work_is_done_here(monkeypatch, error):
    def start(self):
        raise error

    where = []
    job = Job(lambda: where.append(threading.current_thread()))
    monkeypatch.setattr(threading.Thread, "start", start)
    job.start("test")
    assert job.over and where == [threading.current_thread()]


def test_what_is_no_exception_comes_out_and_the_job_is_over():
    def work():
        raise KeyboardInterrupt

    job = Job(work)
    with pytest.raises(KeyboardInterrupt):
        job.run()
    assert job.over and not job.succeeded and job.error is None


def test_the_work_is_let_go():
    class Arrays:
        pass

    import weakref

    arrays = Arrays()
    alive = weakref.ref(arrays)
    job = Job(lambda arrays=arrays: None)
    del arrays
    assert alive() is not None
    job.start("test")
    job.wait()
    assert alive() is None


def test_an_interrupted_start_is_made_up_for_by_who_waits(monkeypatch):
    """Before the thread is there, and when it is there but start() has not returned."""
    real = threading.Thread.start
    for really in (False, True):

        def start(self, really=really):
            if really:
                real(self)
            raise KeyboardInterrupt

        done = []
        job = Job(lambda done=done: done.append(1))
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(KeyboardInterrupt):
            job.start("test")
        monkeypatch.undo()
        job.wait()
        assert job.succeeded and done == [1]


def interrupted_at_each_line():
    """Yields, for each line of job.py that the loop runs, what arms an interrupt at that line."""
    import tf_h5_callback.job as module

    at = 0
    while True:
        at += 1
        lines = [0]

        def called(frame, event, arg, lines=lines, at=at):
            return line if frame.f_code.co_filename == module.__file__ else None

        def line(frame, event, arg, lines=lines, at=at):
            if event == "line":
                lines[0] += 1
                if lines[0] == at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return line

        earlier = sys.gettrace()
        try:
            yield lambda called=called: sys.settrace(called)
        finally:
            sys.settrace(earlier)
        if lines[0] < at:
            return


@pytest.mark.parametrize("begin", [Job.run, Job.wait, lambda job: job.start("test")])
def test_an_interrupt_at_any_line(begin):
    """The job is over sooner or later, whoever waits; it is never done twice."""
    for arm in interrupted_at_each_line():
        done = []
        job = Job(lambda done=done: done.append(1))
        try:
            arm()
            begin(job)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        job.wait()
        assert job.over and len(done) <= 1
        assert job.succeeded <= len(done)


def test_cleaned_up_whatever_happens():
    for arm in interrupted_at_each_line():
        state = []
        try:
            arm()
            finally_twice(lambda state=state: state.append(1), state.clear)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert state == []
    assert finally_twice(lambda: 5, lambda: None) == 5


def test_the_process_ends_after_the_job_even_if_nobody_waits(tmp_path):
    """An exception ends the main thread while the job goes on; it waits until Python is ending."""
    done = tmp_path / "done"
    code = (
        "import threading\n"
        "from tf_h5_callback.job import Job\n"
        "main = threading.main_thread()\n"
        "def work():\n"
        "    main.join()\n"
        "    open({!r}, 'w').close()\n"
        "Job(work).start('test')\n"
        "raise ValueError('training failed')\n".format(str(done))
    )
    process = subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=300
    )
    assert process.returncode == 1
    assert "ValueError: training failed" in process.stderr
    assert os.path.exists(done)
