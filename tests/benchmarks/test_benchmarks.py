"""The benchmarks run; what they measure is for a quiet machine, not for a test."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("tensorflow.compat.v1")

FOLDER = os.path.dirname(os.path.abspath(__file__))


def run(script, *arguments):
    process = subprocess.run(
        [sys.executable, "-W", "ignore", os.path.join(FOLDER, script), *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_one_benchmark_and_its_report(tmp_path):
    printed = run("run.py", "idle_step", "--rounds", 1, "--out", tmp_path)
    assert "| a step on which nothing is saved" in printed
    assert (tmp_path / "figures.md").read_text() == printed
    with open(tmp_path / "figures.json") as f:
        figure = json.load(f)["figures"][0]
    assert len(figure["values"]) == 1
    assert set(figure["sides"]) == {"ours", "empty hook", "fetches the step"}
    run("report.py", tmp_path / "figures.json", "--out", tmp_path / "docs")
    table = (tmp_path / "docs" / "table.rst").read_text()
    assert "a step on which nothing is saved" in table and "at most 20 us" in table


def test_an_unknown_benchmark():
    process = subprocess.run(
        [sys.executable, os.path.join(FOLDER, "run.py"), "speed"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.returncode == 2 and "no benchmark is named speed" in process.stderr
