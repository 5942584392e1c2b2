"""All benchmarks, each in a process of its own, both sides in one run.

    python tests/benchmarks/run.py                       # everything; some ten minutes
    python tests/benchmarks/run.py stall restore         # these
    python tests/benchmarks/run.py --rounds 9 --out here # figures.json, figures.md

``report.py`` makes the table and the plot of the documentation of them. Nothing else may run on the
machine meanwhile. Exit code 1 if a benchmark fails; figures that are
not reached are marked, and no failure: machines differ.
"""

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
HEAD = "| what | figure | median | range | reached |\n| --- | --- | --- | --- | --- |"
MODULES = ["training", "files", "restoring", "memory", "more", "frameworks"]


def names():
    """The names of all benchmarks, without importing TensorFlow: name -> module."""
    found = {}
    for module in MODULES:
        with open(os.path.join(HERE, module + ".py")) as f:
            text = f.read().split("\nBENCHMARKS = {", 1)[1].split("}")[0]
        found.update(dict.fromkeys(re.findall(r'"(\w+)":', text), module))
    return found


def child(name, module, rounds):
    """Runs one benchmark here; prints its figures as JSON."""
    benchmark = importlib.import_module(module).BENCHMARKS[name]
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=os.environ.get("TMPDIR")) as folder:
        figures = benchmark(folder, rounds)
    print(json.dumps([figure._asdict() for figure in figures]))


def environment():
    """What the figures were measured on."""
    import h5py
    import numpy

    from tf_h5_callback import _compat

    with open("/proc/cpuinfo") as f:
        model = next((line.split(":")[1].strip() for line in f if "model name" in line), "?")
    try:
        import tensorflow.compat.v1 as tf

        tensorflow = tf.VERSION
    except ImportError:
        tensorflow = "none"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": "{} cores, {}".format(os.cpu_count(), model),
        "system": "{} {}".format(platform.system(), platform.release().split("-")[0]),
        "python": platform.python_version(),
        "tensorflow": tensorflow,
        "h5py": h5py.__version__,
        "numpy": numpy.__version__,
        "crc32": _compat.crc32.__module__,
    }


def line(figure):
    """A figure as a row of the Markdown table."""
    values = sorted(figure["values"])
    middle = values[len(values) // 2]
    unit = " " + figure["unit"] if figure["unit"] else ""
    limit, mark = "", ""
    if figure["limit"]:
        kind, value = figure["limit"]
        limit = "{} {:.3g}{}".format(kind, value, unit)
        mark = "yes" if (middle <= value if kind == "at most" else middle >= value) else "no"
    cells = [figure["claim"], limit, "{:.3g}{}".format(middle, unit)]
    cells += ["{:.3g} to {:.3g}".format(values[0], values[-1]), mark]
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of " + ", ".join(names()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default=".", help="folder for figures.json and figures.md")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    modules = names()
    unknown = set(args.names) - set(modules)
    if unknown:
        parser.error("no benchmark is named " + ", ".join(sorted(unknown)))
    if args.child:
        child(args.names[0], modules[args.names[0]], args.rounds)
        return 0
    figures, failed = [], []
    print(HEAD, flush=True)
    for name in args.names or modules:
        command = [sys.executable, "-W", "ignore", os.path.abspath(__file__), "--child", name]
        process = subprocess.run(
            [*command, "--rounds", str(args.rounds)],
            cwd=HERE,
            capture_output=True,
            text=True,
            env=dict(os.environ, CUDA_VISIBLE_DEVICES="-1", TF_CPP_MIN_LOG_LEVEL="3"),
        )
        if process.returncode:
            failed.append(name)
            print("{} failed:\n{}".format(name, process.stderr[-3000:]), file=sys.stderr)
            continue
        for figure in json.loads(process.stdout.splitlines()[-1]):
            figures.append(dict(figure, benchmark=name))
            print(line(figure), flush=True)
    with open(os.path.join(args.out, "figures.md"), "w") as f:
        f.write("\n".join([HEAD, *map(line, figures), ""]))
    with open(os.path.join(args.out, "figures.json"), "w") as f:
        json.dump({"environment": environment(), "figures": figures}, f, indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
