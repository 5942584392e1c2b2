"""The life of the hook in real sessions."""

import logging
import os
import re
import signal
import subprocess
import threading

import numpy as np
import pytest

import tf_h5_callback as h5

tf = pytest.importorskip("tensorflow.compat.v1")

from tf_h5_callback.file import output as block_output  # noqa: E402
from tf_h5_callback.file import writer as checkpoint_file  # noqa: E402


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as g:
        tf.set_random_seed(1)
        yield g


@pytest.fixture(params=[True, False], ids=["background", "foreground"])
def background(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "made" / "by us")


def counting_graph(increment=1, use_resource=False):
    """One variable that follows the global step; returns the training operation."""
    step = tf.train.get_or_create_global_step()
    with tf.variable_scope("net"):
        w = tf.get_variable("w", [4], initializer=tf.zeros_initializer(), use_resource=use_resource)
    with tf.control_dependencies([w.assign_add(np.full(4, increment, "f4"), read_value=False)]):
        return step.assign_add(increment, read_value=False)


def steps(folder):
    return [step for step, _ in h5.list_checkpoints(folder)]


def train(hooks, last_step, train_op=None, **kwargs):
    train_op = counting_graph() if train_op is None else train_op
    hooks = list(hooks) + [tf.train.StopAtStepHook(last_step=last_step)]
    with tf.train.MonitoredTrainingSession(hooks=hooks, **kwargs) as session:
        while not session.should_stop():
            session.run(train_op)


def resume(hooks, last_step, **kwargs):
    """As a new process would: in a new graph."""
    with tf.Graph().as_default():
        train(hooks, last_step, **kwargs)


class Listener(tf.train.CheckpointSaverListener):
    def __init__(self, folder=None, stop_at=None):
        self.calls, self.folder, self.stop_at = [], folder, stop_at

    def begin(self):
        self.calls.append("begin")

    def before_save(self, session, step):
        assert isinstance(session, tf.Session)
        self.calls.append(("before", step))

    def after_save(self, session, step):
        assert threading.current_thread() is threading.main_thread()
        if self.folder is not None:  # durable, under its final name
            with h5.load_checkpoint(
                os.path.join(self.folder, "model.ckpt-{}.h5".format(step))
            ) as c:
                assert c.step == step
                c.verify()
        self.calls.append(("after", step))
        return self.stop_at is not None and step >= self.stop_at

    def end(self, session, step):
        self.calls.append(("end", step))


# Arguments


def test_a_trigger_is_needed(folder):
    with pytest.raises(ValueError, match="save_steps .* save_secs"):
        h5.H5CheckpointHook(folder)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"max_to_keep": 0}, "max_to_keep is 0"),
        ({"checkpoint_basename": "a/b"}, "checkpoint_basename is 'a/b'"),
    ],
)
def test_arguments_out_of_range(folder, kwargs, match):
    with pytest.raises(ValueError, match=match):
        h5.H5CheckpointHook(folder, save_steps=1, **kwargs)


def test_a_global_step_is_needed(folder):
    tf.get_variable("w", [])
    with pytest.raises(RuntimeError, match="needs a global step"):
        h5.H5CheckpointHook(folder, save_steps=1).begin()


def test_it_is_a_session_run_hook(folder):
    assert isinstance(h5.H5CheckpointHook(folder, save_steps=1), tf.train.SessionRunHook)


# When


def test_a_new_run_saves_its_initial_state_every_n_steps_and_the_last(
    folder, background, use_resource
):
    hook = h5.H5CheckpointHook(folder, save_steps=3, max_to_keep=None, background=background)
    train([hook], 7, counting_graph(use_resource=use_resource))
    assert steps(folder) == [0, 3, 6, 7]
    for step, path in h5.list_checkpoints(folder):
        with h5.load_checkpoint(path) as checkpoint:
            assert checkpoint.step == step == checkpoint["global_step:0"]
            assert checkpoint["net/w:0"].tolist() == [step] * 4
            assert checkpoint.tensorflow_version == tf.VERSION


def test_the_last_step_is_not_saved_twice(folder):
    listener = Listener()
    train([h5.H5CheckpointHook(folder, save_steps=3, listeners=[listener])], 6)
    assert listener.calls == [
        "begin", ("before", 0), ("after", 0), ("before", 3), ("after", 3), ("before", 6),
        ("after", 6), ("end", 6),
    ]  # fmt: skip


def bare(hook, train_op, runs):
    """Calls only what TensorFlow's own tests call: no after_create_session."""
    hook.begin()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        seen = []
        for _ in range(runs):
            context = tf.train.SessionRunContext(
                original_args=tf.train.SessionRunArgs(None), session=session
            )
            fetches = hook.before_run(context).fetches
            results, _ = session.run([fetches, train_op])
            hook.after_run(context, tf.train.SessionRunValues(results, None, None))
            hook.wait_until_finished()
            seen.append(steps(hook._dir.path))
    return seen


def test_without_a_creation_save_the_first_run_saves(folder):
    hook = h5.H5CheckpointHook(folder, save_steps=2, max_to_keep=None)
    seen = bare(hook, counting_graph(), 5)
    assert seen == [[1], [1], [1, 3], [1, 3], [1, 3, 5]]


