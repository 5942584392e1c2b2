"""Makes the checkpoint of this TensorFlow for ``tests/behaviour/test_across_versions.py``.

Run once with each TensorFlow, in this folder: ``python make.py``. The files are committed and never
made again: they stand for those that users have.
"""

import os

import numpy as np
import tensorflow.compat.v1 as tf
from tensorflow.python.ops import lookup_ops

import tf_h5_callback as h5

STEP = 6
# Numbers that every TensorFlow computes alike: sums and products of small integers and halves.
WORDS = [b"ends in NUL\0", b"", b"\xff"]
DTYPES = (
    "bool int8 int32 int64 uint8 uint16 float16 bfloat16 float64 complex64 qint8 quint8".split()
)


class Run:
    """A graph with some of everything, and the hook that saves it.

    Args:
      folder: of the checkpoints.
      iterators: whether the position in the data is part of the state.
      options: of the hook.
    """

    def __init__(self, folder, use_resource=False, partitions=2, iterators=True, **options):
        self.step = tf.train.get_or_create_global_step()
        data = tf.data.Dataset.range(100).shuffle(30, seed=3).repeat().batch(4)
        iterator = tf.data.make_initializable_iterator(data)
        tf.add_to_collection(tf.GraphKeys.TABLE_INITIALIZERS, iterator.initializer)
        self.batch = iterator.get_next()
        with tf.variable_scope("net", use_resource=use_resource):
            self.w = tf.get_variable(
                "w", [4, 3], initializer=tf.ones_initializer(),
                partitioner=tf.fixed_size_partitioner(partitions),
            )  # fmt: skip
            tf.get_variable("words", initializer=tf.constant(WORDS), trainable=False)
            for name in DTYPES:
                dtype = tf.as_dtype(name)
                values = np.array([1, 0, 1]).astype(dtype.as_numpy_dtype)
                initial = tf.placeholder_with_default(tf.constant(values, dtype), [3])
                tf.get_variable("a_" + name, initializer=initial, dtype=dtype, trainable=False)
        self.table = lookup_ops.MutableHashTable(tf.string, tf.int64, -1, name="table")
        self.fill = self.table.insert(tf.constant(WORDS), [1, 2, 3])
        target = np.arange(12, dtype="f4").reshape(4, 3)
        self.loss = tf.reduce_sum(tf.square(tf.convert_to_tensor(self.w) - target))
        # A power of two as the rate and as the decay: nothing is rounded.
        minimize = tf.train.MomentumOptimizer(0.125, 0.5).minimize(self.loss, self.step)
        with tf.control_dependencies([minimize]):
            self.train_op = tf.train.ExponentialMovingAverage(0.5).apply(tf.trainable_variables())
        self.hook = h5.H5CheckpointHook(
            folder, save_steps=STEP, iterators=[iterator] if iterators else [], **options
        )

    def train(self, last_step):
        """Trains to a step; returns the losses."""
        losses = []
        hooks = [self.hook, tf.train.StopAtStepHook(last_step=last_step)]
        with tf.train.MonitoredTrainingSession(hooks=hooks) as session:
            while not session.should_stop():
                fetches = [self.loss, self.batch, self.train_op, self.fill]
                losses.append(float(session.run(fetches)[0]))
        return losses


if __name__ == "__main__":
    tf.disable_v2_behavior()
    here = os.path.dirname(os.path.abspath(__file__))
    folder = os.path.join(here, "run")
    with tf.Graph().as_default():
        print(Run(folder, metadata={"made_by": "make.py"}).train(STEP))
    path = os.path.join(here, "tensorflow-{}.h5".format(tf.VERSION))
    os.replace(h5.latest_checkpoint(folder), path)
    print(path, os.path.getsize(path))
