"""A slice of the kill sweep, and what the sweep is there to notice, it notices."""

import functools
from concurrent.futures import ThreadPoolExecutor

import kill_sweep
import pytest
from kill_sweep import AT_RANDOM, AT_SYSTEM_CALLS, TRAINING, Found

NEW_FOLDER, _, SAME_STEP = AT_SYSTEM_CALLS

needs_strace = pytest.mark.skipif(
    not kill_sweep.strace_works(), reason="strace is missing or may not trace (ptrace)"
)


def sweep(workload, every, folder):
    with ThreadPoolExecutor(2) as pool:
        outcomes = kill_sweep.sweep_system_calls(workload, every, pool, str(folder))
    return [v for outcome in outcomes for v in outcome.violations]


@needs_strace
def test_a_slice_of_the_sweep(capsys):
    status = kill_sweep.main(["--slice", "25", "--kills", "20", "--training", "0"])
    out = capsys.readouterr().out
    assert status == 0, out
    kills, missed, damaged = map(int, out.splitlines()[-1].split()[1:4])
    assert kills >= 18
    assert missed < 5
    assert damaged == 0


@needs_strace
def test_the_sweep_notices_a_writer_that_writes_in_place(tmp_path):
    violations = sweep(SAME_STEP._replace(writer="write_in_place"), 20, tmp_path)
    assert any("damaged: " in v and "model.ckpt-6.h5" in v for v in violations)
    assert any("lost: the good files of steps [6]" in v for v in violations)


@needs_strace
def test_the_sweep_notices_a_writer_that_removes_old_files_first(tmp_path):
    violations = sweep(NEW_FOLDER._replace(writer="remove_first"), 20, tmp_path)
    assert any("lost: the good files" in v for v in violations)


@needs_strace
def test_the_sweep_notices_that_more_steps_are_lost(tmp_path):
    violations = sweep(NEW_FOLDER._replace(may_lose=1), 6, tmp_path)
    assert any(v.endswith("lost: 2 steps") for v in violations)


@needs_strace
def test_the_sweep_notices_that_it_kills_nothing(monkeypatch, capsys):
    """As with strace --seccomp-bpf, which injects no signal."""
    real = kill_sweep.strace
    monkeypatch.setattr(kill_sweep, "strace", lambda *options: real(*options[:2]))  # only -o
    monkeypatch.setattr(kill_sweep, "AT_SYSTEM_CALLS", [NEW_FOLDER])
    assert kill_sweep.main(["--slice", "30", "--kills", "0", "--training", "0"]) == 1
    assert "too many kills missed" in capsys.readouterr().out


def test_the_sweep_notices_other_values(tmp_path):
    workload = AT_RANDOM[0]._replace(writer="write_other_values")
    expected = functools.partial(kill_sweep.state_at, workload)
    outcomes = kill_sweep.sweep_random_moments(workload, str(tmp_path), expected, 3, seed=0)
    assert "wrong values: w1:0, " in outcomes[0].violations[0]


def test_the_sweep_notices_what_a_start_should_have_found_and_removed(tmp_path):
    """Told of a file of step 2 that is not there, and of a temporary file that stays."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".stays.tmp").touch()
    before = Found(frozenset([2]), frozenset([".stays.tmp"]))
    expected = functools.partial(kill_sweep.state_at, NEW_FOLDER)
    workload = NEW_FOLDER._replace(max_to_keep=3)
    outcome, _ = kill_sweep.Run(
        workload._replace(save_steps=4), str(tmp_path), expected, before
    ).check()
    assert [v.split(":")[0] for v in outcome.violations] == ["lost", "resumed", "not removed"]


def test_a_training_process_is_killed_and_resumes(tmp_path):
    pytest.importorskip("tensorflow.compat.v1")
    workload = TRAINING[0]._replace(last_step=60)
    expected = kill_sweep.uninterrupted(workload, str(tmp_path))
    outcomes = kill_sweep.sweep_random_moments(workload, str(tmp_path), expected, 3, seed=0)
    assert [v for outcome in outcomes for v in outcome.violations] == []
    assert sum(outcome.killed is True for outcome in outcomes) == 3