def test_steps_that_jump(folder, use_resource):
    hook = h5.H5CheckpointHook(folder, save_steps=10, max_to_keep=None)
    bare(hook, counting_graph(5, use_resource), 6)
    assert steps(folder) == [5, 15, 25]


def test_seconds(folder, clock):
    hook = h5.H5CheckpointHook(folder, save_secs=10, max_to_keep=None)

    class Tick(tf.train.SessionRunHook):
        def before_run(self, run_context):
            clock.now += 4

    train([Tick(), hook], 8)
    assert steps(folder) == [0, 3, 6, 8]


def test_steps_and_seconds_whichever_comes_first(folder, clock):
    hook = h5.H5CheckpointHook(folder, save_steps=4, save_secs=10, max_to_keep=None)

    class Tick(tf.train.SessionRunHook):
        count = 0

        def before_run(self, run_context):
            self.count += 1
            clock.now += 6 if self.count > 5 else 0

    train([Tick(), hook], 9)
    assert steps(folder) == [0, 4, 7, 9]


def test_a_step_without_a_save_takes_one_run(folder, monkeypatch):
    runs = []
    train_op = counting_graph()
    real = tf.Session.run
    hook = h5.H5CheckpointHook(folder, save_steps=100)
    stop = tf.train.StopAtStepHook(last_step=60)
    with tf.train.MonitoredTrainingSession(hooks=[hook, stop]) as session:
        session.run(train_op)
        hook.wait_until_finished()
        monkeypatch.setattr(
            tf.Session, "run", lambda self, *a, **k: runs.append(1) or real(self, *a, **k)
        )
        for _ in range(20):
            session.run(train_op)
        monkeypatch.undo()
    # 20 runs of the loop and those of StopAtStepHook, which reads the step once more near the end
    assert len(runs) == 20


# Listeners


def test_listeners_in_order(folder, background):
    listener = Listener(folder)
    hook = h5.H5CheckpointHook(
        folder, save_steps=1, listeners=[listener], background=background, max_to_keep=None
    )
    train([hook], 3)
    assert listener.calls == [
        "begin", ("before", 0), ("after", 0), ("before", 1), ("after", 1), ("before", 2),
        ("after", 2), ("before", 3), ("after", 3), ("end", 3),
    ]  # fmt: skip


def test_in_the_foreground_after_save_comes_at_once(folder):
    listener = Listener()
    hook = h5.H5CheckpointHook(folder, save_steps=2, listeners=[listener], background=False)
    train_op = counting_graph()
    with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
        assert listener.calls[-1] == ("after", 0)
        session.run(train_op)
        session.run(train_op)
        assert listener.calls[-1] == ("after", 2)


def test_a_listener_can_stop_training(folder, background):
    listener = Listener(stop_at=4)
    hook = h5.H5CheckpointHook(folder, save_steps=2, listeners=[listener], background=background)
    train([hook], 1000)
    last = listener.calls[-1][1]
    assert last == 4 if not background else 4 <= last < 1000


def test_a_listener_can_stop_training_at_the_initial_save(folder):
    listener = Listener(stop_at=0)
    hook = h5.H5CheckpointHook(folder, save_steps=9, listeners=[listener], background=False)
    train([hook], 1000)
    assert listener.calls[-1] == ("end", 1)


# What


def test_metadata_as_a_dict_and_as_a_callable(folder):
    train([h5.H5CheckpointHook(folder, save_steps=9, metadata={"commit": "abc"})], 2)
    with h5.load_checkpoint(folder) as checkpoint:
        assert checkpoint.metadata == {"commit": "abc"}

    def metadata(session, step):
        assert isinstance(session, tf.Session)
        return {"twice": 2 * step}

    resume([h5.H5CheckpointHook(folder, save_steps=9, metadata=metadata)], 4)
    with h5.load_checkpoint(folder) as checkpoint:
        assert checkpoint.metadata == {"twice": 8}


def test_metadata_that_cannot_be_stored_is_an_error_at_once(folder):
    hook = h5.H5CheckpointHook(folder, save_steps=9, metadata={"x": object()})
    with pytest.raises(TypeError, match="metadata holds"):
        train([hook], 2)


@pytest.mark.parametrize("kind", ["list", "dict", "callable"])
def test_var_list(folder, kind):
    train_op = counting_graph()
    tf.get_variable("other", [])
    w = [v for v in tf.global_variables() if v.name == "net/w:0"][0]
    var_list = {"list": [w], "dict": {"weights": w}, "callable": lambda v: v is w}[kind]
    train([h5.H5CheckpointHook(folder, save_steps=9, var_list=var_list)], 2, train_op)
    name = "weights" if kind == "dict" else "net/w:0"
    assert [n for n, _ in h5.list_variables(folder)] == sorted(["global_step:0", name])


def test_retention(folder):
    train([h5.H5CheckpointHook(folder, save_steps=1, max_to_keep=2)], 9)
    assert steps(folder) == [8, 9]
    resume([h5.H5CheckpointHook(folder, save_steps=1, max_to_keep=1)], 10)
    assert os.listdir(folder) == ["model.ckpt-10.h5"]


