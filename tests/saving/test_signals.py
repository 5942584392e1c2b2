import os
import signal
import threading

import pytest

from tf_h5_callback.saving.signals import SignalRequest


def send(number):
    os.kill(os.getpid(), number)
    signal.getsignal(number)  # Python runs handlers between two of its instructions


@pytest.fixture(autouse=True)
def handlers():
    """Whatever a test does, the process gets its handlers back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    earlier = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


def test_none():
    request = SignalRequest(None)
    request.install()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
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


def test_several_signals_and_the_earlier_handlers():
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    request = SignalRequest([signal.SIGUSR1, signal.SIGTERM])
    request.install()
    send(signal.SIGUSR1)
    assert (request.save, request.stop) == (True, False)
    send(signal.SIGTERM)
    assert (request.save, request.stop) == (True, True)
    assert heard == [signal.SIGTERM]
    request.restore()
    send(signal.SIGTERM)
    assert heard == [signal.SIGTERM] * 2


def test_when_nobody_listens_any_more_the_earlier_handler_gets_the_signal():
    heard, over = [], []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    request = SignalRequest(signal.SIGTERM, is_over=lambda: bool(over))
    request.install()
    over.append(True)
    send(signal.SIGTERM)
    assert heard == [signal.SIGTERM] and not request.save


def test_not_in_another_thread():
    errors = []

    def install():
        try:
            SignalRequest(signal.SIGTERM).install()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]
