"""Restoring, everything included, against ``Saver.restore``, in fresh processes."""

import json
import os
import subprocess
import sys

from measure import have_memory, in_turn, ratio, seconds


def _restore(folder, kind, side):
    """As a script that is started again does: a new process, variables initialised, restored."""
    import graphs
    import tensorflow.compat.v1 as tf

    import tf_h5_callback as h5

    graphs.dense(use_resource=kind == "resource")
    saver = tf.train.Saver()
    path = os.path.join(folder, kind + "-ours", "model.ckpt-0.h5")
    prefix = os.path.join(folder, kind + "-theirs", "model.ckpt")
    hook = h5.H5CheckpointHook(os.path.dirname(path), save_steps=1)
    hook.begin()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        if side == "save":
            h5.save_variables(session, path)
            saver.save(session, prefix)
            return 0.0
        for name in (path, prefix + ".data-00000-of-00001"):  # into the page cache
            with open(name, "rb") as f:
                while f.read(1 << 24):
                    pass
        have_memory(3 << 29)
        if side == "ours":
            return seconds(lambda: hook.after_create_session(session, None))
        return seconds(lambda: saver.restore(session, prefix))


def restore(folder, rounds, kind):
    """The page cache is warm; ours finds the newest file, verifies all of it and assigns it."""

    def run(side):
        command = [sys.executable, "-W", "ignore", os.path.abspath(__file__), folder, kind, side]
        return json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL))

    run("save")
    taken = in_turn({"Saver": lambda: run("Saver"), "ours": lambda: run("ours")}, rounds)
    claim = "Saver.restore / ours with every CRC checked, 403 MB, {} variables".format(kind)
    return [ratio(claim, ("at least", 2), taken, "Saver", "ours")]


BENCHMARKS = {
    "restore_ref": lambda folder, rounds: restore(folder, rounds, kind="ref"),
    "restore_resource": lambda folder, rounds: restore(folder, rounds, kind="resource"),
}

if __name__ == "__main__":
    print(json.dumps(_restore(*sys.argv[1:])))
