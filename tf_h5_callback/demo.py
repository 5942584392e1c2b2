"""The main job on real data: train, be killed, resume, and be equal to the bit.

``python -m tf_h5_callback.demo`` trains a small convolutional network on handwritten digits, once
without interruption and once killed with SIGKILL in the middle and started again, by the same
command. Then it compares: the loss of every step, and every weight and optimizer slot at the end.

The interesting part is `train`: the lines about checkpoints are the import and the hook.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from typing import Dict, List, Optional, Tuple

import numpy as np

import tf_h5_callback as h5

STEPS = 600
SAVE_STEPS = 50
BATCH = 64
LOSSES = "losses.txt"


def train(folder: str) -> None:
    """Trains up to step `STEPS`, or goes on doing so; appends each step's loss to a file."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow.compat.v1 as tf
    from sklearn.datasets import load_digits
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    tf.disable_eager_execution()
    tf.logging.set_verbosity("ERROR")
    tf.set_random_seed(1)
    global_step = tf.train.get_or_create_global_step()

    digits = load_digits()
    data = tf.data.Dataset.from_tensor_slices(
        (digits.images[..., None].astype(np.float32) / 16, digits.target.astype(np.int64))
    )
    data = data.shuffle(500, seed=2).repeat().batch(BATCH).prefetch(2)
    iterator = tf.data.make_initializable_iterator(data)
    tf.add_to_collection(tf.GraphKeys.TABLE_INITIALIZERS, iterator.initializer)
    images, labels = iterator.get_next()

    def variable(name: str, *shape: int) -> tf.Variable:
        return tf.get_variable(name, shape, initializer=tf.glorot_uniform_initializer())

    x = tf.nn.relu(tf.nn.conv2d(images, variable("conv1", 3, 3, 1, 16), 1, "SAME"))
    x = tf.nn.relu(tf.nn.conv2d(x, variable("conv2", 3, 3, 16, 32), 2, "SAME"))
    x = tf.nn.relu(tf.matmul(tf.reshape(x, [-1, 4 * 4 * 32]), variable("dense", 512, 64)))
    # TensorFlow cannot restore the counter inside a stateful random operation such as
    # tf.nn.dropout. A stateless one seeded with the global step needs no counter.
    seed = tf.stack([tf.cast(global_step, tf.int32), 3])
    x *= 2 * tf.floor(0.5 + tf.random.stateless_uniform([BATCH, 64], seed))
    logits = tf.matmul(x, variable("logits", 64, 10))
    loss = tf.losses.sparse_softmax_cross_entropy(labels, logits)
    with tf.control_dependencies([loss]):  # the step that seeded the dropout, not the next one
        train_op = tf.train.AdamOptimizer().minimize(loss, global_step)

    # With several threads TensorFlow adds up numbers in the order in which threads finish.
    config = tf.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)

    logging.basicConfig(level=logging.INFO, format="  %(message)s", stream=sys.stdout)
    bar = tqdm(total=STEPS, unit="step", desc="  training", mininterval=0.5)
    hook = h5.H5CheckpointHook(folder, save_steps=SAVE_STEPS, iterators=[iterator], progress=bar)
    stop = tf.train.StopAtStepHook(last_step=STEPS)
    with bar, logging_redirect_tqdm(), open(os.path.join(folder, LOSSES), "a", buffering=1) as log:
        with tf.train.MonitoredTrainingSession(hooks=[hook, stop], config=config) as session:
            while not session.should_stop():
                _, value, step = session.run([train_op, loss, seed])
                log.write("{} {}\n".format(step[0] + 1, float(value).hex()))
                bar.set_description("  loss {:.4f}".format(value), refresh=False)


def read_losses(folder: str) -> List[Tuple[int, float]]:
    """``[(step, loss)]`` as written; a line that a kill cut short is left out."""
    try:
        with open(os.path.join(folder, LOSSES)) as f:
            lines = [line.split() for line in f if line.endswith("\n")]
    except FileNotFoundError:
        return []
    return [(int(step), float.fromhex(loss)) for step, loss in lines]


