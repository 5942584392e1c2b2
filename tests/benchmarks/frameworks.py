"""Saving the 403 MB of a Keras model as other libraries do it, in eager mode; TensorFlow 2 only."""

import os
import shutil
import time

from measure import Figure, in_turn, ratio

from tf_h5_callback.file.writer import write_checkpoint


def frameworks(folder, rounds, layers=24, width=2048):
    """Until all is written; only ours is on the disk then, too."""
    import tensorflow as tf

    if not tf.executing_eagerly():
        return []
    model = tf.keras.Sequential(
        [tf.keras.Input([width])]
        + [tf.keras.layers.Dense(width, use_bias=False) for _ in range(layers)]
    )
    # Not those of Keras 3: tf.train.Checkpoint cannot save them in the background.
    weights = {"w{}".format(i): tf.Variable(v.numpy()) for i, v in enumerate(model.weights)}
    checkpoint = tf.train.Checkpoint(**weights)
    path = os.path.join(folder, "f")
    stalls = {}

    def ours():
        write_checkpoint(path, {name: v.numpy() for name, v in weights.items()})

    def in_background(options):
        start = time.perf_counter()
        checkpoint.save(path, options=options)
        stalls.setdefault("tf.train.Checkpoint, async", []).append(time.perf_counter() - start)
        checkpoint.sync()

    def with_orbax(checkpointer):
        start = time.perf_counter()
        checkpointer.save(path, {name: v.numpy() for name, v in weights.items()})
        stalls.setdefault("Orbax, async", []).append(time.perf_counter() - start)
        checkpointer.wait_until_finished()

    options = tf.train.CheckpointOptions(experimental_enable_async_checkpoint=True)
    actions = {
        "ours": ours,
        "tf.train.Checkpoint": lambda: checkpoint.write(path),
        "tf.train.Checkpoint, async": lambda: in_background(options),
        "Keras save_weights": lambda: model.save_weights(path + ".weights.h5"),
    }
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        pass
    else:
        checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        actions["Orbax, async"] = lambda: with_orbax(checkpointer)

    def timed(action):
        os.sync()
        start = time.perf_counter()
        action()
        taken = time.perf_counter() - start
        shutil.rmtree(folder)
        os.mkdir(folder)
        return taken

    taken = in_turn({k: lambda a=a: timed(a) for k, a in actions.items()}, rounds)
    about = "403 MB of a Keras model, "
    return [
        *(
            ratio("{}{} / ours".format(about, side), None, taken, side, "ours")
            for side in actions
            if side != "ours"
        ),
        *(
            Figure("{}{}: training waits".format(about, side), seconds[1:], "s")
            for side, seconds in stalls.items()
        ),
    ]


BENCHMARKS = {
    "frameworks": frameworks,
}
