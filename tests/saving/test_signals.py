import itertools
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from tf_h5_callback.saving import signals
from tf_h5_callback.saving.signals import SignalRequest

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGWINCH)


def send(number=signal.SIGTERM):
    """To this very thread, so that it has come, and Python has run the handlers, on return."""
    signal.pthread_kill(threading.get_ident(), number)


class Foreign:
    """Somebody else's handler: calls what it has found in place, or not, and puts it back."""

    def __init__(self, calls_on=True):
        self.calls_on, self.heard = calls_on, 0

    def install(self, number=signal.SIGTERM):
        self.number, self.found = number, signal.signal(number, self)

    def restore(self):
        signal.signal(self.number, self.found)

    def __call__(self, number, frame):
        self.heard += 1
        if self.calls_on:
            self.found(number, frame)


class Run:
    """A training run with a request; `died` is what is known of one whose hook was not told."""

    def __init__(self, *numbers):
        self.died = False
        self.request = SignalRequest(numbers or signal.SIGTERM, is_over=lambda: self.died)
        self.install, self.restore = self.request.install, self.request.restore

    def has_noted(self):
        noted = self.request.save, self.request.stop
        assert noted in [(True, True), (False, False)]
        self.request.save = self.request.stop = False
        return noted == (True, True)


@pytest.fixture(autouse=True)
def handlers():
    """Whatever a test does, the process gets its handlers back."""
    earlier = {number: signal.getsignal(number) for number in NUMBERS}
    yield earlier
    signals._waiting.clear()
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.fixture
def first(handlers):
    """In place before all others."""
    foreign = Foreign(calls_on=False)
    foreign.install()
    return foreign


# Noted


def test_none(handlers):
    request = SignalRequest(None)
    request.install()
    assert {number: signal.getsignal(number) for number in NUMBERS} == handlers
    request.restore()


@pytest.mark.parametrize(
    "number, stop", [(signal.SIGTERM, True), (signal.SIGUSR1, False), (signal.SIGINT, True)]
)
def test_noted_and_put_back(number, stop):
    earlier = signal.getsignal(number)
    request = SignalRequest(number)
    request.install()
    request.install()
    assert not request.save and not request.stop
    send(number)
    assert request.save and request.stop == stop
    request.restore()
    assert signal.getsignal(number) == earlier
    assert not request.save and not request.stop  # for the next run


def test_taken_once():
    request = SignalRequest(signal.SIGTERM)
    request.install()
    assert not request.take()
    send()
    assert request.take() and not request.take()
    assert request.stop


def test_several_signals_and_the_earlier_handler(first):
    request = SignalRequest(iter([signal.SIGUSR1, signal.SIGTERM]))
    request.install()
    send(signal.SIGUSR1)
    assert (request.save, request.stop) == (True, False)
    send()
    assert (request.save, request.stop) == (True, True)
    assert first.heard == 1
    request.restore()
    send()
    assert first.heard == 2


def test_each_hears_of_its_own_signals(first):
    term, both = Run(), Run(signal.SIGTERM, signal.SIGUSR1)
    term.install()
    both.install()
    send(signal.SIGUSR1)
    assert not term.request.save and both.request.save
    both.restore()
    send()
    assert term.has_noted()


def test_ctrl_c_is_noted_and_then_is_what_it_was():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request = SignalRequest(signal.SIGINT)
    request.install()
    send(signal.SIGINT)
    assert request.stop
    request.restore()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_a_signal_that_was_ignored():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run = Run()
    run.install()
    send()
    assert run.has_noted()
    run.died = True
    send()
    assert not run.has_noted()
    run.restore()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_handler_that_python_did_not_install(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: None)
        run = Run()
        run.install()
    send()
    assert run.has_noted()
    run.restore()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# The chain


