import threading

import pytest

pytest.importorskip("tensorflow.compat.v1")

from tf_h5_callback.graph import gate as module
from tf_h5_callback.graph.gate import RunGate


class Runner(threading.Thread):
    """A thread with one run; ``finish`` is to be set before it leaves."""

    def __init__(self, gate, leaves=True):
        super().__init__()
        self.gate, self.leaves = gate, leaves
        self.entered, self.finish = threading.Event(), threading.Event()
        self.start()

    def run(self):
        self.gate.enter()
        self.entered.set()
        assert self.finish.wait(300)
        if self.leaves:
            self.gate.leave()


def test_runs_that_have_begun_are_waited_for(monkeypatch):
    gate, events = RunGate(), []
    runner = Runner(gate)
    assert runner.entered.wait(300)
    real = gate._left.wait

    def wait(seconds):
        events.append("waited")
        runner.finish.set()
        return real(seconds)

    monkeypatch.setattr(gate._left, "wait", wait)
    assert gate.alone(lambda: events.append("alone") or 5) == 5
    assert events[0] == "waited" and events[-1] == "alone"
    runner.join()


def test_new_runs_wait_until_it_is_over():
    gate, held, waits = RunGate(), [], threading.Event()
    real = gate._opened.wait

    def wait(seconds):
        waits.set()
        return real(seconds)

    gate._opened.wait = wait

    def snapshot():
        held.append(Runner(gate))
        held[0].finish.set()
        assert waits.wait(300)
        assert not held[0].entered.is_set()

    gate.alone(snapshot)
    assert held[0].entered.wait(300)
    held[0].join()


def test_the_own_thread_may_run(monkeypatch):
    gate = RunGate()

    def nested():
        gate.enter()
        gate.leave()
        return 7

    gate.enter()
    assert gate.alone(nested) == 7
    gate.leave()


def test_a_thread_that_died_in_a_run_is_not_waited_for():
    gate = RunGate()
    runner = Runner(gate, leaves=False)
    runner.finish.set()
    runner.join()
    assert gate.alone(lambda: 1) == 1


def test_a_run_that_does_not_end_is_waited_for_once(monkeypatch, caplog):
    monkeypatch.setattr(module, "_PATIENCE_SECS", 0.0)
    monkeypatch.setattr(module, "_POLL_SECS", 0.001)
    gate = RunGate()
    runner = Runner(gate)
    assert runner.entered.wait(300)
    assert gate.alone(lambda: 1) == gate.alone(lambda: 1) == 1
    assert len(caplog.records) == 1 and "has not ended for" in caplog.text
    runner.finish.set()
    runner.join()


def test_an_error_opens_it_again():
    gate = RunGate()
    with pytest.raises(ZeroDivisionError):
        gate.alone(lambda: 1 / 0)
    runner = Runner(gate)
    assert runner.entered.wait(300)
    runner.finish.set()
    runner.join()


def test_a_gate_that_a_dead_thread_has_closed_is_open():
    gate = RunGate()
    thread = threading.Thread(target=gate._close)
    thread.start()
    thread.join()
    gate.enter()
    gate.leave()