@pytest.mark.parametrize("by_name", [False, True])
def test_monitor_keeps_the_best_also_across_a_restart(folder, by_name):
    def run(last_step):
        with tf.Graph().as_default():
            values = tf.constant([9.0, 7.0, 5.0, 1.0, float("nan"), 4.0, 3.0, 2.0, 8.0, 6.0])
            loss = tf.gather(values, tf.train.get_or_create_global_step(), name="loss")
            with tf.control_dependencies([loss]):
                train_op = counting_graph()
            hook = h5.H5CheckpointHook(
                folder, save_steps=1, max_to_keep=2, monitor="loss" if by_name else loss
            )
            train([hook], last_step, train_op)

    run(6)
    best = h5.best_checkpoint(folder)
    with h5.load_checkpoint(best) as checkpoint:
        assert checkpoint.monitored.value == 1 and checkpoint.monitored.name == "loss:0"
        step = checkpoint.step
    run(9)
    assert steps(folder) == [step, 8, 9]
    assert h5.best_checkpoint(folder) == best


def test_monitor_with_mode_max(folder):
    accuracy = tf.sin(tf.cast(tf.train.get_or_create_global_step(), tf.float32))
    with tf.control_dependencies([accuracy]):  # beforehand: TensorFlow 1.15 mixes up later reads
        train_op = counting_graph()
    hook = h5.H5CheckpointHook(folder, save_steps=1, max_to_keep=1, monitor=accuracy, mode="max")
    train([hook], 6, train_op)
    with h5.load_checkpoint(h5.best_checkpoint(folder)) as checkpoint:
        assert checkpoint.step == 3
        assert checkpoint.monitored.value == pytest.approx(np.sin(2))


@pytest.mark.parametrize(("max_overhead", "saved"), [(1e9, True), (1e-9, False)])
def test_max_overhead(folder, max_overhead, saved):
    hook = h5.H5CheckpointHook(folder, max_overhead=max_overhead, max_to_keep=None)
    train_op = counting_graph()
    with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
        for _ in range(30):
            session.run(train_op)
            hook.wait_until_finished()
    # Not while a file is being written: at each second step. One save finds out what they cost.
    assert steps(folder)[0] == 0 and steps(folder)[-1] == 30
    assert len(steps(folder)) > 12 if saved else len(steps(folder)) <= 3


def test_max_overhead_and_save_steps_whichever_comes_first(folder):
    hook = h5.H5CheckpointHook(folder, save_steps=10, max_overhead=1e-9, max_to_keep=None)
    train([hook], 30)
    assert {0, 30} <= set(steps(folder))
    assert max(np.diff(steps(folder))) == 10


def test_what_a_save_has_cost_is_told_and_stored(folder, background, caplog):
    caplog.set_level("INFO", logger="tf_h5_callback")
    train([h5.H5CheckpointHook(folder, save_steps=2, background=background)], 4)
    messages = [record.getMessage() for record in caplog.records]
    saved = [m for m in messages if m.startswith("saved ")]
    assert len(saved) == 3
    assert re.fullmatch(
        r"saved .*model.ckpt-0.h5: [\d,]+ bytes durable after \S+ s \(\S+ GB/s\), "
        r"training waited \S+ s",
        saved[0],
    )
    assert any(m.startswith("training waited ") and "for 3 checkpoints" in m for m in messages)
    with h5.load_checkpoint(folder) as checkpoint:
        metrics = checkpoint.metrics
    assert metrics["bytes"] > 0 and metrics["write_seconds"] > 0
    assert ("stall_seconds" in metrics) == background


def test_in_the_foreground_the_state_is_not_copied_whole(folder, monkeypatch):
    """Variables are fetched in groups; every file is whole and of one step all the same."""
    from tf_h5_callback.graph import snapshot

    monkeypatch.setattr(snapshot, "_GROUP_SIZE", 4000)
    step = tf.train.get_or_create_global_step()
    updates = [
        tf.get_variable("v{}".format(i), [size], initializer=tf.zeros_initializer()).assign_add(
            tf.ones([size])
        )
        for i, size in enumerate([1000, 10, 500, 490, 2000, 1])
    ]
    with tf.control_dependencies(updates):
        train_op = step.assign_add(1)
    largest = []
    real = snapshot.LazySnapshot._copy

    def copy(self, items):
        values = real(self, items)
        largest.append(sum(value.nbytes for value in values.values()))
        return values

    monkeypatch.setattr(snapshot.LazySnapshot, "_copy", copy)
    train([h5.H5CheckpointHook(folder, save_steps=1, background=False)], 3, train_op)
    assert max(largest) == 8000  # the largest variable
    for n, path in h5.list_checkpoints(folder):
        with h5.load_checkpoint(path) as checkpoint:
            assert len(checkpoint) == 7
            for name in checkpoint:
                assert (checkpoint[name] == n).all(), name


