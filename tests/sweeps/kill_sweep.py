"""The kill sweep: SIGKILL at every system call of a save, and at random moments.

    python tests/sweeps/kill_sweep.py                # everything: over 1,000 kills, some minutes
    python tests/sweeps/kill_sweep.py --training 0   # without TensorFlow
    python tests/sweeps/kill_sweep.py --slice 20 --kills 0 --training 0   # a slice of the first

Real processes train and save, and are killed:

- at the n-th system call of a save, for every n: strace injects the signal, before the call is
  executed. These save below TensorFlow, in the main thread, with the hook's ``Checkpointer``.
- at random moments around a save, again and again: what resumes after a kill is the next victim.
  Some save below TensorFlow, the others are whole training sessions with the hook.

A victim notes down what it does in a file of its own, so that the driver knows what must be there
after the kill. It then checks, and the same command is started again and checked as well:

- every file that is not a dot-file is a whole checkpoint: its name, its step, all checksums;
- each holds the values that an uninterrupted run has at that step, bit for bit;
- whatever was there before or was reported as saved is there, unless retention counted it out;
- no more steps are lost than may be, and training resumes from the newest file;
- a start removes the temporary files that the kills before it left.

Exit code 1 if anything is violated.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import glob
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from tf_h5_callback.errors import CheckpointError
from tf_h5_callback.file import writer as checkpoint_file
from tf_h5_callback.file.reader import Checkpoint
from tf_h5_callback.folder.directory import CheckpointDir, read_verified
from tf_h5_callback.folder.retention import Retention
from tf_h5_callback.saving import checkpointer
from tf_h5_callback.saving.budget import SavingCost
from tf_h5_callback.saving.progress import Progress
from tf_h5_callback.saving.signals import SignalRequest
from tf_h5_callback.saving.timer import SaveTimer

Tensors = Dict[str, np.ndarray]

# strace counts calls from the start of the process, so starts must be alike.
_ENVIRONMENT = dict(
    os.environ,
    PYTHONHASHSEED="0",
    PYTHONDONTWRITEBYTECODE="1",
    OPENBLAS_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES="-1",
    TF_CPP_MIN_LOG_LEVEL="3",
)
_TIMEOUT = 300  # seconds; a victim that takes longer hangs


class Workload(NamedTuple):
    """What a victim does: trains to a step, saving every so many.

    Attributes:
      name: for the table.
      sizes: the number of elements of each tensor.
      last_step: where training ends.
      save_steps, max_to_keep: as in the hook.
      may_lose: how many steps a kill may cost. ``save_steps``; a save in the background adds the
        steps that are trained meanwhile, which are never more than another ``save_steps``.
      trained: how far an earlier run came, whose files are in the folder.
      restore: the step of the file to begin with; None: the newest.
      tensorflow: None: below TensorFlow; ``"background"`` or ``"foreground"``: a session and hook.
      writer: the name in `WRITERS` of what stands in for `write_checkpoint`.
      moments: seconds after the beginning of a save within which random kills fall.
    """

    name: str
    sizes: List[int]
    last_step: int
    save_steps: int = 2
    max_to_keep: int = 2
    may_lose: int = 2
    trained: Optional[int] = None
    restore: Optional[int] = None
    tensorflow: Optional[str] = None
    writer: str = "write_checkpoint"
    moments: float = 0.0


# Written together, written alone, written in two blocks: file_layout.BLOCK_SIZE is 16 MB.
SMALL = [1, 50, 0, 300] * 10 + [20 * 1000]
LARGE = [1, 50, (20 << 20) // 8]

AT_SYSTEM_CALLS = [
    Workload("new folder", SMALL, last_step=4),
    Workload("later saves, retention, 20 MB", LARGE, trained=4, last_step=8),
    Workload("same step again", SMALL, max_to_keep=3, trained=6, restore=4, last_step=8),
]
AT_RANDOM = [
    Workload("small tensors", SMALL, last_step=300, moments=0.015),
    Workload("20 MB", LARGE, last_step=60, moments=0.06),
]
TRAINING = [
    Workload(
        "training, save in the " + where,
        sizes=[1, 1000, 1 << 20],
        last_step=300,
        save_steps=5,
        max_to_keep=3,
        may_lose=may_lose,
        tensorflow=where,
        moments=0.05,
    )
    for where, may_lose in [("background", 10), ("foreground", 5)]
]


def state_at(workload: Workload, step: int) -> Tensors:
    """The tensors after so many steps, each of which adds its number to all elements."""
    return {
        "w{}:0".format(i): np.arange(size) + 1000 * i + step * (step + 1) // 2
        for i, size in enumerate(workload.sizes)
    }


def read_all(path: str) -> Tensors:
    with Checkpoint(path) as checkpoint:
        return checkpoint.read_all()


# ---- The victims -------------------------------------------------------------------------------


class Note:
    """Notes down ``start``, ``step``, ``saving``, ``saved`` with a step.

    A line is one write() and survives a SIGKILL; strace shows it too.
    """

    def __init__(self, path: str):
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, event: str, step: int) -> None:
        os.write(self._handle, "{} {}\n".format(event, step).encode())


def victim(workload: Workload, folder: str, notes: str) -> None:
    """The process that is killed, and the one that resumes."""
    assert hasattr(checkpointer, "write_checkpoint")
    checkpointer.write_checkpoint = WRITERS[workload.writer]
    train = train_with_tensorflow if workload.tensorflow else train_with_numpy
    train(workload, folder, Note(notes))


def train_with_numpy(workload: Workload, folder: str, note: Note) -> None:
    """What the hook does, without TensorFlow and in the main thread."""
    files = CheckpointDir(folder, retention=Retention(max_to_keep=workload.max_to_keep))
    files.open_for_writing()

    class Training(checkpointer.Training):
        tensorflow_version = "none"

        def before_save(self, step: int) -> None:
            note("saving", step)

        def snapshot(self, owner: checkpointer.Save) -> Tuple[Tensors, int]:
            return {"global_step:0": np.array(step), **state}, step

        def after_save(self, step: int) -> bool:
            note("saved", step)
            return False

    saver = checkpointer.Checkpointer(
        files,
        SaveTimer(workload.save_steps),
        SavingCost(),
        SignalRequest(None),
        Progress(),
        background=False,
    )
    training = Training()

    if workload.restore is None:
        newest = files.read_newest_intact(read_verified, move_damaged=True)
        read = newest and newest[1]
    else:
        read = read_all(files.path_for(workload.restore))
    if read is None:
        step, state = 0, state_at(workload, 0)
        note("start", step)
        saver.save(step, training)
    else:
        state = read
        step = int(state.pop("global_step:0"))
        note("start", step)
    while step < workload.last_step:
        step += 1
        for value in state.values():
            value += step
        note("step", step)
        if step % workload.save_steps == 0:
            saver.save(step, training)


def train_with_tensorflow(workload: Workload, folder: str, note: Note) -> None:
    """A training script: variables that follow the step, and a history of the shuffled input."""
    import tensorflow.compat.v1 as tf

    from tf_h5_callback.graph.hook import H5CheckpointHook

    class Listener(tf.train.CheckpointSaverListener):
        def before_save(self, session: Any, step: int) -> None:
            note("saving", step)

        def after_save(self, session: Any, step: int) -> None:
            note("saved", step)

    with tf.Graph().as_default():
        step = tf.train.get_or_create_global_step()
        data = tf.data.Dataset.range(1000).shuffle(100, seed=5).repeat()
        iterator = tf.data.make_initializable_iterator(data)
        tf.add_to_collection(tf.GraphKeys.TABLE_INITIALIZERS, iterator.initializer)
        history = tf.get_variable("history", initializer=np.full(workload.last_step, -1))
        updates = [tf.scatter_update(history, step, iterator.get_next())]
        for name, value in state_at(workload, 0).items():
            variable = tf.get_variable(name[: -len(":0")], initializer=value)
            updates.append(tf.assign_add(variable, tf.fill(value.shape, step + 1)))
        with tf.control_dependencies(updates):
            train_op = tf.assign_add(step, 1)
        hook = H5CheckpointHook(
            folder,
            save_steps=workload.save_steps,
            max_to_keep=workload.max_to_keep,
            iterators=[iterator],
            listeners=[Listener()],
            background=workload.tensorflow == "background",
        )
        with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
            done = session.run_step_fn(lambda step_context: step_context.session.run(step))
            note("start", done)
            while done < workload.last_step:
                done = session.run(train_op)
                note("step", done)


# ---- Bad writers, to see that they are noticed -------------------------------------------------


def write_in_place(path: str, tensors: Tensors, **attributes: Any) -> int:
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.dirname(path))) as elsewhere:
        copy = os.path.join(elsewhere, "copy")
        size = checkpoint_file.write_checkpoint(copy, tensors, **attributes)
        with open(copy, "rb") as source, open(path, "wb", buffering=0) as f:
            for block in iter(functools.partial(source.read, 16 << 10), b""):
                f.write(block)
                os.fsync(f.fileno())  # takes its time, so that kills fall in here
    return size


def remove_first(path: str, tensors: Tensors, **attributes: Any) -> int:
    for old in glob.glob(os.path.join(os.path.dirname(path), "*.h5")):
        os.remove(old)
    return checkpoint_file.write_checkpoint(path, tensors, **attributes)


def write_other_values(path: str, tensors: Tensors, **attributes: Any) -> int:
    others = {name: value ^ (value.size == 50) for name, value in tensors.items()}
    return checkpoint_file.write_checkpoint(path, others, **attributes)


WRITERS: Dict[str, Callable[..., int]] = {
    f.__name__: f
    for f in [
        checkpoint_file.write_checkpoint,
        write_in_place,
        remove_first,
        write_other_values,
    ]
}


# ---- What must be true after a kill ------------------------------------------------------------


class Found(NamedTuple):
    """What is in a folder."""

    intact: FrozenSet[int] = frozenset()
    temporary: FrozenSet[str] = frozenset()
    damaged: int = 0
    violations: Tuple[str, ...] = ()

    @property
    def newest(self) -> int:
        return max(self.intact, default=0)


class Outcome(NamedTuple):
    """What a kill did."""

    killed: Optional[bool]  # False: the kill came too early or too late; None: none was meant
    damaged: int
    steps_lost: int
    temporary: int  # files left over
    violations: Tuple[str, ...]


def look_into(folder: str, expected: Callable[[int], Tensors]) -> Found:
    """Reads everything. Does not use the package's listing: a bad name is to be noticed, too."""
    names = os.listdir(folder) if os.path.exists(folder) else []
    intact, damaged, violations = set(), 0, []
    for name in sorted(n for n in names if not n.startswith(".")):
        try:
            with Checkpoint(os.path.join(folder, name)) as checkpoint:
                step, tensors = checkpoint.step, checkpoint.read_all()
        except CheckpointError as error:
            damaged += 1
            violations.append("damaged: {}".format(error))
            continue
        if name != "model.ckpt-{}.h5".format(step):
            violations.append("wrong name: {} holds step {}".format(name, step))
            continue
        wrong = [k for k, v in expected(step).items() if not _same(tensors.get(k), v)]
        if wrong:
            violations.append("wrong values: {} in {}".format(", ".join(wrong), name))
        intact.add(step)
    temporary = frozenset(name for name in names if name.endswith(".tmp"))
    return Found(frozenset(intact), temporary, damaged, tuple(violations))


