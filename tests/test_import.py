"""What importing the package costs and brings."""

import inspect
import subprocess
import sys
import textwrap

import numpy as np

import tf_h5_callback as h5
from tf_h5_callback.checkpoint_file import write_checkpoint


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def test_import_takes_no_tensorflow():
    loaded = run(
        "import sys, tf_h5_callback, tf_h5_callback.cli\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in"
        " ('tensorflow', 'keras', 'tf_keras', 'sklearn', 'matplotlib', 'tqdm')))"
    )
    assert loaded.strip() == "[]"


def test_reading_works_where_tensorflow_cannot_be_imported(tmp_path):
    path = tmp_path / "model.ckpt-3.h5"
    write_checkpoint(path, {"w:0": np.arange(3)}, global_step=3)
    code = textwrap.dedent(
        """
        import sys
        sys.modules["tensorflow"] = None
        import tf_h5_callback as h5
        print(h5.load_variable({!r}, "w:0").tolist())
        try:
            h5.H5CheckpointHook
        except ImportError:
            print("needs TensorFlow")
        """
    )
    out = run(code.format(str(tmp_path)))
    assert out.split("\n")[:2] == ["[0, 1, 2]", "needs TensorFlow"]


def test_public_names_exist_and_are_documented():
    for name in h5.__all__:
        if name in ("H5CheckpointHook", "H5RestoreHook") or name.endswith(
            ("setters", "_variables")
        ):
            continue  # need TensorFlow; test_hook and test_bare_session use them
        assert inspect.getdoc(getattr(h5, name)), name
    assert set(h5.__all__) <= set(dir(h5))


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(h5, "no_such_name")


def test_modules_import_downwards_only():
    """floor of a module > floor of each module of this package that it imports."""
    import ast
    import os

    floors = {
        "errors": 0, "_compat": 0, "budget": 0, "timer": 1, "progress": 0,
        "atomic_file": 0, "signals": 0,
        "dtypes": 1, "global_heap": 1, "file_layout": 2,
        "block_output": 1, "planned_file": 2, "checkpoint_file": 3,
        "checkpoint_reader": 4, "writer": 4, "retention": 5,
        "checkpoint_dir": 6, "reading": 7, "checkpoint_saver": 7, "waiting": 7,
        "restore": 6, "setters": 6, "snapshot": 7, "matching": 7, "tensorflow_checkpoint": 8,
        "graph_state": 8, "bare_session": 8, "hook": 9, "restore_hook": 9, "cli": 9,
    }  # fmt: skip
    folder = os.path.dirname(h5.__file__)
    for name, floor in floors.items():
        with open(os.path.join(folder, name + ".py")) as f:
            tree = ast.parse(f.read())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "tf_h5_callback":
                imported = {alias.name for alias in node.names} & set(floors)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "tf_h5_callback."
            ):
                imported = {node.module.split(".")[1]}
            else:
                continue
            for module in imported:
                assert floors[module] < floor, "{} imports {}".format(name, module)