def compare(whole: str, resumed: str) -> List[str]:
    """Compares two runs to the bit; returns the differences, in words."""
    differences = []
    expected: Dict[int, float] = dict(read_losses(whole))
    actual = read_losses(resumed)
    for step, loss in actual:  # steps lost in the crash are here twice
        if expected.get(step) != loss:
            differences.append("loss of step {}: {} != {}".format(step, loss, expected.get(step)))
    missing = set(range(1, STEPS + 1)) - {step for step, _ in actual}
    if missing:
        differences.append("steps never trained: {}".format(sorted(missing)))
    with h5.load_checkpoint(whole) as a, h5.load_checkpoint(resumed) as b:
        if list(a) != list(b):
            differences.append("different tensors: {} != {}".format(list(a), list(b)))
        for name in a:
            # How many batches wait in the prefetch buffer is a matter of time. That the same
            # batches come out of it is what the losses show.
            if not name.startswith("Iterator") and a[name].tobytes() != b[name].tobytes():
                differences.append("{} differs at step {}".format(name, STEPS))
    return differences


def plot(whole: str, resumed: str, killed_at: int, path: str) -> None:
    """Draws the loss curves of both runs; the second was killed after so many steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, losses = zip(*read_losses(whole))
    rows = read_losses(resumed)
    figure, axes = plt.subplots(figsize=(9, 4.5))
    axes.semilogy(steps, losses, color="0.75", linewidth=5, label="uninterrupted")
    for part, style, label in (
        (rows[:killed_at], "tab:blue", "killed after step {}".format(rows[killed_at - 1][0])),
        (rows[killed_at:], "tab:orange", "resumed after step {}".format(rows[killed_at][0] - 1)),
    ):
        axes.semilogy(*zip(*part), color=style, linewidth=1, label=label)
    axes.axvline(rows[killed_at - 1][0], color="tab:red", linestyle=":")
    axes.set(xlabel="global step", ylabel="loss", title="Killed and resumed = uninterrupted")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the demo; returns 0 if the two runs are equal, otherwise 1."""
    parser = argparse.ArgumentParser(prog="python -m tf_h5_callback.demo", description=__doc__)
    parser.add_argument("--dir", default="demo-run", help="working folder (default: %(default)s)")
    parser.add_argument("--train", metavar="FOLDER", help="only train, or resume, in this folder")
    args = parser.parse_args(argv)
    if args.train:
        os.makedirs(args.train, exist_ok=True)
        train(args.train)
        return 0

    whole, resumed = (os.path.join(args.dir, name) for name in ("uninterrupted", "interrupted"))
    for folder in (whole, resumed):
        shutil.rmtree(folder, ignore_errors=True)

    def command(folder: str) -> List[str]:
        return [sys.executable, "-m", "tf_h5_callback.demo", "--train", folder]

    print("1. An uninterrupted run of {} steps.".format(STEPS), flush=True)
    subprocess.run(command(whole), check=True)

    print("2. The same, killed with SIGKILL somewhere in the middle.", flush=True)
    process = subprocess.Popen(command(resumed))
    target = random.randint(STEPS // 4, STEPS * 3 // 4)
    while len(read_losses(resumed)) < target:
        if process.poll() is not None:
            print("training ended by itself, with exit code {}".format(process.returncode))
            return 1
        time.sleep(0.002)
    process.kill()
    process.wait()
    killed_at = len(read_losses(resumed))
    print("\n  killed after step {}".format(killed_at))

    print("3. The same command again.", flush=True)
    subprocess.run(command(resumed), check=True)

    image = os.path.join(args.dir, "loss.png")
    plot(whole, resumed, killed_at, image)
    differences = compare(whole, resumed)
    print("4. Killed and resumed, compared with uninterrupted:")
    if differences:
        print("  NOT equal:\n  " + "\n  ".join(differences))
        return 1
    print(
        "  equal to the bit: the loss of each of the {} steps, and every weight and optimizer slot "
        "after the last one\n  the two loss curves: {}".format(STEPS, image)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