def _same(a: Optional[np.ndarray], b: np.ndarray) -> bool:
    return a is not None and (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a, b)


class Run:
    """One start of a workload, in a process of its own.

    Args:
      root: a scratch folder; the checkpoints are in its subfolder ``run``.
      prefix: a command to run it under.
    """

    def __init__(
        self,
        workload: Workload,
        root: str,
        expected: Callable[[int], Tensors],
        before: Found,
        prefix: Tuple[str, ...] = (),
    ):
        self._workload, self._expected, self._before = workload, expected, before
        self.root = root
        self._folder = os.path.join(root, "run")
        self._notes = os.path.join(root, "notes")
        self._errors = os.path.join(root, "errors")
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._notes)
        this_file = os.path.abspath(__file__)
        arguments = json.dumps([workload, self._folder, self._notes])
        with open(self._errors, "wb") as errors:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, this_file, "victim", arguments],
                env=_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
            )  # fmt: skip

    def kill_after(self, saves: int, seconds: float) -> None:
        """Kills it so many seconds after the beginning of a save, unless it has ended."""
        deadline = time.monotonic() + _TIMEOUT
        while self._process.poll() is None and time.monotonic() < deadline:
            if sum(event == "saving" for event, _ in self._noted()) >= saves:
                time.sleep(seconds)
                self._process.kill()
                return
            time.sleep(0.001)

    def _noted(self) -> List[Tuple[str, int]]:
        try:
            with open(self._notes) as f:
                lines = [line.split() for line in f.read().split("\n")[:-1]]
        except FileNotFoundError:
            return []
        return [(event, int(step)) for event, step in lines]

    def check(self, aim: Optional[str] = None) -> Tuple[Outcome, Found]:
        """Waits for the end and compares what is there with what must be.

        Args:
          aim: None if the process was not to be killed, ``"anywhere"``, or ``"in a save"``.
        """
        workload, before = self._workload, self._before
        try:
            status: Optional[int] = self._process.wait(_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            status = None
        noted = self._noted()
        found = look_into(self._folder, self._expected)
        violations = list(found.violations)

        died = status == -signal.SIGKILL
        hit = died and (aim == "anywhere" or noted[-1:] and noted[-1][0] == "saving")
        if status != 0 and not (died and aim):
            with open(self._errors) as f:
                violations.append("failed: status {}\n{}".format(status, f.read()[-2000:]))
        if status == 0 and found.newest != workload.last_step:
            violations.append("ended: with step {} as the last".format(found.newest))

        known = before.intact | found.intact | {step for event, step in noted if event == "saved"}
        gone = set(sorted(known)[-workload.max_to_keep :]) - found.intact
        if gone:
            violations.append("lost: the good files of steps {}".format(sorted(gone)))
        newest = before.newest if workload.restore is None else workload.restore
        starts = [step for event, step in noted if event == "start"]
        if starts not in ([], [newest]):
            violations.append("resumed: at {}, not at {}".format(starts, newest))
        trained = max([step for event, step in noted if event == "step"], default=0)
        steps_lost = max(0, trained - found.newest)
        if steps_lost > workload.may_lose:
            violations.append("lost: {} steps".format(steps_lost))
        if starts and found.temporary & before.temporary:
            violations.append("not removed: {}".format(found.temporary & before.temporary))
        temporary = len(found.temporary - before.temporary)
        return (
            Outcome(
                bool(hit) if aim else None, found.damaged, steps_lost, temporary, tuple(violations)
            ),
            found,
        )


# ---- The sweeps --------------------------------------------------------------------------------


def strace_works() -> bool:
    """Whether strace is installed and may trace."""
    try:
        return subprocess.call(strace("-o", os.devnull) + ("true",), stderr=subprocess.DEVNULL) == 0
    except FileNotFoundError:
        return False


def strace(*options: str) -> Tuple[str, ...]:
    # Not --seccomp-bpf, which would be faster: with it, strace 6.1 injects no signal.
    return ("strace", "-f", *options)


def system_calls(log: str) -> List[Tuple[str, int]]:
    """The calls of the main thread inside saves, as ``(name, how many of that name)``."""
    counts: Dict[str, int] = collections.Counter()
    calls, main, saving = [], None, False
    with open(log, errors="replace") as f:
        for line in f:
            match = re.match(r'(\d+) +(\w+)\((?:\d+, "(saving|saved) \d+\\n")?', line)
            if not match:
                continue
            pid, name, event = match.groups()
            main = main or pid
            if pid != main:
                continue
            counts[name] += 1
            if event:
                saving = event == "saving"
            elif saving:
                calls.append((name, counts[name]))
    return calls


def sweep_system_calls(
    workload: Workload, every: int, pool: ThreadPoolExecutor, scratch: str
) -> List[Outcome]:
    """Kills at each system call of the saves, each time in the same folder."""
    root = _subfolder(scratch)
    expected = functools.partial(state_at, workload)
    before = Found()
    if workload.trained is not None:
        earlier = workload._replace(
            last_step=workload.trained, restore=None, writer="write_checkpoint"
        )
        outcome, before = Run(earlier, root, expected, before).check()
        assert not outcome.violations, outcome

    def again(*options: str) -> Run:
        copy = _subfolder(scratch)
        if before.intact:
            shutil.copytree(os.path.join(root, "run"), os.path.join(copy, "run"))
        return Run(workload, copy, expected, before, strace(*options))

    def kill_at(call: Tuple[str, int]) -> Outcome:
        name, n = call
        where = "{} at call {} of {}: ".format(workload.name, n, name)
        inject = "inject={}:signal=KILL:when={}".format(name, n)
        run = again("-o", os.devnull, "-e", "trace=" + name, "-e", inject)
        killed, found = run.check("in a save")
        resumed, _ = Run(workload, run.root, expected, found).check()
        shutil.rmtree(run.root)
        violations = killed.violations + tuple("after it resumed: " + v for v in resumed.violations)
        return killed._replace(violations=tuple(where + v for v in violations))

    log = os.path.join(scratch, "strace.log")
    outcome, _ = again("-o", log).check()
    calls = system_calls(log)
    if not outcome.violations:
        assert calls, "strace saw no save"
    return [outcome, *pool.map(kill_at, calls[::every])]


def sweep_random_moments(
    workload: Workload, scratch: str, expected: Callable[[int], Tensors], kills: int, seed: int
) -> List[Outcome]:
    """Kills and resumes, again and again, in one folder; when training has ended, in a new one."""
    choose = random.Random(seed)
    outcomes: List[Outcome] = []
    root, before = _subfolder(scratch), Found()
    while True:
        run = Run(workload, root, expected, before)
        enough = _kills(outcomes) >= kills
        if not enough:
            run.kill_after(choose.randint(1, 4), choose.uniform(0, workload.moments))
        outcome, before = run.check(None if enough else "anywhere")
        where = "{}, start {} of seed {}: ".format(workload.name, len(outcomes), seed)
        outcomes.append(outcome._replace(violations=tuple(where + v for v in outcome.violations)))
        if enough or outcome.violations:
            shutil.rmtree(root)
            return outcomes
        if not outcome.killed:
            shutil.rmtree(root)
            root, before = _subfolder(scratch), Found()


def uninterrupted(workload: Workload, scratch: str) -> Callable[[int], Tensors]:
    """Trains to the end once; returns what must be in a file of each step, to the last bit."""
    root = _subfolder(scratch)
    outcome, _ = Run(workload, root, functools.partial(state_at, workload), Found()).check()
    assert not outcome.violations, outcome
    last = read_all(CheckpointDir(os.path.join(root, "run")).path_for(workload.last_step))
    # TensorFlow's own bytes, which differ where the position is the same: history tells.
    last = {name: value for name, value in last.items() if not name.startswith("Iterator")}

    def expected(step: int) -> Tensors:
        if step == workload.last_step:
            return last
        history = last["history:0"].copy()
        history[step:] = -1
        return {
            "global_step:0": last["global_step:0"] * 0 + step,
            "history:0": history,
            **state_at(workload, step),
        }

    return expected


def _subfolder(scratch: str) -> str:
    return tempfile.mkdtemp(dir=scratch)


# ---- The table ---------------------------------------------------------------------------------

_ROW = "{:<40} {:>6} {:>7} {:>8} {:>11} {:>10} {:>11} {:>6}"


def sweep(options: argparse.Namespace, scratch: str) -> Iterator[Tuple[str, List[Outcome]]]:
    """Yields each workload with what its kills did."""
    with ThreadPoolExecutor(options.jobs) as pool:
        done = 0
        for workload in AT_SYSTEM_CALLS:
            outcomes = sweep_system_calls(workload, options.slice, pool, scratch)
            yield "each call: " + workload.name, outcomes
            done += _kills(outcomes)
        left = max(0, options.kills - options.training - done)
        seeds = itertools.count(options.seed)
        for kills, workloads in [(left, AT_RANDOM), (options.training, TRAINING)]:
            for workload, share in zip(workloads, _shares(kills, len(workloads))):
                if share:
                    expected = functools.partial(state_at, workload)
                    if workload.tensorflow:
                        expected = uninterrupted(workload, scratch)
                    chains = pool.map(
                        functools.partial(sweep_random_moments, workload, scratch, expected),
                        _shares(share, options.jobs),
                        seeds,
                    )
                    yield "random: " + workload.name, [o for chain in chains for o in chain]


def _shares(total: int, parts: int) -> List[int]:
    return [(total + i) // parts for i in range(parts)]


def _kills(outcomes: List[Outcome]) -> int:
    return sum(outcome.killed is True for outcome in outcomes)


def _missed(outcomes: List[Outcome]) -> int:
    return sum(outcome.killed is False for outcome in outcomes)


def _row(name: str, outcomes: List[Outcome], seconds: float) -> str:
    return _ROW.format(
        name,
        _kills(outcomes),
        _missed(outcomes),
        sum(outcome.damaged for outcome in outcomes),
        max((outcome.steps_lost for outcome in outcomes), default=0),
        sum(outcome.temporary for outcome in outcomes),
        sum(len(outcome.violations) for outcome in outcomes),
        "{:.0f} s".format(seconds),
    )


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1050, help="at least so many in all (1050)")
    parser.add_argument("--training", type=int, default=110, help="of these in TensorFlow (110)")
    parser.add_argument("--slice", type=int, default=1, help="each so many-th system call only (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="victims at a time")
    options = parser.parse_args(arguments)
    if not strace_works():
        parser.error("strace is missing or may not trace (ptrace)")
    begin = start = time.monotonic()
    all_outcomes: List[Outcome] = []
    violations: List[str] = []
    header = "kills", "missed", "damaged", "steps lost", "temporary", "violations", "time"
    print(_ROW.format("SIGKILL at", *header), flush=True)
    with tempfile.TemporaryDirectory(prefix="kill_sweep-") as scratch:
        for name, outcomes in sweep(options, scratch):
            print(_row(name, outcomes, time.monotonic() - start), flush=True)
            start = time.monotonic()
            all_outcomes += outcomes
            violations += [v for outcome in outcomes for v in outcome.violations]
            if _missed(outcomes) > 1 + len(outcomes) // 4:
                violations.append("{}: too many kills missed; nothing is proved".format(name))
    print(_row("all", all_outcomes, time.monotonic() - begin))
    for violation in violations[:20]:
        print(violation)
    return 1 if violations else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["victim"]:
        _workload, _folder, _notes = json.loads(sys.argv[2])
        victim(Workload(*_workload), _folder, _notes)
    else:
        sys.exit(main())
