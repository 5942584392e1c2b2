"""The main job, as README's first command runs it."""

import subprocess
import sys

import pytest

pytest.importorskip("tensorflow.compat.v1")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from tf_h5_callback import demo


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    process = subprocess.run(
        [sys.executable, "-m", "tf_h5_callback.demo", "--dir", str(folder)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return folder, process


def test_killed_and_resumed_equals_uninterrupted(finished):
    folder, process = finished
    assert process.returncode == 0, process.stdout + process.stderr
    assert "killed after step" in process.stdout
    assert "resumed from" in process.stdout + process.stderr
    assert "equal to the bit" in process.stdout
    assert "600/600" in process.stderr and "checkpoint=600" in process.stderr
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_it_really_learned(finished):
    folder, _ = finished
    losses = dict(demo.read_losses(str(folder / "uninterrupted")))
    assert sorted(losses) == list(range(1, demo.STEPS + 1))
    assert losses[1] > 2 and losses[demo.STEPS] < 0.5


def test_the_comparison_can_fail(finished):
    folder, _ = finished
    whole, resumed = str(folder / "uninterrupted"), str(folder / "interrupted")
    assert demo.compare(whole, resumed) == []
    with open(folder / "interrupted" / demo.LOSSES, "a") as f:
        f.write("7 0x1.8p+0\n8 0x1.")  # the second line is cut short
    (difference,) = demo.compare(whole, resumed)
    assert difference.startswith("loss of step 7: 1.5 !=")


def test_plot_of_a_kill(finished, tmp_path):
    folder, _ = finished
    whole = str(folder / "uninterrupted")
    demo.plot(whole, whole, 300, str(tmp_path / "loss.png"))
    assert (tmp_path / "loss.png").stat().st_size > 10000
