import itertools
import mmap
import os

import leak_sweep


def test_saves_leave_nothing_behind():
    rows = leak_sweep.measure(300, leak_sweep.bare)
    assert leak_sweep.leaks(rows) == []


def test_the_sweep_notices_leaks():
    held = []

    def leaky(folder):
        for i in itertools.count():
            held.append(mmap.mmap(-1, 2_000_000))  # bytes() may get memory that was freed before
            held[-1].write(bytes(2_000_000))
            if i % 5 == 0:
                held.append(open(os.devnull))
            yield

    rows = leak_sweep.measure(20, leaky)
    for item in held:
        if hasattr(item, "close"):
            item.close()
    text = " ".join(leak_sweep.leaks(rows))
    assert "descriptors grew" in text and "megabytes grew" in text