def test_in_the_foreground_the_state_is_not_read_whole(folder, monkeypatch, use_resource):
    """It is verified as a whole, and then read and assigned in groups."""
    from tf_h5_callback.graph import snapshot
    from tf_h5_callback.graph import state as graph_state

    monkeypatch.setattr(snapshot, "_GROUP_SIZE", 4000)
    events = []

    def noted(read):
        def noting(*args):
            result = read(*args)
            events.append("verified" if result is None else sum(v.nbytes for v in result.values()))
            return result

        return noting

    monkeypatch.setattr(graph_state, "read_verified", noted(graph_state.read_verified))
    monkeypatch.setattr(h5.Checkpoint, "verify", noted(h5.Checkpoint.verify))
    for last_step in (3, 5):
        with tf.Graph().as_default(), tf.variable_scope("", use_resource=use_resource):
            step = tf.train.get_or_create_global_step()
            sizes = [1000, 10, 500, 490, 2000, 1]
            zeros = tf.zeros_initializer()
            variables = [
                tf.get_variable("v{}".format(i), [n], initializer=zeros)
                for i, n in enumerate(sizes)
            ]
            changes = [v.assign_add(tf.ones_like(v), read_value=False) for v in variables]
            with tf.control_dependencies(changes):
                train_op = step.assign_add(1, read_value=False)
            events.clear()
            hook = h5.H5CheckpointHook(folder, save_steps=9, background=False)
            train([hook], last_step, train_op)
    assert events[0] == "verified" and max(events[1:]) == 8000 and sum(events[1:]) == 16012
    with h5.load_checkpoint(folder) as checkpoint:
        assert checkpoint.step == 5
        assert all((checkpoint[name] == 5).all() for name in checkpoint)


def test_wrong_monitors(folder):
    counting_graph()
    with pytest.raises(ValueError, match="mode is \"best\"|mode is 'best'"):
        h5.H5CheckpointHook(folder, save_steps=1, monitor="loss", mode="best")
    with pytest.raises(ValueError, match="no tensor 'nothing:0'"):
        h5.H5CheckpointHook(folder, save_steps=1, monitor="nothing").begin()
    for tensor in (tf.zeros([2]), tf.constant("text")):
        with pytest.raises(ValueError, match="not a scalar number"):
            h5.H5CheckpointHook(folder, save_steps=1, monitor=tensor).begin()


def test_base_name(folder):
    train([h5.H5CheckpointHook(folder, save_steps=9, checkpoint_basename="gan")], 2)
    assert sorted(os.listdir(folder)) == ["gan-0.h5", "gan-2.h5"]


# Restore


def test_a_resumed_run_goes_on_and_does_not_save_again_what_it_restored(folder, use_resource):
    def op():
        return counting_graph(use_resource=use_resource)

    train([h5.H5CheckpointHook(folder, save_steps=10, max_to_keep=None)], 4, op())
    listener = Listener()
    with tf.Graph().as_default():
        hook = h5.H5CheckpointHook(folder, save_steps=10, listeners=[listener], max_to_keep=None)
        train([hook], 20, op())
    assert listener.calls == [
        "begin", ("before", 14), ("after", 14), ("before", 20), ("after", 20), ("end", 20),
    ]  # fmt: skip
    assert h5.load_variable(folder, "net/w:0").tolist() == [20] * 4


def test_restore_false(folder, caplog):
    train([h5.H5CheckpointHook(folder, save_steps=10)], 4)
    resume([h5.H5CheckpointHook(folder, save_steps=10, restore=False)], 2)
    assert steps(folder) == [0, 2, 4]
    assert h5.load_variable(os.path.join(folder, "model.ckpt-2.h5"), "net/w:0")[0] == 2
    assert "training begins at step 0" in caplog.text and "model.ckpt-4.h5" in caplog.text


def test_restore_of_a_path(folder, tmp_path):
    train([h5.H5CheckpointHook(folder, save_steps=2)], 6)
    elsewhere = str(tmp_path / "second run")
    path = os.path.join(folder, "model.ckpt-4.h5")
    resume([h5.H5CheckpointHook(elsewhere, save_steps=10, restore=path)], 5)
    assert steps(elsewhere) == [4, 5]  # where it began is saved too: this folder stands alone
    assert h5.load_variable(elsewhere, "net/w:0")[0] == 5


def test_rolling_back_in_the_same_folder(folder, caplog):
    train([h5.H5CheckpointHook(folder, save_steps=2, max_to_keep=9)], 6)
    path = os.path.join(folder, "model.ckpt-2.h5")
    resume([h5.H5CheckpointHook(folder, save_steps=10, restore=path, max_to_keep=2)], 3)
    assert steps(folder) == [2, 3, 4, 6]
    assert "up to " + os.path.join(folder, "model.ckpt-6.h5") in caplog.text


def test_a_damaged_path_is_an_error_without_a_fallback(folder, damage):
    train([h5.H5CheckpointHook(folder, save_steps=2)], 4)
    path = os.path.join(folder, "model.ckpt-4.h5")
    damage(path, "net w:0")
    with pytest.raises(h5.CheckpointCorruptError, match=re.escape(path)):
        resume([h5.H5CheckpointHook(folder, save_steps=2, restore=path)], 6)


def test_a_missing_path_is_an_error(folder):
    with pytest.raises(h5.CheckpointNotFoundError, match="nowhere.h5"):
        train([h5.H5CheckpointHook(folder, save_steps=2, restore="nowhere.h5")], 6)


def test_a_damaged_newest_file_loses_against_an_older_one(folder, background, damage, caplog):
    train([h5.H5CheckpointHook(folder, save_steps=2)], 6)
    damage(os.path.join(folder, "model.ckpt-6.h5"), "net w:0")
    resume([h5.H5CheckpointHook(folder, save_steps=10, background=background)], 8)
    assert "model.ckpt-6.h5 is damaged: 'net/w:0': its checksum is wrong" in caplog.text
    assert h5.load_variable(folder, "net/w:0").tolist() == [8] * 4


