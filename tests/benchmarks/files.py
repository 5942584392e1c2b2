"""From a snapshot to a durable file, alone and beside a main thread that is busy with Python."""

import os
import threading
import time

import h5py
import numpy as np
from measure import Figure, in_turn, plain_output, ratio, seconds

from tf_h5_callback.file.writer import write_checkpoint


def _tensors(count, elements):
    rng = np.random.RandomState(0)
    return {"v{}:0".format(i): rng.rand(elements).astype("f4") for i in range(count)}


def durable(folder, rounds):
    """Each file is new, and deleted afterwards; nothing else runs."""
    tensors = _tensors(24, 2048 * 2048)
    path = os.path.join(folder, "f.h5")

    def timed(action):
        os.sync()
        taken = seconds(action)
        os.remove(path)
        return taken

    sides = {
        "ours": lambda: timed(lambda: write_checkpoint(path, tensors)),
        "plain output": lambda: timed(lambda: plain_output(path, tensors.values())),
    }
    taken = in_turn(sides, rounds)
    claim = "snapshot to durable file, 403 MB, CRC included / os.write + fsync"
    return [ratio(claim, ("at most", 1.15), taken, "ours", "plain output")]


def _busy_until(thread):
    """Pure Python, as long as a thread lives; returns how long that was."""
    start, n = time.perf_counter(), 0
    thread.start()
    while thread.is_alive():
        for _ in range(1000):
            n += 1
    return time.perf_counter() - start


def _with_h5py(path, tensors):
    with h5py.File(path, "w") as f:
        for name, value in tensors.items():
            f.create_dataset(name, data=value)


def small_tensors(folder, rounds):
    """Many small tensors, written by a thread while the main thread runs Python."""
    few, many = _tensors(400, 1000), _tensors(10000, 250)
    path = os.path.join(folder, "f.h5")

    def timed(write, tensors):
        return _busy_until(threading.Thread(target=write, args=(path, tensors)))

    taken = in_turn(
        {
            "ours": lambda: timed(write_checkpoint, few),
            "h5py": lambda: timed(_with_h5py, few),
            "ours, 10,000": lambda: timed(write_checkpoint, many),
        },
        rounds,
    )
    claim = "400 small tensors beside a busy main thread, plain h5py / ours"
    claim_10000 = "10,000 small tensors beside a busy main thread, durable after"
    return [
        ratio(claim, ("at least", 100), taken, "h5py", "ours"),
        Figure(claim_10000, taken["ours, 10,000"], "s", ("at most", 1)),
    ]


def input_from_hdf5(folder, rounds):
    """The longest read of a main thread that reads its input with h5py while 1 GB is saved."""
    tensors = _tensors(16, 1 << 24)
    source = os.path.join(folder, "input.h5")
    with h5py.File(source, "w") as f:
        f["x"] = np.random.RandomState(0).rand(64, 32 * 1024).astype("f4")

    def longest(dataset, until):
        worst, i = 0.0, 0
        while not until():
            i += 1
            worst = max(worst, seconds(lambda i=i: dataset[i % 64]))
        return worst

    def beside(write):
        with h5py.File(source, "r") as f:
            end = time.perf_counter() + 0.5
            alone = longest(f["x"], lambda: time.perf_counter() > end)
            path = os.path.join(folder, "f.h5")
            thread = threading.Thread(target=write, args=(path, tensors))
            thread.start()
            worst = longest(f["x"], lambda: not thread.is_alive())
        os.remove(path)
        return 1000 * (worst - alone)

    def by_h5py(path, tensors):
        with h5py.File(path, "w") as f:
            for name, value in tensors.items():
                f.create_dataset(name, data=value)
                f.flush()

    taken = in_turn(
        {"ours": lambda: beside(write_checkpoint), "h5py": lambda: beside(by_h5py)}, rounds
    )
    claim = "a main thread that reads with h5py while 1 GB is saved waits longer than alone by"
    return [
        Figure(claim, taken["ours"], "ms", ("at most", 20)),
        Figure("the same, saved with plain h5py", taken["h5py"], "ms"),
    ]


BENCHMARKS = {
    "durable": durable,
    "small_tensors": small_tensors,
    "input_from_hdf5": input_from_hdf5,
}
