"""What importing the package costs and brings."""

import ast
import inspect
import pathlib
import subprocess
import sys
import textwrap

import numpy as np

import tf_h5_callback as h5
from tf_h5_callback.file.writer import write_checkpoint


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def test_import_takes_no_tensorflow():
    loaded = run(
        "import sys, tf_h5_callback, tf_h5_callback.tools.cli\n"
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


# A folder imports from folders below it only; modules of one folder import in one direction.
FLOORS = [
    {"__main__"},
    {"tools", "demo"},
    {"graph", "keras"},
    {"saving", "restoring"},
    {"folder"},
    {"file"},
    {"errors", "_compat", "job"},
]
MAY_IMPORT = {
    "tensorflow": {"graph", "demo"},
    "keras": {"keras"},
    "h5py": {"file", "_compat"},
}


def imports():
    """``{module: [what it imports]}``, names with dots, the package's own without its name."""
    root = pathlib.Path(h5.__file__).parent
    found = {}
    for path in root.rglob("*.py"):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name] = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name] += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = ["{}.{}".format(node.module, alias.name) for alias in node.names]
                found[name] += names
    own, prefix = {}, "tf_h5_callback."
    for name, imported in found.items():
        own[name] = []
        for full in imported:
            if full.startswith(prefix):
                # A name of a module, or of something in one.
                parts = full[len(prefix) :].split(".")
                while ".".join(parts) not in found and len(parts) > 1:
                    parts.pop()
                full = prefix + ".".join(parts)
            own[name].append(full)
    return own


def floor_of(module):
    (floor,) = [i for i, folders in enumerate(FLOORS) if module.split(".")[0] in folders]
    return floor


def test_folders_import_from_folders_below_them():
    for name, imported in imports().items():
        if name == "__init__":
            continue
        for full in imported:
            if not full.startswith("tf_h5_callback."):
                continue
            other = full[len("tf_h5_callback.") :]
            if other == "__version__":
                continue
            if name.split(".")[0] != other.split(".")[0]:
                assert floor_of(name) < floor_of(other), "{} imports {}".format(name, other)


def test_no_module_imports_itself_by_a_detour():
    graph = {
        name: {full[len("tf_h5_callback.") :] for full in imported if "tf_h5_callback." in full}
        for name, imported in imports().items()
    }

    def reach(name, path):
        assert name not in path, " imports ".join([*path, name])
        for other in graph.get(name, ()):
            reach(other, [*path, name])

    for name in graph:
        if name != "__init__":
            reach(name, [])


def test_frameworks_and_hdf5_are_imported_where_they_belong():
    for name, imported in imports().items():
        for full in imported:
            allowed = MAY_IMPORT.get(full.split(".")[0])
            assert allowed is None or name.split(".")[0] in allowed, (name, full)