def test_a_damaged_file_is_kept_aside(folder, damage, caplog):
    """It neither counts for retention, nor is it overwritten when training comes by again."""
    train([h5.H5CheckpointHook(folder, save_steps=2, max_to_keep=3)], 6)
    path = os.path.join(folder, "model.ckpt-6.h5")
    damage(path, "net w:0")
    with open(path, "rb") as f:
        content = f.read()
    resume([h5.H5CheckpointHook(folder, save_steps=2, max_to_keep=3)], 6)
    assert steps(folder) == [2, 4, 6]
    with open(path + ".damaged", "rb") as f:
        assert f.read() == content
    assert "the damaged checkpoint is kept as {}.damaged".format(path) in caplog.text
    damage(path, "net w:0")
    resume([h5.H5CheckpointHook(folder, save_steps=2, max_to_keep=3)], 6)
    assert sorted(n for n in os.listdir(folder) if "damaged" in n) == [
        "model.ckpt-6.h5.damaged",
        "model.ckpt-6.h5.damaged-2",
    ]


def test_if_all_are_damaged_training_does_not_start(folder, damage):
    train([h5.H5CheckpointHook(folder, save_steps=9)], 1)
    for _, path in h5.list_checkpoints(folder):
        damage(path, "net w:0")
    before = os.listdir(folder)
    for _ in range(2):  # not even at the second try
        with pytest.raises(h5.CheckpointCorruptError, match="none of the 2 checkpoints"):
            resume([h5.H5CheckpointHook(folder, save_steps=9)], 2)
    assert os.listdir(folder) == before


def test_another_graph(folder):
    train([h5.H5CheckpointHook(folder, save_steps=9)], 1)
    with tf.Graph().as_default():
        step = tf.train.get_or_create_global_step()
        tf.get_variable("net/w", [5])
        tf.get_variable("new", [])
        hook = h5.H5CheckpointHook(folder, save_steps=9)
        with pytest.raises(h5.CheckpointMismatchError) as error:
            train([hook], 2, step.assign_add(1))
    for line in (
        "model.ckpt-1.h5 does not fit the graph; nothing was restored",
        "net/w:0: file float32 (4,), graph float32 (5,)",
        "new:0: file no such tensor, graph float32 ()",
    ):
        assert line in str(error.value)
    assert steps(folder) == [0, 1]


def test_the_restored_run_is_logged(folder, caplog):
    train([h5.H5CheckpointHook(folder, save_steps=9)], 1)
    with caplog.at_level(logging.INFO, logger="tf_h5_callback"):
        resume([h5.H5CheckpointHook(folder, save_steps=9)], 2)
    assert "resumed from {}".format(os.path.join(folder, "model.ckpt-1.h5")) in caplog.text


# Other hooks and kinds of session


def test_the_step_is_restored_before_hooks_that_come_after(folder, tmp_path):
    train([h5.H5CheckpointHook(folder, save_steps=9)], 10)

    class Seen(tf.train.SessionRunHook):
        def after_create_session(self, session, coord):
            self.step = int(session.run(tf.train.get_global_step()))

    with tf.Graph().as_default():
        seen, train_op = Seen(), counting_graph()
        tf.summary.scalar("step", tf.train.get_global_step())
        hooks = [
            h5.H5CheckpointHook(folder, save_steps=9),
            seen,
            tf.train.StopAtStepHook(num_steps=5),
            tf.train.LoggingTensorHook({"step": tf.train.get_global_step()}, every_n_iter=2),
            tf.train.SummarySaverHook(
                save_steps=2, output_dir=str(tmp_path / "s"), summary_op=tf.summary.merge_all()
            ),
        ]
        with tf.train.MonitoredTrainingSession(hooks=hooks) as session:
            while not session.should_stop():
                session.run(train_op)
    assert seen.step == 10
    assert steps(folder)[-1] == 15


@pytest.mark.parametrize("kind", ["singular", "monitored", "training", "chief_only"])
def test_kinds_of_session(folder, kind):
    def run(last_step):
        train_op = counting_graph()
        hook = h5.H5CheckpointHook(folder, save_steps=5)
        stop = tf.train.StopAtStepHook(last_step=last_step)
        if kind == "singular":
            session = tf.train.SingularMonitoredSession(hooks=[hook, stop])
        elif kind == "monitored":
            session = tf.train.MonitoredSession(tf.train.ChiefSessionCreator(), [hook, stop])
        elif kind == "training":
            session = tf.train.MonitoredTrainingSession(hooks=[hook, stop])
        else:
            session = tf.train.MonitoredTrainingSession(chief_only_hooks=[hook], hooks=[stop])
        with session:
            while not session.should_stop():
                session.run(train_op)

    run(3)
    with tf.Graph().as_default():
        run(6)
    assert steps(folder) == [0, 3, 6]
    assert h5.load_variable(folder, "net/w:0").tolist() == [6] * 4


