"""Draw rows of a benchmark, which come as JSON on standard input, as an SVG picture on standard output.

usage: python3 picture.py NAME, of the benchmark
"""

import json
import statistics
import sys

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt


def points(row):
    """Return what was measured, each as a part of the reach; of two things that were compared, their pairs' ratios."""
    samples = row["samples"]
    if isinstance(samples, dict):
        below, above = (row["compared"][kind] for kind in ("against", "what"))
        reference = statistics.median(samples[below])
        samples = [value / reference for value in samples[above]]
    return [value / row["target"] for value in samples]


def latency(axes, rows):
    """Show each median as a part of its reach, among what was measured."""
    rows = [row for row in reversed(rows) if row["target"] != float("inf")]
    for number, row in enumerate(rows):
        axes.plot(points(row), [number] * len(points(row)), "o", color="tab:blue", alpha=0.35, markersize=4)
        axes.plot(row["median"] / row["target"], number, "|", color="black", markersize=18, markeredgewidth=2)
    axes.axvline(1, color="tab:red", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlim(left=0)
    axes.set_xlabel("part of the reach (the line); where more is better, to the right of it is good")


def fidelity(axes, rows):
    """Show the times in each place as parts of the bare median."""
    labels = []
    for row in reversed(rows):
        median = statistics.median(row["bare"])
        for place in ("again", "sandbox", "bare"):
            axes.plot([time / median for time in row[place]], [len(labels)] * len(row[place]), "o", alpha=0.35)
            axes.plot(statistics.median(row[place]) / median, len(labels), "|", color="black", markersize=18)
            labels.append(f"{row['kernel']}, {place}")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("time, as a part of the bare runs' median")


def main():
    """Draw."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    (fidelity if sys.argv[1] == "fidelity" else latency)(axes, json.load(sys.stdin))
    figure.savefig(sys.stdout, format="svg")


if __name__ == "__main__":
    main()
