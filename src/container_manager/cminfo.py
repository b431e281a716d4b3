"""`cminfo`: nodes, what they have and what is in use, and this user's jobs, in one table."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import click

from container_manager import console, interrupts, jobs
from container_manager.errors import ContainerError
from container_manager.jobs import Job, Node, ordinal
from container_manager.slurm import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rich.console import Console, Group

WIDTH = 80
"""Of what is written to no terminal."""
_WAITING_SHOWN = 20
_ENDED_SHOWN = 10
_PAUSE_S = 2.0
_COLOURS = {
    "idle": "green",
    "mixed": "cyan",
    "allocated": "cyan",
    "running": "green",
    "pending": "yellow",
    "completed": "dim",
    "completing": "cyan",
    "cancelled": "dim",
}


@dataclass(frozen=True)
class Cluster:
    """What one look at the cluster found.

    Attributes:
        jobs: those that run or wait.
        ended: those that ended within the last hour.
        unknown: why `ended` could not be had; empty if it could.
    """

    nodes: Sequence[Node]
    jobs: Sequence[Job]
    ended: Sequence[Job]
    unknown: str = ""


def look() -> Cluster:
    """Ask Slurm, and its accounting if that answers soon."""
    nodes, queued = jobs.nodes(), jobs.queued()
    try:
        return Cluster(nodes, queued, jobs.ended())
    except ContainerError as error:
        return Cluster(nodes, queued, [], unknown=str(error))


def as_json(cluster: Cluster) -> str:
    """Return it for programs, on one line."""
    nodes = cluster.nodes
    total = {
        name: sum(getattr(node, name) for node in nodes)
        for name in ("cpus", "cpus_in_use", "memory_mb", "memory_mb_in_use", "gpus", "gpus_in_use")
    }
    return json.dumps({**asdict(cluster), "total": {"nodes": len(nodes), **total}})


def table(cluster: Cluster, *, everything: bool = False) -> Group:
    """Return the table, with the jobs that wait and have ended as far as a person reads them."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    has_gpus = any(node.gpus for node in cluster.nodes)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    shown.add_column("node, job", no_wrap=True, max_width=12)
    shown.add_column("state", no_wrap=True)
    for name in ("cpus", "memory GB", *(["gpus"] if has_gpus else [])):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("on", no_wrap=True, max_width=10)
    shown.add_column("time", justify="right", no_wrap=True)
    shown.add_column("what", overflow="fold")

    def row(name: str, state: str, resources: Sequence[str], *rest: str) -> None:
        texts = [Text(printable(text)) for text in (name, state, *resources[: 3 if has_gpus else 2], *rest)]
        texts[0].stylize("bold")
        texts[1].stylize(_COLOURS.get(state.rstrip("-"), "red"))
        shown.add_row(*texts)

    for node in cluster.nodes:
        row(node.name, node.state, _use([node]), "", "", node.reason)
    row("all nodes", "", _use(cluster.nodes), "", "", "")
    shown.add_section()
    listed, more = _listed(cluster, everything)
    for job in listed:
        resources = (str(job.cpus), f"{job.memory_mb / 1024:.1f}", str(job.gpus))
        row(job.id, job.state, resources, job.nodes, "" if job.elapsed == "0:00" else job.elapsed, _what(job))
    return Group(shown, *(Text(text, style="dim") for text in more))


def _use(nodes: Sequence[Node]) -> tuple[str, str, str]:
    def of(in_use: str, whole: str, unit: int = 1) -> str:
        return "/".join(
            f"{sum(getattr(node, name) for node in nodes) / unit:.{unit > 1:d}f}" for name in (in_use, whole)
        )

    return of("cpus_in_use", "cpus"), of("memory_mb_in_use", "memory_mb", 1024), of("gpus_in_use", "gpus")


def _listed(cluster: Cluster, everything: bool) -> tuple[list[Job], list[str]]:
    """Return the jobs that are shown, and what is said of the others."""
    waiting = [job for job in cluster.jobs if job.state == "pending"]
    others = [job for job in cluster.jobs if job.state != "pending"]
    ended = list(cluster.ended)
    said = []
    if not everything:
        more = len(waiting) - _WAITING_SHOWN, len(ended) - _ENDED_SHOWN
        said = [
            f"{count} more {word}: cminfo --all"
            for count, word in zip(more, ("wait", "ended within the hour"), strict=True)
            if count > 0
        ]
        waiting, ended = waiting[:_WAITING_SHOWN], ended[:_ENDED_SHOWN]
    if cluster.unknown:
        said.append(f"ended jobs are not shown: {cluster.unknown}")
    return [*others, *waiting, *ended], said


def _what(job: Job) -> str:
    told = [f"{ordinal(job.tries)} try"] if job.tries > 1 else []
    told += [job.reason] if job.reason else []
    return f"{job.name}: {', '.join(told)}" if told else job.name


@click.command()
@click.option("--all", "everything", is_flag=True, help="All jobs that wait or have ended, not only the next and last.")
@click.option("--watch", is_flag=True, help="Look again every two seconds, until Ctrl-C.")
@click.option("--json", "json_", is_flag=True, help="For programs: everything, on one line.")
def cminfo(everything: bool, watch: bool, json_: bool) -> None:
    """Show nodes, resources (in use/total), and your jobs.

    Jobs of others are not shown; what they use of the nodes is. Jobs that have ended stay for an hour.
    """
    if not watch:
        click.echo(as_json(look())) if json_ else _console().print(table(look(), everything=everything))
        return
    with contextlib.suppress(interrupts.Interrupted):
        _watch(everything, json_)


def _watch(everything: bool, json_: bool) -> None:
    out = _console()
    on_screen = out.is_terminal and not json_
    with out.screen() if on_screen else contextlib.nullcontext() as screen:
        while True:
            try:
                cluster = look()
                found = as_json(cluster) if json_ else table(cluster, everything=everything)
            except ContainerError as error:  # Slurm may be back at the next look
                found = f"error: {error}"
            if screen:
                screen.update(found)
            elif isinstance(found, str):
                click.echo(found, err=found.startswith("error:"))
            else:
                out.print(found)
            time.sleep(_PAUSE_S)


def _console() -> Console:
    from rich.console import Console

    made = Console(highlight=False)
    if not made.is_terminal:
        made.width = WIDTH
    return made


def main() -> None:
    """Be the command."""
    console.be(cminfo)


if __name__ == "__main__":
    main()
