"""A slice of `python tests/sweeps/damage_sweep.py`, and the proof that it would notice."""

import os
import subprocess
import sys

import pytest

FOLDER = os.path.dirname(os.path.abspath(__file__))


def sweep(*arguments):
    """The exit status, the sums of its table by column, and all it prints."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", os.path.join(FOLDER, "damage_sweep.py"), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    print(process.stdout)
    lines = process.stdout.split("\n")
    sums = dict(zip(lines[1].split(), lines[[li[:4] for li in lines].index("all ")].split()))
    return process.returncode, {key: int(n) for key, n in sums.items() if key != "kind"}


def test_damage_is_noticed_or_harmless():
    status, sums = sweep("--share", "0.01", "--seed", "1")
    assert status == 0
    assert sums["noticed"] > 150 and sums["noticed"] + sums["harmless"] == sums["cases"]


@pytest.mark.parametrize(("file", "check"), [("few", "tensors"), ("wordy", "attributes")])
def test_without_a_checksum_the_sweep_finds_wrong_values(file, check):
    """HDF5's own checksums do not cover tensors, nor attributes above 64 KB."""
    status, sums = sweep("--share", "0.02", "--file", file, "--blind", check)
    assert status == 1 and sums["wrong"] > 0