@pytest.mark.parametrize("argument", ["hooks", "chief_only_hooks"])
def test_beside_tensorflows_own_saver_hook(folder, tmp_path, argument):
    """Both save; both resume from the same step, in either argument."""
    own = str(tmp_path / "own")
    for last_step in (4, 8):
        with tf.Graph().as_default():
            train_op = counting_graph()
            hook = h5.H5CheckpointHook(folder, save_steps=2)
            kwargs = {argument: [hook]}
            kwargs.setdefault("hooks", []).append(tf.train.StopAtStepHook(last_step=last_step))
            with tf.train.MonitoredTrainingSession(
                checkpoint_dir=own, save_checkpoint_steps=2, save_checkpoint_secs=None, **kwargs
            ) as session:
                while not session.should_stop():
                    session.run(train_op)
        assert steps(folder)[-1] == last_step
        assert h5.load_variable(folder, "net/w:0").tolist() == [last_step] * 4
        reader = tf.train.load_checkpoint(own)
        assert reader.get_tensor("net/w").tolist() == [last_step] * 4


def test_an_existing_script_changes_one_line(folder, tmp_path):
    """The same calls with TensorFlow's hook and with ours save the same steps."""

    def script(hook_class, checkpoint_dir):
        with tf.Graph().as_default():
            train_op, listener = counting_graph(), Listener()
            hook = hook_class(
                checkpoint_dir, save_steps=3, checkpoint_basename="net", listeners=[listener]
            )
            stop = tf.train.StopAtStepHook(last_step=8)
            with tf.train.SingularMonitoredSession(hooks=[hook, stop]) as session:
                while not session.should_stop():
                    session.run(train_op)
        return [(n, int(step)) for n, step in (c for c in listener.calls if c != "begin")]

    theirs = script(tf.train.CheckpointSaverHook, str(tmp_path / "theirs"))
    ours = script(h5.H5CheckpointHook, folder)
    assert ours == theirs
    assert steps(folder) == [] and len(h5.list_checkpoints(folder, "net")) == 4


@pytest.mark.skipif(not hasattr(tf, "estimator"), reason="TensorFlow 2.16 dropped the Estimator")
def test_estimator(folder, tmp_path):
    def model_fn(features, labels, mode):
        w = tf.get_variable("w", [], initializer=tf.zeros_initializer())
        with tf.control_dependencies([w.assign_add(1.0)]):
            train_op = tf.train.get_global_step().assign_add(1)
        return tf.estimator.EstimatorSpec(mode, loss=tf.reduce_sum(features) + w, train_op=train_op)

    def input_fn():
        return tf.data.Dataset.from_tensors(([1.0], [1.0])).repeat()

    for model_dir, max_steps in (("first", 4), ("second", 9)):  # a new model_dir: only we resume
        estimator = tf.estimator.Estimator(model_fn, model_dir=str(tmp_path / model_dir))
        hook = h5.H5CheckpointHook(folder, save_steps=2)
        estimator.train(input_fn, hooks=[hook], max_steps=max_steps)
    assert steps(folder) == [2, 4, 6, 8, 9]
    assert h5.load_variable(folder, "w:0") == 9
    assert h5.load_variable(folder, "global_step:0") == 9


def test_a_second_session_on_one_graph_adds_no_nodes(folder, graph):
    train_op = counting_graph()
    hook = h5.H5CheckpointHook(folder, save_steps=2)
    with tf.train.SingularMonitoredSession(hooks=[hook]) as session:
        session.run(train_op)
    nodes = len(graph.get_operations())
    graph.finalize()  # a MonitoredSession takes its own finalize() back when it closes
    for again in (hook, h5.H5CheckpointHook(folder, save_steps=2)):
        with tf.train.SingularMonitoredSession(hooks=[again]) as session:
            session.run(train_op)
    assert len(graph.get_operations()) == nodes
    assert h5.load_variable(folder, "net/w:0").tolist() == [3] * 4


@pytest.mark.parametrize("restore", [True, False])
def test_a_lost_session_goes_on_from_the_newest_checkpoint(folder, background, restore):
    class Lost(tf.train.SessionRunHook):
        runs = creations = 0

        def after_create_session(self, session, coord):
            self.creations += 1

        def before_run(self, run_context):
            self.runs += 1
            if self.runs == 8:
                raise tf.errors.AbortedError(None, None, "the worker went away")

    train_op, lost = counting_graph(), Lost()
    listener = Listener()
    hook = h5.H5CheckpointHook(
        folder, save_steps=3, background=background, listeners=[listener], restore=restore
    )
    train([hook, lost], 10, train_op)
    assert lost.creations == 2
    assert lost.runs == 8 + 4  # step 7 was lost, and the run that was interrupted
    assert h5.load_variable(folder, "net/w:0").tolist() == [10] * 4
    assert [c for c in listener.calls if c[0] == "after"] == [
        ("after", step) for step in (0, 3, 6, 9, 10)
    ]


# What comes too late


class Late(tf.train.SessionRunHook):
    """Creates a variable (or something worse) in its begin(), after ours."""

    def __init__(self, create):
        self.create = create

    def begin(self):
        self.created = self.create()


def test_a_variable_of_a_later_hook_is_saved_and_restored(folder, use_resource):
    def create():
        v = tf.get_variable(
            "late", [3], initializer=tf.zeros_initializer(), use_resource=use_resource
        )
        return v, v.assign_add([1.0, 1.0, 1.0]).op

    for last_step in (2, 5):
        with tf.Graph().as_default():
            late = Late(create)

            class Use(tf.train.SessionRunHook):
                def before_run(self, run_context, late=late):
                    return tf.train.SessionRunArgs(late.created[1])

            train([h5.H5CheckpointHook(folder, save_steps=9), late, Use()], last_step)
        assert h5.load_variable(folder, "late:0").tolist() == [last_step] * 3


