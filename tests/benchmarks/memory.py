"""The peak of a save beyond the state itself."""

import graphs
import tensorflow.compat.v1 as tf
from measure import Figure, forget_peak, memory

import tf_h5_callback as h5

MB = 1e6


def peak(folder, rounds, background=True):
    shapes = [[25000000]] * 4 + [[1000]] * 100
    state = 4 * sum(shape[0] for shape in shapes)
    largest = 4 * shapes[0][0]
    train_op = graphs.variables_only(shapes)
    hook = h5.H5CheckpointHook(folder, save_steps=1, background=background, max_to_keep=1)
    measured = graphs.Measured(hook, active=False)
    values = []
    with tf.train.SingularMonitoredSession(hooks=[measured]) as session:
        for _ in range(rounds + 1):
            session.run(train_op)
            hook.wait_until_finished()
            before = memory("VmRSS")
            forget_peak()
            measured.active = True
            session.run(train_op)
            hook.wait_until_finished()
            measured.active = False
            values.append((memory("VmHWM") - before) / MB)
    if background:
        claim = "memory at the peak of a save, beyond 400 MB of state in training"
        return [Figure(claim, values[1:], "MB", ("at most", 1.05 * state / MB + 64))]
    claim = "the same with background=False; the largest tensor has {:.0f} MB".format(largest / MB)
    return [Figure(claim, values[1:], "MB", ("at most", 1.05 * largest / MB + 64))]


BENCHMARKS = {
    "memory": peak,
    "memory_in_foreground": lambda folder, rounds: peak(folder, rounds, background=False),
}