@pytest.mark.parametrize("names", ["ab", "abF", "abc", "abcF"])
def test_whoever_ends_first(names, first):
    """All orders of beginning and of ending; F is a foreign handler, which may stay for good."""
    cases = 0
    for begin in itertools.permutations(names):
        for end in itertools.permutations(names):
            check_order(begin, end, first)
            cases += 1
            if "F" in names and end[-1] == "F":
                check_order(begin, end[:-1], first)
                cases += 1
    assert cases >= 4


def check_order(begin, end, first):
    if "F" in end and begin[0] == "F":
        return  # it would put back what was there before ours, over ours: nobody could help that
    members = {name: Foreign() if name == "F" else Run() for name in begin}
    foreign = members.get("F")
    there = set()

    def check():
        before = first.heard, foreign and foreign.heard
        send()
        heard = {name for name in members if name != "F" and members[name].has_noted()}
        assert heard == there - {"F"}, (begin, end)
        assert first.heard == before[0] + 1, (begin, end)
        if foreign:
            assert foreign.heard == before[1] + ("F" in there), (begin, end)

    for name in begin:
        members[name].install()
        there.add(name)
        check()
    for name in end:
        members[name].restore()
        there.remove(name)
        check()
    later = Run()  # F may have put back a handler of ours when all had ended
    later.install()
    later.restore()
    assert signal.getsignal(signal.SIGTERM) is (foreign if there else first), (begin, end)
    signal.signal(signal.SIGTERM, first)


@pytest.mark.parametrize("times", [1, 2])
def test_runs_that_died_do_no_harm_to_the_next(times, first):
    dead = [Run() for _ in range(times)]
    for run in dead:
        run.install()
        run.died = True
    run = Run()
    run.install()
    send()
    assert run.has_noted() and first.heard == 1
    assert not any(run.has_noted() for run in dead)
    run.restore()
    assert signal.getsignal(signal.SIGTERM) is first


def test_a_run_that_died_passes_signals_on(first):
    run = Run()
    run.install()
    run.died = True
    send()
    assert first.heard == 1 and not run.has_noted()


def test_ctrl_c_after_a_run_that_died():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = Run(signal.SIGINT)
    run.install()
    run.died = True
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_a_foreign_handler_that_calls_nobody(first):
    run, foreign = Run(), Foreign(calls_on=False)
    run.install()
    foreign.install()
    run.install()
    send()
    assert (foreign.heard, first.heard) == (1, 0) and not run.has_noted()
    run.restore()
    assert signal.getsignal(signal.SIGTERM) is foreign


def test_a_foreign_handler_is_in_place_again_after_a_default_that_does_nothing():
    signal.signal(signal.SIGWINCH, signal.SIG_DFL)
    run, foreign = Run(signal.SIGWINCH), Foreign()
    run.install()
    foreign.install(signal.SIGWINCH)
    run.died = True
    send(signal.SIGWINCH)
    send(signal.SIGWINCH)
    assert foreign.heard == 2


def test_what_came_before_the_session_was_made_anew_is_kept(first):
    run, other = Run(), Run()
    run.install()
    send()
    run.died = True  # so it looks while there is no session
    other.install()
    other.restore()
    assert signal.getsignal(signal.SIGTERM) is first
    run.died = False
    run.install()
    assert run.has_noted()
    send()
    assert run.has_noted()


# Threads, interrupts, failures


def in_thread(function):
    """What it raises in another thread."""
    errors = []

    def target():
        try:
            function()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return errors


@pytest.mark.parametrize("another", [False, True], ids=["alone", "beside another"])
def test_not_in_another_thread(another, handlers):
    if another:
        Run(signal.SIGTERM).install()
        handlers = {number: signal.getsignal(number) for number in NUMBERS}
    run = Run(signal.SIGTERM, signal.SIGUSR1)
    (error,) = in_thread(run.install)
    assert isinstance(error, RuntimeError) and "main thread" in str(error)
    assert {number: signal.getsignal(number) for number in NUMBERS} == handlers
    assert run.request not in signals._waiting
    assert in_thread(SignalRequest(None).install) == []