def test_a_table_of_a_later_hook_is_refused_loudly(folder):
    def create():
        from tensorflow.python.ops.lookup_ops import MutableHashTable

        return MutableHashTable(tf.string, tf.int64, -1, name="late_table")

    hook = h5.H5CheckpointHook(folder, save_steps=9)
    with pytest.raises(RuntimeError, match="too late to be saved: late_table.*place H5Checkpoint"):
        train([hook, Late(create)], 2)


# When saving fails


def test_a_really_full_disk(tmp_path, caplog):
    """A small tmpfs fills up in the middle of training, and is made larger again."""
    folder = str(tmp_path / "tmpfs")
    os.mkdir(folder)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        train_op = counting_graph()
        tf.get_variable("ballast", [50000], initializer=tf.zeros_initializer())  # 200 KB
        hook = h5.H5CheckpointHook(
            folder, save_steps=1, max_to_keep=None, on_error="warn", background=False
        )
        with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
            for _ in range(7):
                session.run(train_op)
            full = steps(folder)
            assert full == [0, 1, 2, 3, 4]
            assert len(os.listdir(folder)) == 5
            subprocess.run(["mount", "-o", "remount,size=9m", folder], check=True)
            session.run(train_op)
        assert steps(folder) == [*full, 8]
        for _, path in h5.list_checkpoints(folder):
            with h5.load_checkpoint(path) as checkpoint:
                checkpoint.verify()
        warnings = [r.getMessage() for r in caplog.records if "is not saved" in r.getMessage()]
        assert len(warnings) == 3
        assert re.search(
            r"step 7 is not saved.*[\d,]+ bytes are needed, [\d,]+ are free", warnings[2]
        )
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that is full until told otherwise."""
    real = block_output.write_all
    state = {"full": True, "failures": 0}

    def write_all(file, data, offset):
        if state["full"]:
            state["failures"] += 1
            raise OSError(28, "No space left on device")
        real(file, data, offset)

    monkeypatch.setattr(block_output, "write_all", write_all)
    return state


def test_a_failed_save_is_raised_at_the_next_step(folder, background, full_disk):
    full_disk["full"] = False
    hook = h5.H5CheckpointHook(folder, save_steps=3, background=background)
    train_op = counting_graph()
    with pytest.raises(h5.CheckpointError, match="cannot save .*model.ckpt-3.h5.*No space left"):
        with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
            session.run(train_op)
            hook.wait_until_finished()
            full_disk["full"] = True
            for _ in range(100):
                session.run(train_op)
    assert full_disk["failures"] == 1
    assert os.listdir(folder) == ["model.ckpt-0.h5"]


@pytest.fixture
def first_write_fails(monkeypatch):
    """An event; the first write fails once it is set, later ones succeed."""
    go, real, writes = threading.Event(), block_output.write_all, []

    def write_all(file, data, offset):
        writes.append(1)
        if len(writes) == 1:
            assert go.wait(300)
            raise OSError(28, "No space left on device")
        real(file, data, offset)

    monkeypatch.setattr(block_output, "write_all", write_all)
    return go


def test_a_failed_save_is_raised_by_wait_until_finished(folder, first_write_fails):
    hook = h5.H5CheckpointHook(folder, save_steps=3)
    counting_graph()
    with tf.train.MonitoredTrainingSession(hooks=[hook]):
        first_write_fails.set()
        with pytest.raises(h5.CheckpointError, match="model.ckpt-0.h5"):
            hook.wait_until_finished()


def test_a_failed_save_is_raised_at_the_end(folder, background, full_disk):
    hook = h5.H5CheckpointHook(folder, save_steps=100, background=background)
    full_disk["full"] = False
    train_op = counting_graph()
    with pytest.raises(h5.CheckpointError, match="model.ckpt-1.h5"):
        with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
            session.run(train_op)
            hook.wait_until_finished()
            full_disk["full"] = True


def test_the_last_step_is_saved_even_if_the_save_before_failed(folder, first_write_fails):
    """The failure comes too late to be raised at a step; the disk has room again."""
    listener = Listener()
    hook = h5.H5CheckpointHook(folder, save_steps=100, listeners=[listener])
    train_op = counting_graph()
    with pytest.raises(h5.CheckpointError, match="model.ckpt-0.h5"):
        with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
            session.run(train_op)
            first_write_fails.set()
    assert steps(folder) == [1]
    assert listener.calls[-1] == ("end", 1)


def test_warn_goes_on_and_recovers(folder, background, full_disk, caplog):
    listener = Listener(folder)
    hook = h5.H5CheckpointHook(
        folder, save_steps=2, background=background, on_error="warn", listeners=[listener]
    )
    train_op = counting_graph()
    with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
        for _ in range(4):
            session.run(train_op)
        session.run(train_op)
        with pytest.raises(h5.CheckpointError):
            hook.wait_until_finished()
        full_disk["full"] = False
        for _ in range(3):
            session.run(train_op)
    assert steps(folder) == [6, 8]
    messages = [r.getMessage() for r in caplog.records if "is not saved" in r.getMessage()]
    assert len(messages) == 3 and "step 4 is not saved: cannot save" in messages[2]
    assert [c for c in listener.calls if c[0] == "after"] == [("after", 6), ("after", 8)]


def test_warn_still_raises_at_the_end_if_the_last_save_failed(folder, background, full_disk):
    hook = h5.H5CheckpointHook(folder, save_steps=2, background=background, on_error="warn")
    with pytest.raises(h5.CheckpointError, match="model.ckpt-5.h5"):
        train([hook], 5)


def test_an_error_that_is_no_failed_save_is_never_only_a_warning(folder, monkeypatch):
    def bug(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint_file, "_encode", bug)
    hook = h5.H5CheckpointHook(folder, save_steps=2, on_error="warn")
    with pytest.raises(ZeroDivisionError):
        train([hook], 5)


# Signals


@pytest.fixture
def handlers():
    """Whatever a test does, the process gets its handlers back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    earlier = {number: signal.getsignal(number) for number in numbers}
    yield earlier
    for number, handler in earlier.items():
        signal.signal(number, handler)


