"""The budget, the models, the peers, and how cost grows."""

import contextlib
import os
import time

import graphs
import numpy as np
import tensorflow.compat.v1 as tf
from files import _tensors, _with_h5py
from measure import Figure, in_turn, plain_output, ratio
from training import stall

import tf_h5_callback as h5
from tf_h5_callback._compat import crc32
from tf_h5_callback.file import output as block_output
from tf_h5_callback.file.writer import write_checkpoint

MODELS = {
    "1 MB": [[2500]] * 100,
    "100 MB": [[1 << 20]] * 24,
    "10,000 small tensors": [[250]] * 10000,
    "one tensor of 2 GB": [[1 << 29]],
    "an embedding table, 1,000,000 x 128": [[1000000, 128]],
}


def budget(folder, rounds, max_overhead=0.1, pairs=8):
    """Short windows of training in turn, with saving and without: the machine's speed drifts.

    The hook is there in both: what it costs on each step is another line. A window ends when no
    file is being written.
    """
    figures = []
    for about, layers, width, steps, slow in [
        ("403 MB", 8, 2048, 20, False),
        ("50 MB", 4, 1024, 80, False),
        ("13 MB", 4, 512, 250, False),
        ("50 MB, disk four times as slow half-way", 4, 1024, 80, True),
    ]:
        with tf.Graph().as_default():
            train_op = graphs.dense(layers, width)
            where = os.path.join(folder, about)
            hook = h5.H5CheckpointHook(where, max_overhead=max_overhead, max_to_keep=2)
            account = hook._timer._budget
            with tf.train.SingularMonitoredSession(hooks=[hook]) as session:

                def window(saving):
                    hook._timer._budget = hook._cost._budget = account if saving else None
                    hook._cost._step_began = None  # the pause is not training
                    start, n = time.perf_counter(), 0
                    while n < steps or (saving and hook._saver.busy):
                        session.run(train_op)
                        n += 1
                    return (time.perf_counter() - start) / n

                taken = {"saving": [], "none": []}
                for i in range(rounds + 1):
                    sums = dict.fromkeys(taken, 0.0)
                    for pair in range(pairs):
                        sides = sorted(sums, reverse=pair % 2 == 0)
                        with _slow_disk(slow and pair >= pairs / 2):
                            for side in sides:
                                sums[side] += window(side == "saving")
                    for side in taken if i else ():  # it learns in the first one
                        taken[side].append(sums[side] / pairs)
        values = [(a / b - 1) / max_overhead for a, b in zip(taken["saving"], taken["none"])]
        claim = "max_overhead={}: added time / budget (0.8 to 1.2), {}".format(max_overhead, about)
        figures.append(Figure(claim, values, "", None, taken))
    return figures


@contextlib.contextmanager
def _slow_disk(slow):
    """Output takes four times as long."""
    real = block_output.write_at

    def write_slowly(file, view, offset):
        start = time.monotonic()
        n = real(file, view, offset)
        time.sleep(3 * (time.monotonic() - start))
        return n

    block_output.write_at = write_slowly if slow else real
    try:
        yield
    finally:
        block_output.write_at = real


def models(folder, rounds):
    """The stall for other models; nothing is promised of these."""
    figures = []
    for i, (about, shapes) in enumerate(MODELS.items()):
        with tf.Graph().as_default():
            train_op = graphs.variables_only(shapes, use_resource=True)
            where = os.path.join(folder, str(i))
            figures += stall(where, rounds, "resource", train_op, about, promised=False)
    return figures


def peers(folder, rounds):
    """Saving the same 403 MB of arrays; only ours and plain output make them durable."""
    tensors = _tensors(24, 2048 * 2048)
    path = os.path.join(folder, "f")

    def timed(action):
        def run():
            os.sync()
            start = time.perf_counter()
            action()
            taken = time.perf_counter() - start
            for name in os.listdir(folder):
                os.remove(os.path.join(folder, name))
            return taken

        return run

    sides = {
        "ours": timed(lambda: write_checkpoint(path, tensors)),
        "os.write, fsync": timed(lambda: plain_output(path, tensors.values())),
        "numpy.savez": timed(lambda: np.savez(path, **tensors)),
        "h5py": timed(lambda: _with_h5py(path, tensors)),
    }
    try:
        from safetensors.numpy import save_file

        sides["safetensors"] = timed(lambda: save_file(tensors, path))
    except ImportError:
        pass
    taken = in_turn(sides, rounds)
    return [
        ratio("403 MB of arrays, {} / ours".format(side), None, taken, side, "ours")
        for side in sides
        if side != "ours"
    ]


def unchanged(folder, rounds):
    """What leaving out nine tenths of the bytes could save, if all are still summed up."""
    tensors = _tensors(24, 2048 * 2048)
    changed = dict(list(tensors.items())[:2])
    path = os.path.join(folder, "f")

    def cost(some, rest):
        os.sync()
        start = time.perf_counter()
        write_checkpoint(path, some)
        for value in rest:
            crc32(value)
        taken = time.perf_counter() - start
        os.remove(path)
        return taken

    sides = {
        "all": lambda: cost(tensors, []),
        "a tenth": lambda: cost(changed, list(tensors.values())[2:]),
    }
    walls = in_turn(sides, rounds)
    claim = "time to durable, a tenth of 403 MB written and all summed up / all written"
    return [ratio(claim, None, walls, "a tenth", "all")]


def growth(folder, rounds):
    """Seconds to durable by bytes and by tensors, ours and plain h5py; the data of the plot."""
    path = os.path.join(folder, "f")
    figures = []
    for axis, cases in [
        ("bytes", {4 * n * 16: (16, n) for n in (1 << 14, 1 << 17, 1 << 20, 1 << 23, 1 << 25)}),
        ("tensors", {n: (n, 250) for n in (10, 100, 1000, 10000)}),
    ]:
        for x, (count, elements) in cases.items():
            tensors = _tensors(count, elements)

            def plain(tensors=tensors):
                _with_h5py(path, tensors)
                with open(path, "rb") as f:
                    os.fsync(f.fileno())

            def each(write):
                os.sync()
                start = time.perf_counter()
                write()
                taken = time.perf_counter() - start
                os.remove(path)
                return taken

            sides = {
                "ours": lambda: each(lambda: write_checkpoint(path, tensors)),
                "h5py": lambda: each(plain),
            }
            taken = in_turn(sides, rounds)
            figures.append(Figure("{} {}: ours".format(axis, x), taken["ours"], "s"))
            figures.append(Figure("{} {}: h5py".format(axis, x), taken["h5py"], "s"))
    return figures


BENCHMARKS = {
    "budget": budget,
    "models": models,
    "peers": peers,
    "unchanged": unchanged,
    "growth": growth,
}
