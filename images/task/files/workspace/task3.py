"""Fit a line to points by gradient descent, and draw what came of it: result.png and train.png beside the points."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from matplotlib.figure import Figure

POINTS = 100_000
EPOCHS = 1000
BATCH = 1000
SHOWN = 2000


def main() -> None:
    """Make the points if asked to, fit the line, print the losses, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, required=True, help="the points: x_data and y_data, saved by PyTorch")
    parser.add_argument("--make", action="store_true", help="make the points first")
    parser.add_argument("--seed", type=int, help="what all chance comes from, for the same result again")
    arguments = parser.parse_args()
    # The batches are too small to be shared out, and one thread adds up in the same order each time.
    torch.set_num_threads(1)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    if arguments.make:
        with whole(arguments.file) as path:
            torch.save(points(), path)
    data = torch.load(arguments.file, weights_only=True)
    line = torch.nn.Linear(1, 1)
    losses = fit(line, data["x_data"], data["y_data"])
    for name, text, figure in (
        ("train.png", "training log", drawn_losses(losses)),
        ("result.png", "result", drawn_line(line, data["x_data"], data["y_data"])),
    ):
        with whole(arguments.file.parent / name) as path:
            figure.savefig(path, format="png")
        print(f"saved {text} to ./{arguments.file.parent / name}", flush=True)


def points() -> dict[str, torch.Tensor]:
    """Return points along y = x, which lie the more apart the greater x is."""
    x = torch.linspace(0, 10, POINTS)
    slope = 1 + (torch.rand(POINTS) - 0.5) / 5
    offset = (torch.rand(POINTS) - 0.5) / 2
    return {"x_data": x.reshape(-1, 1), "y_data": (slope * x + offset).reshape(-1, 1)}


def fit(line: torch.nn.Linear, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Fit the line to batches of the points, one an epoch; print and return the mean squared errors."""
    optimizer = torch.optim.Adam(line.parameters(), lr=0.01)
    losses = []
    for epoch in range(1, EPOCHS + 1):
        batch = torch.randint(len(x), (min(BATCH, len(x)),))
        loss = torch.nn.functional.mse_loss(line(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if epoch <= 10 or epoch % 100 == 0:
            print(f"epoch {epoch}, loss {loss.item()}", flush=True)
    return losses


def drawn_losses(losses: list[float]) -> Figure:
    """Return a picture of how the loss fell."""
    figure = Figure()
    axes = figure.subplots()
    axes.semilogy(range(1, len(losses) + 1), losses)
    axes.set(title="Training", xlabel="epoch", ylabel="mean squared error")
    return figure


def drawn_line(line: torch.nn.Linear, x: torch.Tensor, y: torch.Tensor) -> Figure:
    """Return a picture of the line among some of the points."""
    figure = Figure()
    axes = figure.subplots()
    some = slice(None, None, max(1, len(x) // SHOWN))
    axes.scatter(x[some], y[some], s=2, color="silver", label="data")
    with torch.no_grad():
        ends = torch.stack([x.min(), x.max()]).reshape(-1, 1)
        axes.plot(ends, line(ends), label=f"y = {line.weight.item():.3f} x + {line.bias.item():.3f}")
    axes.set(title="Linear regression", xlabel="x", ylabel="y")
    axes.legend()
    return figure


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path to write to; what was written takes the place of `path` when it is whole."""
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


main()
