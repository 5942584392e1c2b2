"""Restoring, everything included, against ``Saver.restore``."""

import os

import graphs
import tensorflow.compat.v1 as tf
from measure import in_turn, ratio, seconds

import tf_h5_callback as h5


def restore(folder, rounds):
    """The page cache is warm for both; ours finds the newest file, verifies it and assigns it."""
    figures = []
    for kind, use_resource in [("ref", False), ("resource", True)]:
        with tf.Graph().as_default(), tf.Session() as session:
            graphs.dense(use_resource=use_resource)
            saver = tf.train.Saver()
            h5.H5CheckpointHook(folder, save_steps=1).begin()  # the setters
            session.run(tf.global_variables_initializer())
            where = os.path.join(folder, kind)
            prefix = saver.save(session, where + "-theirs/model.ckpt")
            h5.H5CheckpointHook(where, save_steps=1)
            os.makedirs(where)
            h5.save_variables(session, os.path.join(where, "model.ckpt-0.h5"))
            h5.latest_checkpoint(where)  # into the page cache

            def ours(where=where, session=session):
                hook = h5.H5CheckpointHook(where, save_steps=1)
                hook.begin()
                return seconds(lambda: hook.after_create_session(session, None))

            sides = {"Saver": lambda: saver.restore(session, prefix), "ours": ours}
            taken = in_turn(sides, rounds)
        claim = "Saver.restore / ours with every CRC checked, 403 MB, {} variables".format(kind)
        figures.append(ratio(claim, ("at least", 2), taken, "Saver", "ours"))
    return figures


BENCHMARKS = {"restore": restore}
