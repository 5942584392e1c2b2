"""The interrupt sweep: an exception at every line of ours that the training thread runs.

    python tests/sweeps/interrupt_sweep.py               # every line, and 300 real Ctrl-Cs
    python tests/sweeps/interrupt_sweep.py --every 50 --signals 0   # a slice
    python tests/sweeps/interrupt_sweep.py --only "saves KeyboardInterrupt background job.py:73 1"

A trace function raises KeyboardInterrupt or MemoryError at every line of the package's code, the
first and the last time that the training thread comes by (``--occurrences``), while a real session

- ``saves``: trains and saves, with saves that wait for the one before;
- ``waits``: calls ``wait_until_finished()`` while a file is being written;
- ``ends``: leaves the ``with`` block;
- ``restores``: is created on a folder of checkpoints;
- ``recovers``: is made anew after the connection was lost.

The program catches it inside the ``with`` block, as people do to finish cleanly. And real processes
that train get a real SIGINT, some two of them, at random moments. Afterwards, always:

- every file under a final name is of one step, and verifies; no temporary file is left;
- a listener heard of no save that was not there, and of none twice;
- if ``end()`` returned, the last step is on disk;
- the same hook, in a new session, resumes from the newest file, saves and ends;
- nothing but the injected exception was raised (MemoryError: itself, or a CheckpointError with it
  as the cause); no thread is left.

Exit code 1 if anything is violated.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import itertools
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import tensorflow.compat.v1 as tf

import tf_h5_callback as h5
from tf_h5_callback.file import output

PACKAGE = os.path.dirname(h5.__file__)
SIZE = 1 << 18  # elements; 1 MB: copied by the operation of the snapshot
HANGS_AFTER = 300  # seconds
VICTIM_HANGS_AFTER = 60


class Event(NamedTuple):
    """A line of the package, and how often it was come by."""

    line: str
    occurrence: int


class Injector:
    """Raises at one line event of the package in this thread; notes all events before it."""

    def __init__(self, error: type, at: Optional[Event]):
        self.error, self.at = error, at
        self.seen: Dict[str, int] = collections.OrderedDict()  # line -> how often
        self.done = False

    def __enter__(self) -> Injector:
        sys.settrace(self._called)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        sys.settrace(None)

    def _called(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            name = os.path.relpath(frame.f_code.co_filename, PACKAGE)
            line = "{}:{}".format(name, frame.f_lineno)
            self.seen[line] = self.seen.get(line, 0) + 1
            if self.at == (line, self.seen[line]):
                self.done = True
                sys.settrace(None)
                raise self.error("injected")
        return self._line


class Listener(tf.train.CheckpointSaverListener):
    """Looks whether what it hears is true."""

    def __init__(self, folder: str):
        self.folder, self.heard, self.violations = folder, [], []  # type: Any

    def after_save(self, session: Any, step: int) -> None:
        if step not in dict(h5.list_checkpoints(self.folder)):
            self.violations.append("after_save({}) of a file that is not there".format(step))
        if step in self.heard:
            self.violations.append("after_save({}) twice".format(step))
        self.heard.append(step)


class Lost(tf.train.SessionRunHook):
    """Loses the session once, when asked to."""

    now = False

    def after_run(self, run_context: Any, run_values: Any) -> None:
        if self.now:
            self.now = False
            raise tf.errors.AbortedError(None, None, "the connection is lost")


class Model(NamedTuple):
    """A variable all of whose elements are the global step."""

    step: Any
    train_op: Any
    scaffold: Any


def model() -> Model:
    step = tf.train.get_or_create_global_step()
    w = tf.get_variable("w", [SIZE], initializer=tf.zeros_initializer())
    small = tf.get_variable("small", [10], initializer=tf.zeros_initializer())
    with tf.control_dependencies([v.assign_add(tf.ones_like(v)) for v in (w, small)]):
        return Model(step, step.assign_add(1), tf.train.Scaffold())


class Trial:
    """One training, with one injection; `violations` tells what was wrong afterwards."""

    def __init__(
        self, model: Model, folder: str, error: type, background: bool, at: Optional[Event]
    ):
        self.model, self.folder = model, folder
        self.listener, self.lost = Listener(folder), Lost()
        self.hook = h5.H5CheckpointHook(
            folder,
            save_steps=2,
            max_to_keep=3,
            background=background,
            listeners=[self.listener],
        )
        self.injector = Injector(error, at)
        self.violations: List[str] = []
        self.last: Optional[int] = None  # the last step, if the session ended normally

    def session(self) -> Any:
        creator = tf.train.ChiefSessionCreator(self.model.scaffold)
        return tf.train.MonitoredSession(creator, hooks=[self.hook, self.lost])

    def run(self, case: Callable[[Trial], None]) -> None:
        try:
            case(self)
        except BaseException as error:
            self.last = None
            self._look_at(error)
        finally:
            sys.settrace(None)

    def train(self, session: Any, steps: int) -> None:
        for _ in range(steps):
            session.run(self.model.train_op)

    def catching(self, session: Any, action: Callable[[], object]) -> None:
        """Does something as a program does that finishes cleanly on Ctrl-C."""
        try:
            with self.injector:
                action()
        except (KeyboardInterrupt, MemoryError, h5.CheckpointError) as error:
            self._look_at(error)
        self.last = int(session._coordinated_creator.tf_sess.run(self.model.step))

    def _look_at(self, error: BaseException) -> None:
        chain: List[Any] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        fine = type(error) is self.injector.error or (
            isinstance(error, h5.CheckpointError) and type(chain[-1]) is MemoryError
        )
        if not (self.injector.done and fine):
            self.violations.append("raised {!r}".format(error))

    def check(self) -> List[str]:
        found = self.violations + self.listener.violations
        for thread in threading.enumerate():
            if thread.name.startswith("tf_h5_callback"):
                thread.join(HANGS_AFTER)
                if thread.is_alive():
                    return [*found, "{} does not end".format(thread.name)]
        found += look_into(self.folder, self.last)
        before = max((step for step, _ in h5.list_checkpoints(self.folder)), default=0)
        try:
            with self.session() as session:
                began = int(session._coordinated_creator.tf_sess.run(self.model.step))
                self.train(session, 3)
        except BaseException as error:
            return [*found, "the next training raised {!r}".format(error)]
        if began < before:  # it may be later: what was handed over is written before it begins
            found.append("the next training began at {}, not at {}".format(began, before))
        return found + self.listener.violations + look_into(self.folder, began + 3)


def look_into(folder: str, last: Optional[int]) -> List[str]:
    """What is wrong with a folder; ``last`` must be there."""
    found, steps = [], []
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".h5"):
            found.append("{} is left".format(name))
            continue
        try:
            with h5.Checkpoint(os.path.join(folder, name)) as checkpoint:
                values = checkpoint.read_all()
        except h5.CheckpointError as error:
            found.append(str(error))
            continue
        steps.append(int(values["global_step:0"]))
        held = np.unique(np.concatenate([v.reshape(-1) for v in values.values()]))
        if name != "model.ckpt-{}.h5".format(steps[-1]) or held.tolist() != [steps[-1]]:
            found.append("TORN: {} holds {}".format(name, held))
    if last is not None and last not in steps:
        found.append("LOST: end() returned at step {}, files {}".format(last, sorted(steps)))
    return found


def saves(trial: Trial) -> None:
    with trial.session() as session:
        trial.catching(session, lambda: trial.train(session, 5))


def waits(trial: Trial) -> None:
    with trial.session() as session:
        trial.train(session, 2)
        trial.catching(session, trial.hook.wait_until_finished)


def ends(trial: Trial) -> None:
    session = trial.session()
    trial.train(session, 3)
    trial.last = 3
    with trial.injector:
        session.close()


def restores(trial: Trial) -> None:
    with trial.session() as session:
        trial.train(session, 3)
    trial.listener.heard.clear()
    with trial.injector:
        session = trial.session()
    session.close()


def recovers(trial: Trial) -> None:
    with trial.session() as session:
        trial.train(session, 3)
        trial.lost.now = True
        trial.listener.heard.clear()
        trial.catching(session, lambda: trial.train(session, 2))


CASES = {case.__name__: case for case in (saves, waits, ends, restores, recovers)}
ERRORS = {error.__name__: error for error in (KeyboardInterrupt, MemoryError)}
WHERE = {"background": True, "foreground": False}


class Outcome(NamedTuple):
    """An injection: of which kind, where, and what was wrong afterwards."""

    kind: str
    where: str
    violations: List[str]


def slow_disk() -> None:
    """So that there are saves that wait for the one before."""
    real = output.write_all

    def write_all(*args: Any) -> None:
        time.sleep(0.005)
        real(*args)

    output.write_all = write_all


def one(
    model: Model,
    case: str,
    error: str,
    where: str,
    at: Optional[Event],
    seen: Optional[Dict[str, int]] = None,
) -> Outcome:
    """One injection; at None there is none. ``seen`` gets the lines, and how often each came."""
    folder = tempfile.mkdtemp(prefix="interrupt_sweep-")
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    try:
        trial = Trial(model, folder, ERRORS[error], WHERE[where], at)
        trial.run(CASES[case])
        if seen is not None:
            seen.update(trial.injector.seen)
        at_what = "nowhere" if at is None else "{} {}".format(*at)
        return Outcome(" ".join((case, error, where)), at_what, trial.check())
    finally:
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(folder, ignore_errors=True)  # a thread may still write, if all is wrong


def sweep(occurrences: int = 2, every: int = 1, seed: int = 0) -> Iterator[Outcome]:
    """Injects at the first so many times of each line, but one, and at the last."""
    rng = random.Random(seed)
    with tf.Graph().as_default():
        built = model()
        for case, error, where in itertools.product(CASES, ERRORS, WHERE):
            events, seen = [], collections.OrderedDict()  # type: Any
            yield one(built, case, error, where, None, seen)
            for line, count in seen.items():
                times = sorted({*range(1, min(occurrences, count + 1)), count})
                events += [Event(line, n) for n in times[:occurrences]]
            for at in events[rng.randrange(every) :: every]:
                yield one(built, case, error, where, at)


# Real signals


def victim(folder: str, seed: int, notes: int) -> None:
    """Trains until it is interrupted; ends cleanly, or dies, as many programs do."""
    catches, background = seed % 2 == 0, seed % 4 < 2
    with tf.Graph().as_default():
        built = model()
        hook = h5.H5CheckpointHook(folder, save_steps=2, max_to_keep=3, background=background)
        with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
            os.write(notes, b"started\n")
            try:
                while True:
                    session.run(built.train_op)
            except KeyboardInterrupt:
                if not catches:
                    raise
            last = int(session._coordinated_creator.tf_sess.run(built.step))
        os.write(notes, "ended {}\n".format(last).encode())


def interrupt(seed: int) -> Outcome:
    """A forked process that trains, and gets SIGINT at a random moment, now and then twice."""
    rng, folder = random.Random(seed), tempfile.mkdtemp(prefix="interrupt_sweep-")
    reader, writer = os.pipe()
    told = os.path.join(folder + "-stderr")
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
        faulthandler.dump_traceback_later(VICTIM_HANGS_AFTER, exit=True)
        victim(folder, seed, writer)
        sys.exit()
    os.close(writer)
    with os.fdopen(reader) as notes:
        assert notes.readline() == "started\n"
        time.sleep(rng.uniform(0, 0.3))
        twice = seed % 10 == 9
        for _ in range(1 + twice):
            os.kill(pid, signal.SIGINT)
            time.sleep(rng.uniform(0, 0.03) if twice else 0)
        ended = notes.readline().split()
    status = os.waitpid(pid, 0)[1]
    with open(told, errors="replace") as f:
        stderr = f.read()
    os.remove(told)
    violations = look_into(folder, int(ended[1]) if ended else None)
    kind = "SIGINT, twice" if twice else "SIGINT"
    if "Timeout (" in stderr and "lock_util.py" in stderr:
        # TensorFlow 2's own session lock can be left held by an interrupt; then nothing runs.
        kind = "SIGINT, TensorFlow hangs"
    elif "Timeout (" in stderr:
        violations.append("hangs: {}".format(stderr))
    if kind != "SIGINT":  # the clean-up may not have come to its end
        violations = [v for v in violations if not v.endswith("tmp is left")]
    # The end of a traceback. (A second one may come while Python exits, which it then says.)
    errors = re.findall(r"^[\w.]*(?:Error|Exception)\b(?! ignored).*", stderr, re.MULTILINE)
    # TensorFlow 1 makes that of an interrupt in one of its functions.
    errors = [e for e in errors if not e.startswith("SystemError: <built-in function TF_")]
    if errors:
        violations.append("stderr: {}".format(errors))
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGINT:
        violations.append("ended with {}".format(status))
    shutil.rmtree(folder)
    return Outcome(kind, str(seed), violations)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--occurrences", type=int, default=2, help="how often at one line")
    parser.add_argument("--every", type=int, default=1, help="only at every so manieth of these")
    parser.add_argument("--signals", type=int, default=300, help="how many real SIGINTs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", choices=list(CASES), help="only one")
    parser.add_argument("--only", help="one injection again, as it was printed")
    args = parser.parse_args()
    quiet()
    slow_disk()
    if args.only:
        with tf.Graph().as_default():
            case, error, where, line, occurrence = args.only.split()
            print(one(model(), case, error, where, Event(line, int(occurrence))))
        return 0
    if args.case:
        for case in set(CASES) - {args.case}:
            del CASES[case]
    # First: what has trained before it forks has threads that the child lacks.
    outcomes = [interrupt(args.seed + i) for i in range(args.signals)]
    for outcome in sweep(args.occurrences, args.every, args.seed):
        outcomes.append(outcome)
        if outcome.violations:
            print(outcome, flush=True)
    bad = [outcome for outcome in outcomes if outcome.violations]
    print(table(outcomes))
    for outcome in bad[:40]:
        print(outcome)
    return 1 if bad else 0


def quiet() -> None:
    logging.getLogger("tf_h5_callback").setLevel("CRITICAL")
    logging.getLogger("tensorflow").setLevel("CRITICAL")
    tf.disable_v2_behavior()


def table(outcomes: List[Outcome]) -> str:
    """Counts by kind, as text."""
    counts: Dict[str, List[int]] = collections.OrderedDict()
    for outcome in outcomes:
        row = counts.setdefault(outcome.kind, [0, 0])
        row[0] += 1
        row[1] += bool(outcome.violations)
    lines = ["{:<44}{:>10}{:>12}".format("Python " + sys.version.split()[0], "cases", "violations")]
    lines += ["{:<44}{:>10}{:>12}".format(kind, *row) for kind, row in counts.items()]
    lines.append("{:<44}{:>10}{:>12}".format("all", *map(sum, zip(*counts.values()))))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
