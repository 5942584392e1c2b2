"""What saving costs training: the stall, the time added, the steps on which nothing is saved."""

import os
import statistics
import time

import graphs
import numpy as np
import tensorflow.compat.v1 as tf
from measure import Figure, in_turn, ratio, seconds

import tf_h5_callback as h5

SAVES_EACH = 20


def stall(folder, rounds, kind, train_op=None, about="403 MB", promised=True):
    """One session with both hooks, which save in turn; each waits until the disk is quiet."""
    if train_op is None:
        train_op = graphs.dense(use_resource=kind == "resource")
    ours = graphs.Measured(h5.H5CheckpointHook(folder + "/ours", save_steps=1), False)
    theirs = graphs.Measured(
        tf.train.CheckpointSaverHook(
            folder + "/theirs", save_steps=1, saver=tf.train.Saver(max_to_keep=2)
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
    about = ", {}, {} variables".format(about, kind)
    copies, saver = "memory copy", "CheckpointSaverHook"
    limits = [("at most", 1), ("at least", 20)] if promised else [None, None]
    return [
        ratio("stall / memory copy" + about, limits[0], taken, "ours", copies),
        ratio(saver + "'s stall / ours" + about, limits[1], taken, saver, "ours"),
    ]


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


def idle_step(folder, rounds, steps=100, windows=30):
    """Steps without a save: with a hook that does nothing, with one that fetches, and with ours."""
    figures = []
    for about, model in [
        ("two layers of 16 with Adam", lambda: graphs.dense(layers=2, width=16)),
        ("only a counter", lambda: tf.train.get_or_create_global_step().assign_add(1)),
    ]:
        sessions = {}
        for name in ("empty hook", "fetches the step", "ours"):
            with tf.Graph().as_default():
                train_op = model()
                hook = tf.train.SessionRunHook()
                if name == "ours":
                    hook = h5.H5CheckpointHook(os.path.join(folder, about), save_steps=10**9)
                if name == "fetches the step":
                    step = tf.train.get_global_step()
                    hook.before_run = lambda _, step=step: tf.train.SessionRunArgs(step)
                sessions[name] = tf.train.MonitoredTrainingSession(hooks=[hook]), train_op
        taken = {name: [] for name in sessions}
        for _ in range(rounds + 1):
            each = {name: [] for name in sessions}
            for _ in range(windows):  # short ones in turn: the machine's speed drifts
                for name, (session, train_op) in sessions.items():
                    start = time.perf_counter()
                    for _ in range(steps):
                        session.run(train_op)
                    each[name].append((time.perf_counter() - start) / steps)
            for name, values in each.items():
                taken[name].append(statistics.median(values))
        for session, _ in sessions.values():
            session.close()
        taken = {name: values[1:] for name, values in taken.items()}

        def beyond(side, taken=taken):
            return [(a - b) * 1e6 for a, b in zip(taken[side], taken["empty hook"])]

        claim = "a step on which nothing is saved, beyond an empty hook's, {}".format(about)
        figures.append(Figure(claim, beyond("ours"), "us", ("at most", 20), taken))
        claim = "the same with a hook that only fetches the global step"
        figures.append(Figure("{}, {}".format(claim, about), beyond("fetches the step"), "us"))
    return figures


def small_model(folder, rounds, steps=150):
    """``save_steps=1`` on 1 MB in 27 tensors: steps of 20 ms with and without.

    Once most of a step is an operation that computes in the caches, once it is the model itself
    with a large batch, which needs all of the memory's bandwidth.
    """
    with tf.Graph().as_default():
        work, feed = graphs.busy(20)
        with tf.control_dependencies([work]):
            train_op = graphs.dense(layers=8, width=102)
        figure = _each_step(os.path.join(folder, "1"), rounds, steps, train_op, feed)
    batch = 2000
    with tf.Graph().as_default():
        train_op = graphs.dense(layers=8, width=102, batch=batch)
        with tf.train.SingularMonitoredSession() as session:
            taken = [seconds(lambda: session.run(train_op)) for _ in range(100)]
    with tf.Graph().as_default():
        batch = int(batch * 0.02 / statistics.median(taken))
        train_op = graphs.dense(layers=8, width=102, batch=batch)
        about = ", with a batch of {:,}".format(batch)
        large = _each_step(os.path.join(folder, "2"), rounds, steps, train_op, None, about)
    return [figure, large]


def _each_step(folder, rounds, steps, train_op, feed, about=""):
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
    claim = "save_steps=1 on 1 MB in 27 tensors with steps of {:.0f} ms{}: added"
    return Figure(claim.format(milliseconds, about), values, "%", ("at most", 5), taken)


BENCHMARKS = {
    "stall_ref": lambda folder, rounds: stall(folder, rounds, kind="ref"),
    "stall_resource": lambda folder, rounds: stall(folder, rounds, kind="resource"),
    "added_time": added_time,
    "idle_step": idle_step,
    "small_model": small_model,
}
