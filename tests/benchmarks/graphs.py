"""The models that are trained, and hooks around the hooks that are measured."""

import time

import numpy as np
import tensorflow.compat.v1 as tf

tf.disable_v2_behavior()

WIDTH = 2048


def dense(layers=8, width=WIDTH, use_resource=False, batch=16):
    """Dense layers with Adam: three times ``4 * layers * width ** 2`` bytes; 8 of 2048: 403 MB."""
    x = tf.constant(np.random.RandomState(0).rand(batch, width).astype("f4"))
    with tf.variable_scope("net", use_resource=use_resource):
        for i in range(layers):
            w = tf.get_variable("w{}".format(i), [width, width])
            x = tf.nn.relu(tf.matmul(x, w))
    loss = tf.reduce_mean(tf.square(x - 1))
    with tf.variable_scope("train", use_resource=use_resource):
        step = tf.train.get_or_create_global_step()
        return tf.train.AdamOptimizer(1e-4).minimize(loss, step)


def variables_only(shapes, use_resource=False):
    """Variables of these shapes; a step adds one to the first and to the global step."""
    step = tf.train.get_or_create_global_step()
    with tf.variable_scope("state", use_resource=use_resource):
        variables = [
            tf.get_variable("v{}".format(i), shape, initializer=tf.random_uniform_initializer())
            for i, shape in enumerate(shapes)
        ]
    with tf.control_dependencies([variables[0].assign_add(tf.ones(shapes[0]))]):
        return step.assign_add(1)


def busy(milliseconds):
    """An operation that computes for about so long on one core."""
    size = 256
    count = tf.placeholder(tf.int32, [], name="count")
    a = tf.constant(np.full([size, size], 1 / size, "f4"))
    _, result = tf.while_loop(
        lambda i, m: i < count, lambda i, m: (i + 1, tf.matmul(m, a)), [0, a], parallel_iterations=1
    )
    op = tf.reduce_sum(result)
    with tf.Session() as session:
        session.run(op, {"count:0": 100})
        start = time.perf_counter()
        session.run(op, {"count:0": 400})
        n = int(400 * milliseconds / 1000 / (time.perf_counter() - start))
    return op, {"count:0": max(1, n)}


class Measured(tf.train.SessionRunHook):
    """Another hook that acts only while ``active``, and how long its ``after_run`` takes.

    Attributes:
      active: whether steps reach the hook.
      taken: seconds of each ``after_run``.
    """

    def __init__(self, hook, active=True):
        self.hook, self.active, self.taken = hook, active, []

    def begin(self):
        self.hook.begin()

    def after_create_session(self, session, coord):
        self.hook.after_create_session(session, coord)

    def before_run(self, run_context):
        return self.hook.before_run(run_context) if self.active else None

    def after_run(self, run_context, run_values):
        if self.active:
            start = time.perf_counter()
            self.hook.after_run(run_context, run_values)
            self.taken.append(time.perf_counter() - start)

    def end(self, session):
        self.hook.end(session)


def snapshot(session):
    """A copy of all global variables, as arrays."""
    return [np.array(value) for value in session.run(tf.global_variables())]
