"""A slice of `python tests/sweeps/interrupt_sweep.py`, and the proof that it would notice."""

import os
import random
import subprocess
import sys

import pytest

pytest.importorskip("tensorflow.compat.v1")

SWEEP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "interrupt_sweep.py")
# Another slice with each Python, the same one each time.
SEED = random.Random(repr(sys.version_info[:2])).randrange(1000)


def sweep(*arguments, code=None):
    command = [SWEEP] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command, *arguments],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=os.path.dirname(SWEEP),
    )


def test_an_interrupt_at_some_lines():
    done = sweep("--every", "120", "--signals", "6", "--seed", str(SEED))
    assert done.returncode == 0, done.stdout + done.stderr
    row = done.stdout.splitlines()[-1].split()
    assert row[0] == "all" and int(row[1]) > 40 and row[2] == "0"


def test_the_sweep_notices_memory_that_nobody_owns():
    """Who waits does not wait, and who takes a snapshot does not ask whose the arrays are."""
    code = (
        "import sys, interrupt_sweep as s\n"
        "from tf_h5_callback.saving import checkpointer as c\n"
        "c.Save.owns_memory = property(lambda self: False)\n"
        "c.Save.wait = lambda self: None\n"
        "sys.argv[1:] = ['--every', '10', '--occurrences', '1', '--signals', '0']\n"
        "s.CASES.pop('restores'), s.CASES.pop('recovers'), s.WHERE.pop('foreground')\n"
        "sys.exit(s.main())\n"
    )
    done = sweep(code=code)
    assert done.returncode == 1
    row = [line for line in done.stdout.splitlines() if line.startswith("all ")][0].split()
    assert int(row[2]) > 3, done.stdout + done.stderr