def test_the_end_in_another_thread(first):
    run = Run()
    run.install()
    assert in_thread(run.restore) == []
    send()
    assert first.heard == 1 and not run.has_noted()
    run.restore()
    assert signal.getsignal(signal.SIGTERM) is first


def test_a_signal_that_cannot_be_caught(handlers):
    with pytest.raises(OSError):
        Run(signal.SIGTERM, signal.SIGKILL).install()
    assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]


class InterruptAt:
    """Raises KeyboardInterrupt before the n-th line that runs in the module."""

    def __init__(self, n):
        self.left = n

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename != signals.__file__:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def during(self, function):
        """Whether it came to that."""
        tracing = sys.gettrace()
        sys.settrace(self)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(tracing)
        return False


@pytest.mark.parametrize("where", ["install", "restore"])
@pytest.mark.parametrize("another", [False, True], ids=["alone", "beside another"])
def test_an_interrupt_at_any_line(where, another, first):
    others = [Run()] if another else []
    for n in itertools.count(1):
        run = Run(signal.SIGUSR1, signal.SIGTERM)
        for other in others:
            other.install()
        if where == "restore":
            run.install()
        interrupted = InterruptAt(n).during(getattr(run, where))
        heard = first.heard
        send()
        assert first.heard == heard + 1, n
        assert all(other.has_noted() for other in others), n
        run.has_noted()  # both are right: it was interrupted before, or after
        run.install()
        send()
        assert first.heard == heard + 2 and run.has_noted(), n
        run.restore()
        for other in others:
            other.restore()
        assert signal.getsignal(signal.SIGTERM) is first, n
        if not interrupted:
            break
    assert n > 10


# Death, in processes of their own

PRELUDE = """
    import os, signal, threading
    from tf_h5_callback.saving.signals import SignalRequest

    def send():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    def user(number, frame):
        print("user")
        found(number, frame)

    def request():
        made = SignalRequest(signal.SIGTERM, is_over=lambda: made in dead)
        made.install()
        return made

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    dead = []
"""


def run_until_sigterm(code):
    """The words that it prints; then SIGTERM must end it."""
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(code) + "\nsend()\nprint('still here')\n"
    process = subprocess.run(
        [sys.executable, "-u", "-c", code],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == -signal.SIGTERM, process
    return process.stdout.split()


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_two_hooks_in_one_session_and_afterwards_sigterm_terminates(order):
    code = """
        a, b = request(), request()
        send()
        print(a.stop, b.stop)
        {}.restore()
        send()
        {}.restore()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    """
    assert run_until_sigterm(code.format(*order)) == ["True", "True"]


def test_after_a_run_that_died_sigterm_terminates():
    assert run_until_sigterm("dead.append(request())") == []


def test_after_runs_that_died_and_one_that_ended_sigterm_terminates():
    code = """
        dead.append(request())
        dead.append(request())
        last = request()
        send()
        print(last.stop)
        last.restore()
    """
    assert run_until_sigterm(code) == ["True"]


def test_a_foreign_handler_in_between_and_afterwards_sigterm_terminates():
    code = """
        a = request()
        found = signal.signal(signal.SIGTERM, user)
        b = request()
        send()
        print(a.stop, b.stop)
        a.restore()
        send()  # the user's calls ours of a, which has ended, but b stands in for the default
        b.restore()
        assert signal.getsignal(signal.SIGTERM) is user
    """
    assert run_until_sigterm(code) == ["user", "True", "True", "user", "user"]


def test_a_handler_of_ours_that_is_put_back_late_lets_sigterm_terminate():
    code = """
        a = request()
        found = signal.signal(signal.SIGTERM, user)
        a.restore()
        signal.signal(signal.SIGTERM, found)
    """
    assert run_until_sigterm(code) == []


def test_a_forked_worker_is_terminated():
    code = """
        a = request()
        pid = os.fork()
        if not pid:
            send()
            os._exit(0)
        print(os.waitpid(pid, 0)[1] == signal.SIGTERM, a.stop)
        a.restore()
    """
    assert run_until_sigterm(code) == ["True", "False"]
