"""Thousands of saves in one process: threads, file descriptors and memory must stay flat.

python tests/sweeps/leak_sweep.py --saves 10000            # through the hook, in a real session
python tests/sweeps/leak_sweep.py --saves 10000 --bare     # the floors below TensorFlow
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import threading
from typing import Any, Callable, Iterator, List, Mapping, NamedTuple, Tuple

import numpy as np

from tf_h5_callback.folder.directory import CheckpointDir
from tf_h5_callback.folder.retention import Retention
from tf_h5_callback.saving.budget import SavingCost
from tf_h5_callback.saving.checkpointer import Checkpointer
from tf_h5_callback.saving.progress import Progress
from tf_h5_callback.saving.save import Save, Training
from tf_h5_callback.saving.signals import SignalRequest
from tf_h5_callback.saving.timer import SaveTimer

STATE = 100_000  # elements of float32


class Usage(NamedTuple):
    """What a process holds."""

    saves: int
    threads: int
    descriptors: int
    megabytes: float


def usage(saves: int) -> Usage:
    for thread in threading.enumerate():
        if thread.name.startswith("tf_h5_callback"):
            thread.join(60)  # what it did is done, so it ends: a leak is one that does not
    with open("/proc/self/statm") as f:
        pages = int(f.read().split()[1])
    descriptors = len(os.listdir("/proc/self/fd"))
    return Usage(saves, threading.active_count(), descriptors, pages * 4096 / 1e6)


def bare(folder: str) -> Iterator[None]:
    """Saves as the hook does, without TensorFlow; strings vary in size, so plans vary, too."""
    directory = CheckpointDir(folder, retention=Retention(max_to_keep=2))
    directory.open_for_writing()
    checkpointer = Checkpointer(
        directory, SaveTimer(1), SavingCost(), SignalRequest(None), Progress()
    )
    rng = np.random.RandomState(0)

    class Model(Training):
        def snapshot(self, owner: Save) -> Tuple[Mapping[str, Any], int]:
            state = {"w:0": np.full(STATE, step, "f4"), "global_step:0": np.array(step)}
            state["iterator"] = np.array(b"x" * rng.randint(1, 20000), dtype=object)
            return state, step

    training = Model()
    for step in itertools.count():
        checkpointer.save(step, training)
        checkpointer.collect(training)  # measured between saves
        yield


def hooked(folder: str) -> Iterator[None]:
    """Saves through the hook, at every step of a real session."""
    import tensorflow.compat.v1 as tf

    import tf_h5_callback as h5

    with tf.Graph().as_default():
        step = tf.train.get_or_create_global_step()
        w = tf.get_variable("w", [STATE], initializer=tf.zeros_initializer())
        with tf.control_dependencies([w.assign_add(tf.ones([STATE]))]):
            train_op = step.assign_add(1)
        hook = h5.H5CheckpointHook(folder, save_steps=1, max_to_keep=2)
        with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
            while True:
                session.run(train_op)
                hook.wait_until_finished()
                yield


def measure(saves: int, run: Callable[[str], Iterator[None]]) -> List[Usage]:
    """Usage after a tenth of the saves, when everything is warm, and at ten more points."""
    with tempfile.TemporaryDirectory(prefix="leak_sweep-") as folder:
        iterator = run(folder)
        rows = []
        for i in range(1, saves + 1):
            next(iterator)
            if i % (saves // 10) == 0:
                rows.append(usage(i))
        iterator.close()
    return rows


def leaks(rows: List[Usage]) -> List[str]:
    """What grew from the first measurement to the last, in words."""
    first, last = rows[0], rows[-1]
    found = []
    for name, slack in (("threads", 0), ("descriptors", 0), ("megabytes", 8)):
        if getattr(last, name) > getattr(first, name) + slack:
            found.append("{} grew: {}".format(name, [getattr(row, name) for row in rows]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=10000)
    parser.add_argument("--bare", action="store_true", help="without TensorFlow")
    args = parser.parse_args()
    rows = measure(args.saves, bare if args.bare else hooked)
    print("   saves  threads  descriptors  memory (MB)")
    for row in rows:
        print("{:8d} {:8d} {:12d} {:12.1f}".format(*row))
    found = leaks(rows)
    print("\n".join(found) or "flat")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
