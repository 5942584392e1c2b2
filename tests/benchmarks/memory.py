"""The peak of a save beyond training itself, by comparing whole processes."""

import json
import os
import subprocess
import sys
import tempfile

from measure import Figure, in_turn, memory

SHAPES = [[25000000]] * 4 + [[1000]] * 100
STATE = 4 * sum(shape[0] for shape in SHAPES)
LARGEST = 4 * SHAPES[0][0]
MB = 1e6


def _peak(folder, how):
    """The most memory that a training run takes, in bytes."""
    import graphs
    import tensorflow.compat.v1 as tf

    import tf_h5_callback as h5

    train_op = graphs.variables_only(SHAPES)
    hooks = []
    if how != "no saving":
        background = how == "background"
        hook = h5.H5CheckpointHook(folder, save_steps=1, background=background, max_to_keep=1)
        hooks.append(hook)
    with tf.train.SingularMonitoredSession(hooks=hooks) as session:
        for _ in range(5):
            session.run(train_op)
    return memory("VmHWM")


def peak(folder, rounds):
    def run(how):
        with tempfile.TemporaryDirectory(dir=folder) as new:  # a new run, which restores nothing
            command = [sys.executable, "-W", "ignore", os.path.abspath(__file__), new, how]
            return json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL)) / MB

    hows = ("no saving", "background", "foreground")
    taken = in_turn({how: lambda how=how: run(how) for how in hows}, rounds)
    claim = "memory at the peak, beyond that of a run without saving: 400 MB of state, "

    def beyond(how):
        return [a - b for a, b in zip(taken[how], taken["no saving"])]

    whole, largest = 1.05 * STATE / MB + 64, 1.05 * LARGEST / MB + 64
    return [
        Figure(claim + "in the background", beyond("background"), "MB", ("at most", whole)),
        Figure(
            claim + "background=False, largest tensor 100 MB",
            beyond("foreground"),
            "MB",
            ("at most", largest),
        ),
    ]


BENCHMARKS = {"memory": peak}

if __name__ == "__main__":
    print(json.dumps(_peak(*sys.argv[1:])))
