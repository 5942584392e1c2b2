"""An interrupted and resumed run equals an uninterrupted one, step for step and bit for bit."""

import os
import pathlib
import re
import textwrap

import pytest

import tf_h5_callback as h5

tf = pytest.importorskip("tensorflow.compat.v1")

# As tf.disable_v2_behavior() does: the moving averages of the newest TensorFlow cannot initialise
# themselves from ref variables inside the control flow of version 2.
tf.disable_control_flow_v2()

LAST = 24


def run(folder, last_step, use_resource, save_steps=5):
    """Trains a small model on shuffled data; returns what each step saw and did."""
    with tf.Graph().as_default():
        tf.set_random_seed(7)
        step = tf.train.get_or_create_global_step()
        data = tf.data.Dataset.range(100).shuffle(30, seed=3).repeat().batch(8).prefetch(2)
        iterator = tf.data.make_initializable_iterator(data)
        tf.add_to_collection(tf.GraphKeys.TABLE_INITIALIZERS, iterator.initializer)
        batch = iterator.get_next()
        x = tf.cast(tf.expand_dims(batch, 1), tf.float32) / 100
        with tf.variable_scope("net", use_resource=use_resource):
            w = tf.get_variable("w", [1, 16])
            v = tf.get_variable("v", [16, 1])
        loss = tf.reduce_mean(tf.square(tf.matmul(tf.tanh(tf.matmul(x, w)), v) - tf.sin(9 * x)))
        minimize = tf.train.AdamOptimizer(0.01).minimize(loss, step)
        with tf.control_dependencies([minimize]):
            train_op = tf.train.ExponentialMovingAverage(0.9).apply([w, v])
        hooks = [
            h5.H5CheckpointHook(folder, save_steps=save_steps, iterators=[iterator]),
            tf.train.StopAtStepHook(last_step=last_step),
        ]
        seen = []
        with tf.train.MonitoredTrainingSession(hooks=hooks) as session:
            while not session.should_stop():
                value, elements, _ = session.run([loss, batch, train_op])
                seen.append((float(value), elements.tolist()))
    return seen


def final_state(folder):
    with h5.load_checkpoint(folder) as checkpoint:
        assert checkpoint.step == LAST
        return {
            name: checkpoint[name].tobytes()
            for name in checkpoint
            if not name.startswith("Iterator")  # holds how many batches are prefetched: timing
        }


@pytest.fixture(scope="module", params=[False, True], ids=["ref", "resource"])
def whole(request, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("whole"))
    return request.param, run(folder, LAST, request.param), final_state(folder)


def test_the_state_is_all_there(whole):
    _, _, state = whole
    assert sorted(state) == sorted(
        ["global_step:0", "beta1_power:0", "beta2_power:0"]
        + [
            "net/{}{}:0".format(name, slot)
            for name in "wv"
            for slot in ("", "/Adam", "/Adam_1", "/ExponentialMovingAverage")
        ]
    )


# In turn with variables of either kind: twenty steps, and all distances from a save.
@pytest.mark.parametrize(
    "whole, interrupted_at",
    [(bool(n % 2), n) for n in range(1, LAST) if n not in (9, 16, 21)],
    indirect=["whole"],
)
def test_equal_after_an_interruption(whole, interrupted_at, tmp_path):
    use_resource, seen, state = whole
    first = run(tmp_path, interrupted_at, use_resource)
    second = run(tmp_path, LAST, use_resource)
    assert first + second == seen
    assert final_state(tmp_path) == state


def test_equal_after_an_interruption_at_every_step(whole, tmp_path):
    use_resource, seen, state = whole
    pieces = [run(tmp_path, n, use_resource) for n in range(1, 8)] + [
        run(tmp_path, LAST, use_resource)
    ]
    assert sum(pieces, []) == seen
    assert final_state(tmp_path) == state


def test_equal_when_resumed_from_an_older_checkpoint(whole, tmp_path):
    """What a kill does: the steps after the last checkpoint are trained again, and are the same."""
    use_resource, seen, state = whole
    run(tmp_path, 13, use_resource)
    os.remove(tmp_path / "model.ckpt-13.h5")
    assert run(tmp_path, LAST, use_resource) == seen[10:]
    assert final_state(tmp_path) == state


RECIPE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "training.rst"


def recipe():
    """The lines of the documentation on random operations: the mask, and the train op."""
    text = RECIPE.read_text(encoding="utf-8").split("Dropout and other random operations")[1]
    block = re.search(r"\.\. code-block:: python\n\n((?: {8}.*\n|\n)+)", text).group(1)
    mask, train = textwrap.dedent(block).split("...\n")
    assert "stateless" in mask and "train_op" in train
    return mask, train


def run_with_dropout(folder, last_step, mask, train):
    """Trains a model with dropout; the two pieces of code make the mask and the train op."""
    with tf.Graph().as_default():
        tf.set_random_seed(7)
        global_step = tf.train.get_or_create_global_step()
        names = {"tf": tf, "global_step": global_step, "keep_prob": 0.5, "x": tf.ones([4, 16])}
        exec(mask, names)
        w = tf.get_variable("w", [16, 1], use_resource=True)
        names["loss"] = loss = tf.reduce_mean(tf.square(tf.matmul(names["x"], w) - 1))
        names["optimizer"] = tf.train.AdamOptimizer(0.01)
        exec(train, names)
        hooks = [
            h5.H5CheckpointHook(folder, save_steps=5),
            tf.train.StopAtStepHook(last_step=last_step),
        ]
        seen = []
        with tf.train.MonitoredTrainingSession(hooks=hooks) as session:
            while not session.should_stop():
                values = session.run([names["x"], loss, names["train_op"]])
                seen.append((values[0].tolist(), float(values[1])))
    return seen


def test_the_documented_way_to_random_numbers_is_exact(tmp_path):
    whole = run_with_dropout(tmp_path / "whole", 12, *recipe())
    masks = [repr(x) for x, _ in whole]
    assert len(set(masks)) == 12 and all(0 < x.count("2.0") < 64 for x in masks)
    parts = [run_with_dropout(tmp_path / "parts", n, *recipe()) for n in (3, 8, 12)]
    assert sum(parts, []) == whole


def test_a_stateful_random_operation_is_not_exact(tmp_path):
    """As documented. If TensorFlow ever mends it, the documentation can be shorter."""
    _, train = recipe()
    code = "x = tf.nn.dropout(x, keep_prob=keep_prob)", train
    whole = run_with_dropout(tmp_path / "whole", 6, *code)
    assert run_with_dropout(tmp_path / "again", 6, *code) == whole
    first = run_with_dropout(tmp_path / "parts", 3, *code)
    second = run_with_dropout(tmp_path / "parts", 6, *code)
    assert first == whole[:3] and second != whole[3:]
    # The counter of the operation began anew.
    assert [x for x, _ in second] == [x for x, _ in whole[:3]]
