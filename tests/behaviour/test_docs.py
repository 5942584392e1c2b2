"""What README and docs/ show is run, and what they say of the command line exists."""

import pathlib
import re
import textwrap

import h5py
import numpy as np
import pytest

import tf_h5_callback as h5
from tf_h5_callback.file.writer import write_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]


def python_blocks(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """A folder `checkpoints` in the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    tensors = {
        "net/w:0": np.arange(6, dtype="f4").reshape(2, 3),
        "a b": np.ones(2),
        "empty:0": np.zeros((0, 2)),
        "table-keys": np.array([b"ends in NUL\0", b"x"], object),
        "IteratorV2:0": np.array(b"x" * 1000 + b"\0", object),
    }
    write_checkpoint("checkpoints/model.ckpt-1000.h5", tensors, global_step=1000)
    return tensors


def test_the_hook_of_the_readme(tmp_path, monkeypatch):
    tf = pytest.importorskip("tensorflow.compat.v1")
    monkeypatch.chdir(tmp_path)
    hook_block, read_block = python_blocks("README.rst")

    def build_model():
        tf.get_variable("step_count", [])
        w = tf.get_variable("w", [3], initializer=tf.ones_initializer())
        return tf.reduce_sum(tf.square(w))

    source = hook_block.replace(
        "hooks=[hook]", "hooks=[hook, tf.train.StopAtStepHook(last_step=5)]"
    )
    assert source != hook_block
    with tf.Graph().as_default():
        exec(source, {"build_model": build_model})
    assert [step for step, _ in h5.list_checkpoints("checkpoints")] == [0, 5]


def test_the_reader_of_the_readme(checkpoints, capsys):
    checkpoints.pop("table-keys")
    checkpoints.pop("IteratorV2:0")
    checkpoints.pop("empty:0")
    write_checkpoint("checkpoints/model.ckpt-2000.h5", checkpoints, global_step=2000)
    exec(python_blocks("README.rst")[1], {})
    assert capsys.readouterr().out.splitlines() == ["2000 None", "a b 1.0", "net/w:0 2.5"]


def test_reading(checkpoints):
    blocks = python_blocks("docs/reading.rst")
    names = {"h5py": h5py}
    for block in blocks:
        exec(block, names)
    assert names["values"]["net/w:0"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_reader_in_the_specification_reads_and_verifies(checkpoints, damage):
    (source,) = [block for block in python_blocks("docs/format.rst") if "def read" in block]
    names = {}
    exec(source, names)
    path = "checkpoints/model.ckpt-1000.h5"
    tensors = names["read"](path)
    assert set(tensors) == set(checkpoints)
    assert tensors["net/w:0"].tolist() == [[0, 1, 2], [3, 4, 5]]
    damage(path, "net w:0")
    with pytest.raises(AssertionError, match="net w:0"):
        names["read"](path)


def test_every_command_is_documented(capsys):
    from tf_h5_callback.tools import cli

    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert {"list", "show", "verify"} <= set(commands)
    text = (ROOT / "docs" / "api.rst").read_text()
    for command in commands:
        assert "``tf-h5 {} ".format(command) in text


def test_the_changelog_and_the_package_agree():
    assert "Unreleased" in (ROOT / "CHANGELOG.rst").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", h5.__version__)


def test_every_argument_of_the_hook_is_documented():
    import ast

    source = (ROOT / "tf_h5_callback" / "graph" / "hook.py").read_text()
    (cls,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
    (init,) = [n for n in cls.body if getattr(n, "name", "") == "__init__"]
    text = ast.get_docstring(cls, clean=False).split("Raises:")[0]
    documented = re.findall(r"^      (\w+): ", text, re.MULTILINE)
    arguments = [a.arg for a in init.args.args[1:] + init.args.kwonlyargs]
    assert documented == arguments
