import subprocess
import sys

import numpy as np
import pytest

from tf_h5_callback.file.writer import write_checkpoint
from tf_h5_callback.tools import cli


@pytest.fixture
def folder(tmp_path):
    for step in (9, 10):
        write_checkpoint(
            tmp_path / "model.ckpt-{}.h5".format(step),
            {"net/w:0": np.zeros((3, 4), "f4"), "global_step:0": np.array(step)},
            global_step=step,
            tensorflow_version="1.15.5",
            metadata={"run": "first"},
        )
    return tmp_path


def test_list(folder, capsys):
    assert cli.main(["list", str(folder)]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert [line.split() for line in lines[:2]] == [
        ["9", str(folder / "model.ckpt-9.h5")],
        ["10", str(folder / "model.ckpt-10.h5")],
    ]
    assert cli.main(["list", "--basename", "other", str(folder)]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("which", ["", "model.ckpt-10.h5"])
def test_show(folder, capsys, which):
    assert cli.main(["show", str(folder / which)]) == 0
    out = capsys.readouterr().out
    for text in ("model.ckpt-10.h5", "step:        10", "1.15.5", "'run': 'first'", "56 bytes"):
        assert text in out
    assert ["net/w:0", "float32", "3x4"] in [line.split() for line in out.splitlines()]


def test_verify(folder, capsys, damage):
    paths = [str(folder / "model.ckpt-{}.h5".format(step)) for step in (9, 10)]
    assert cli.main(["verify"] + paths) == 0
    damage(paths[1], "net w:0")
    assert cli.main(["verify"] + paths) == 1
    intact, damaged = capsys.readouterr().out.splitlines()[2:]
    assert intact.startswith("intact") and paths[0] in intact
    assert damaged.startswith("DAMAGED") and paths[1] in damaged and "'net/w:0'" in damaged


def test_verify_a_folder(folder, capsys, damage):
    damage(str(folder / "model.ckpt-9.h5"), "net w:0")
    assert cli.main(["verify", str(folder)]) == 1
    damaged, intact = capsys.readouterr().out.splitlines()
    assert damaged.startswith("DAMAGED") and "model.ckpt-9.h5" in damaged
    assert intact == "intact   {}".format(folder / "model.ckpt-10.h5")
    assert cli.main(["verify", "--basename", "other", str(folder), intact.split()[1]]) == 1
    missing = "MISSING  no checkpoint named other-<step>.h5 in {}".format(folder)
    assert capsys.readouterr().out.splitlines() == [missing, intact]  # it goes on


def test_verify_a_missing_file(folder, capsys):
    assert cli.main(["verify", str(folder / "nothing.h5")]) == 1
    assert capsys.readouterr().out.startswith("MISSING  no such checkpoint")


def test_a_missing_file_is_one_line_on_stderr(folder, capsys):
    assert cli.main(["show", str(folder / "nothing.h5")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tf-h5: no such checkpoint")


def test_wrong_usage_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2


def test_as_a_module(folder):
    out = subprocess.run(
        [sys.executable, "-m", "tf_h5_callback", "list", str(folder)],
        check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    assert len(out.splitlines()) == 2


def test_a_pipe_that_is_closed(tmp_path):
    tensors = {"a/rather/long/name/of/a/tensor/{}:0".format(i): np.zeros(1) for i in range(3000)}
    write_checkpoint(tmp_path / "f.h5", tensors)
    command = '"{}" -m tf_h5_callback show "{}" | head -n 1'.format(
        sys.executable, tmp_path / "f.h5"
    )
    process = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert process.stdout.startswith("checkpoint:") and process.stderr == ""
