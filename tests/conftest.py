"""Fixtures. Tests that need TensorFlow skip themselves where it is not installed."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import h5py
import pytest


class FakeClock:
    """Stands in for the ``time`` module: nobody waits, and a busy machine is no later.

    Attributes:
      now: seconds.
      meanwhile: functions; each time somebody sleeps, the first is taken and called.
    """

    def __init__(self):
        self.now, self.meanwhile = 1000.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        if self.meanwhile:
            self.meanwhile.pop(0)()


@pytest.fixture(params=[False, True], ids=["ref", "resource"])
def use_resource(request):
    return request.param


@pytest.fixture
def clock(monkeypatch):
    from tf_h5_callback.folder import waiting
    from tf_h5_callback.saving import timer

    fake = FakeClock()
    for module in (timer, waiting):
        monkeypatch.setattr(module, "time", fake)
    return fake


@pytest.fixture
def damage():
    """Flips one bit in the middle of a tensor's bytes."""

    def flip(path, dataset):
        with h5py.File(path, "r") as f:
            offset, size = f[dataset].id.get_offset(), f[dataset].id.get_storage_size()
        with open(path, "r+b") as f:
            f.seek(offset + size // 2)
            byte = f.read(1)[0]
            f.seek(offset + size // 2)
            f.write(bytes([byte ^ 0x10]))

    return flip
