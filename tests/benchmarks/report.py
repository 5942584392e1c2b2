"""figures.json of one or several runs -> a table and a plot for the documentation.

    python tests/benchmarks/report.py --out docs/performance tf115.json newest.json

Writes ``table.rst`` and, if a run has the benchmark ``growth``, ``growth.svg``.
"""

import argparse
import json
import os
import re
import statistics


def number(value):
    return "{:,.3g}".format(value) if abs(value) < 1000 else "{:,.0f}".format(value)


def cell(figure):
    """Median, range, and whether it reaches what was to be reached."""
    values = figure["values"]
    unit = " " + figure["unit"] if figure["unit"] else ""
    middle = statistics.median(values)
    text = "{}{} ({} to {})".format(number(middle), unit, number(min(values)), number(max(values)))
    if not figure["limit"]:
        return text
    kind, limit = figure["limit"]
    reached = middle <= limit if kind == "at most" else middle >= limit
    return "**{}**".format(text) if reached else text


def table(runs):
    """A list-table with a column for each run."""
    rows = {}
    for i, run in enumerate(runs):
        for figure in run["figures"]:
            if figure["benchmark"] != "growth":
                # The length of a step is part of a claim, and differs.
                claim = re.sub(r"steps of \d+ ms", "steps of 20 ms", figure["claim"])
                claim = re.sub(r"a batch of [\d,]+", "a large batch", claim)
                limit = figure["limit"]
                unit = " " + figure["unit"] if figure["unit"] else ""
                text = "{} {}{}".format(limit[0], number(limit[1]), unit) if limit else ""
                rows.setdefault((claim, text), {})[i] = cell(figure)
    lines = [".. list-table::", "   :header-rows: 1", ""]
    heads = ["TensorFlow " + run["environment"]["tensorflow"] for run in runs]
    for row in [("what", "figure", *heads)] + [
        (*key, *(cells.get(i, "") for i in range(len(runs)))) for key, cells in rows.items()
    ]:
        lines += ["   {} - {}".format("*" if not i else " ", text) for i, text in enumerate(row)]
    lines.append("")
    for run in runs:
        e = run["environment"]
        lines.append(
            "- {date}, TensorFlow {tensorflow}: {machine}; {system}; Python {python}, h5py {h5py}, "
            "NumPy {numpy}; crc32 of {crc32}.".format(**e)
        )
    return "\n".join(lines) + "\n"


def plot(run, path):
    """Seconds to durable over bytes and over the number of tensors."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    curves = {}
    for figure in run["figures"]:
        if figure["benchmark"] == "growth":
            axis, x, side = re.match(r"(\w+) (\d+): (\w+)", figure["claim"]).groups()
            middle = statistics.median(figure["values"])
            curves.setdefault(axis, {}).setdefault(side, []).append((int(x), middle))
    if not curves:
        return
    labels = {"bytes": "bytes, in 16 tensors", "tensors": "tensors of 1 kB"}
    _, both = plt.subplots(1, len(curves), figsize=(9, 3.6), sharey=True)
    for axes, (axis, sides) in zip(both, curves.items()):
        for side, points in sides.items():
            axes.loglog(*zip(*points), marker="o", label={"ours": "tf_h5_callback"}.get(side, side))
        axes.set_xlabel(labels[axis])
        axes.grid(True, alpha=0.3)
    both[0].set_ylabel("seconds until durable")
    both[0].legend()
    plt.tight_layout()
    plt.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="figures.json")
    parser.add_argument("--out", default=".", help="a folder")
    args = parser.parse_args()
    runs = []
    for path in args.runs:
        with open(path) as f:
            runs.append(json.load(f))
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "table.rst"), "w") as f:
        f.write(table(runs))
    for run in runs:
        plot(run, os.path.join(args.out, "growth.svg"))


if __name__ == "__main__":
    main()
