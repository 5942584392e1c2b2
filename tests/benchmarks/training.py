"""What saving costs training: the stall, the time added, the steps on which nothing is saved."""

import os

import graphs
import numpy as np
import tensorflow.compat.v1 as tf
from measure import Figure, in_turn, ratio, seconds

import tf_h5_callback as h5

SAVES_EACH = 20


def stall(folder, rounds):
    """One session with both hooks, which save in turn; each waits until the disk is quiet."""
    figures = []
    for kind, use_resource in [("ref", False), ("resource", True)]:
        with tf.Graph().as_default():
            train_op = graphs.dense(use_resource=use_resource)
            where = os.path.join(folder, kind)
            ours = graphs.Measured(h5.H5CheckpointHook(where + "-ours", save_steps=1), False)
            theirs = graphs.Measured(
                tf.train.CheckpointSaverHook(
                    where + "-theirs", save_steps=1, saver=tf.train.Saver(max_to_keep=2)
                ),
                False,
            )
            with tf.train.SingularMonitoredSession(hooks=[ours, theirs]) as session:
                arrays = graphs.snapshot(session.raw_session())
                buffers = [np.array(array) for array in arrays]

                def save(hook):
                    ours.hook.wait_until_finished()
                    os.sync()
                    hook.active = True
                    session.run(train_op)
                    hook.active = False
                    return hook.taken[-1]

                def copy():
                    for buffer, array in zip(buffers, arrays):
                        np.copyto(buffer, array)

                sides = {
                    "ours": lambda: save(ours),
                    "CheckpointSaverHook": lambda: save(theirs),
                    "memory copy": copy,
                }
                taken = in_turn(sides, rounds)
        about = ", 403 MB, {} variables".format(kind)
        figures += [
            ratio("stall / memory copy" + about, ("at most", 1), taken, "ours", "memory copy"),
            ratio(
                "CheckpointSaverHook's stall / ours" + about,
                ("at least", 20),
                taken,
                "CheckpointSaverHook",
                "ours",
            ),
        ]
    return figures


def added_time(folder, rounds, steps=100):
    """Windows of steps without saving, with ours, with CheckpointSaverHook, in turn."""
    train_op = graphs.dense()
    ours = graphs.Measured(h5.H5CheckpointHook(folder + "/ours", save_steps=SAVES_EACH), False)
    theirs = graphs.Measured(
        tf.train.CheckpointSaverHook(
            folder + "/theirs", save_steps=SAVES_EACH, saver=tf.train.Saver(max_to_keep=5)
        ),
        False,
    )
    with tf.train.SingularMonitoredSession(hooks=[ours, theirs]) as session:

        def window(hook=None):
            os.sync()
            if hook is not None:
                hook.active = True

            def train():
                for _ in range(steps):
                    session.run(train_op)
                ours.hook.wait_until_finished()

            taken = seconds(train)
            if hook is not None:
                hook.active = False
            return taken

        taken = in_turn(
            {
                "no saving": window,
                "ours": lambda: window(ours),
                "CheckpointSaverHook": lambda: window(theirs),
            },
            rounds,
        )
    pairs = zip(taken["ours"], taken["CheckpointSaverHook"], taken["no saving"])
    values = [(a - none) / (b - none) for a, b, none in pairs]
    claim = "time added to {} steps with 5 saves of 403 MB, ours / CheckpointSaverHook's"
    return [
        Figure(claim.format(steps), values, "", ("at most", 1 / 3), taken),
        ratio("the same, ours / no saving at all", None, taken, "ours", "no saving"),
    ]


def idle_step(folder, rounds, steps=2000):
    """A step that only counts, with a hook that does nothing and with ours, which saves nothing."""
    sides = {}
    sessions = []

    def window(session, train_op):
        for _ in range(steps):
            session.run(train_op)

    for name in ("empty hook", "ours"):
        with tf.Graph().as_default():
            train_op = tf.train.get_or_create_global_step().assign_add(1)
            hook = tf.train.SessionRunHook()
            if name == "ours":
                hook = h5.H5CheckpointHook(os.path.join(folder, name), save_steps=10**9)
            sessions.append(tf.train.MonitoredTrainingSession(hooks=[hook]))
            sides[name] = lambda s=sessions[-1], op=train_op: window(s, op)
    taken = in_turn(sides, rounds)
    for session in sessions:
        session.close()
    values = [(a - b) / steps * 1e6 for a, b in zip(taken["ours"], taken["empty hook"])]
    claim = "a step on which nothing is saved, beyond an empty hook's"
    return [Figure(claim, values, "us", ("at most", 20), taken)]


def small_model(folder, rounds, steps=150):
    """``save_steps=1`` on 1 MB: steps of 20 ms with and without."""
    work, feed = graphs.busy(20)
    with tf.control_dependencies([work]):
        train_op = graphs.variables_only([[2500]] * 100)
    hook = graphs.Measured(h5.H5CheckpointHook(folder, save_steps=1), False)
    with tf.train.SingularMonitoredSession(hooks=[hook]) as session:

        def window(active):
            hook.active = active
            for _ in range(steps):
                session.run(train_op, feed)
            hook.hook.wait_until_finished()

        sides = {"no saving": lambda: window(False), "save_steps=1": lambda: window(True)}
        taken = in_turn(sides, rounds)
        hook.active = False
    values = [100 * (a / b - 1) for a, b in zip(taken["save_steps=1"], taken["no saving"])]
    milliseconds = 1000 * float(np.median(taken["no saving"])) / steps
    claim = "save_steps=1 on a model of 1 MB with steps of {:.0f} ms: added".format(milliseconds)
    return [Figure(claim, values, "%", ("at most", 5), taken)]


BENCHMARKS = {
    "stall": stall,
    "added_time": added_time,
    "idle_step": idle_step,
    "small_model": small_model,
}