class Send(tf.train.SessionRunHook):
    """Sends signals to its own process in the middle of given runs."""

    def __init__(self, signals):
        self.signals, self.run = signals, 0

    def before_run(self, run_context):
        self.run += 1
        if self.run in self.signals:
            os.kill(os.getpid(), self.signals[self.run])


def test_sigusr1_saves_and_training_goes_on(folder, handlers):
    send = Send({4: signal.SIGUSR1, 7: signal.SIGUSR1})
    hook = h5.H5CheckpointHook(folder, save_steps=100, save_on_signal=signal.SIGUSR1)
    train([hook, send], 10)
    assert steps(folder) == [0, 4, 7, 10]
    assert signal.getsignal(signal.SIGUSR1) == handlers[signal.SIGUSR1]


def test_sigterm_saves_and_training_ends_cleanly(folder, background, handlers):
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    listener = Listener(folder)
    hook = h5.H5CheckpointHook(
        folder,
        save_steps=100,
        save_on_signal=[signal.SIGTERM, signal.SIGUSR1],
        background=background,
        listeners=[listener],
    )
    train([hook, Send({5: signal.SIGTERM})], 1000)
    assert steps(folder) == [0, 5]
    assert listener.calls[-1] == ("end", 5)
    assert heard == [signal.SIGTERM]  # the earlier handler, which is back, too
    os.kill(os.getpid(), signal.SIGTERM)
    signal.getsignal(signal.SIGTERM)
    assert heard == [signal.SIGTERM] * 2
    resume([h5.H5CheckpointHook(folder, save_steps=100)], 8)
    assert h5.load_variable(folder, "net/w:0").tolist() == [8] * 4


def test_a_signal_when_the_step_is_saved_already_saves_nothing_again(folder, handlers):
    hook = h5.H5CheckpointHook(folder, save_steps=4, save_on_signal=signal.SIGUSR1)
    train([hook, Send({4: signal.SIGUSR1})], 6)
    assert steps(folder) == [0, 4, 6]


def test_without_save_on_signal_no_handler_is_touched(folder, handlers):
    hook = h5.H5CheckpointHook(folder, save_steps=4)
    train_op = counting_graph()
    with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
        session.run(train_op)
        for number, handler in handlers.items():
            assert signal.getsignal(number) == handler


def test_after_training_that_raised_a_signal_goes_to_the_earlier_handler(folder, handlers):
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    hook = h5.H5CheckpointHook(folder, save_steps=4, save_on_signal=signal.SIGTERM)
    train_op = counting_graph()
    with pytest.raises(ValueError):
        with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
            session.run(train_op)
            raise ValueError
    os.kill(os.getpid(), signal.SIGTERM)
    signal.getsignal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]


# Background


def test_training_goes_on_while_a_file_is_written(folder, monkeypatch):
    go, real = threading.Event(), block_output.write_all

    def slow(file, data, offset):
        assert go.wait(300)
        real(file, data, offset)

    monkeypatch.setattr(block_output, "write_all", slow)
    train_op = counting_graph()
    hook = h5.H5CheckpointHook(folder, save_steps=100)
    with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
        for _ in range(50):
            session.run(train_op)
        assert steps(folder) == []
        go.set()
        hook.wait_until_finished()
        assert steps(folder) == [0]
        assert h5.load_variable(folder, "net/w:0").tolist() == [0] * 4


def test_every_file_is_of_one_step(folder, use_resource):
    """1,000 saves while training updates as fast as it can: no file mixes two steps."""
    step = tf.train.get_or_create_global_step()
    updates = [
        tf.get_variable(
            "v{}".format(i), [1000], initializer=tf.zeros_initializer(), use_resource=use_resource
        ).assign_add(tf.ones([1000]))
        for i in range(10)
    ]
    with tf.control_dependencies(updates):
        train_op = step.assign_add(1)
    train([h5.H5CheckpointHook(folder, save_steps=1, max_to_keep=None)], 999, train_op)
    assert steps(folder) == list(range(1000))
    for n, path in h5.list_checkpoints(folder):
        with h5.load_checkpoint(path) as checkpoint:
            values = checkpoint.read_all()
            assert values.pop("global_step:0") == n
            assert all((v == n).all() for v in values.values()), path


def test_progress(folder, capsys):
    hook = h5.H5CheckpointHook(folder, save_steps=2, progress=True)
    train([hook], 5)
    err = capsys.readouterr().err
    assert "5step" in err and "checkpoint=5" in err
