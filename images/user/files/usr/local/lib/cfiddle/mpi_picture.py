"""Draw what mpi_pairs.py printed, which comes on standard input, as a heat map: a PNG on standard output, in base64."""

import base64
import io
import json
import sys

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np


def main() -> None:
    """Draw."""
    measured = json.load(sys.stdin)
    nodes = measured["nodes"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for axes, column, title in zip(panels, (2, 3), ("latency, microseconds", "bandwidth, MB/s"), strict=True):
        values = np.full((len(nodes), len(nodes)), np.nan)
        for pair in measured["pairs"]:
            values[pair[0], pair[1]] = values[pair[1], pair[0]] = pair[column]
        figure.colorbar(axes.imshow(values, cmap="YlGn", vmin=0), ax=axes)
        axes.set_xticks(range(len(nodes)), nodes)
        axes.set_yticks(range(len(nodes)), nodes)
        axes.set_title(title)
        for (row, line), value in np.ndenumerate(values):
            if not np.isnan(value):
                axes.text(line, row, f"{value:.0f}", ha="center", va="center")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    print(base64.b64encode(picture.getvalue()).decode())


if __name__ == "__main__":
    main()
