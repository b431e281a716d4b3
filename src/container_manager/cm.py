"""The commands `cm` and `CM.py`."""

import sys
from collections.abc import Sequence
from dataclasses import asdict

import click

from container_manager import console, task2, task3
from container_manager.manager import MOST_AT_ONCE, Manager
from container_manager.place import Container, here


@click.group()
def commands() -> None:
    pass


@commands.command()
@click.argument("number", type=click.IntRange(1, MOST_AT_ONCE))
def create(number: int) -> None:
    """Create a certain number of containers"""
    new = Manager(here()).create(number)
    click.echo(f"created {number} containers")
    for position, container in enumerate(new, 1):
        click.echo(f"container {position} : {container.name}")


@commands.command(name="list")
@click.option("--table", is_flag=True, help="as a table")
@click.option("--json", "as_json", is_flag=True, help="as JSON, for programs")
def list_(table: bool, as_json: bool) -> None:
    """List all containers"""
    if table and as_json:
        raise click.UsageError("either --table or --json")
    place = here()
    containers = place.containers()
    if as_json:
        import json

        click.echo(json.dumps([asdict(container) for container in containers], indent=2))
    elif table:
        _print_table(containers)
    else:
        click.echo(f"There are {len(containers)} containers:")
        for position, container in enumerate(containers, 1):
            click.echo(f"container {position} : {_described(container)}")
    for machine in place.silent():
        click.echo(f"{machine} does not answer: containers that are there are not shown", err=True)


@commands.command()
@click.option("--name", help="name of the container to delete, delete all if empty")
def delete(name: str | None) -> None:
    """Delete containers, you can delete all containers or a specific one by name
    Running containers will not be deleted"""
    gone = Manager(here()).delete(name or None)
    click.echo(f"deleted container {name}" if name else f"deleted all not running containers: {gone}")


@commands.command()
@click.option("--name", help="name of the container to stop, stop all if empty")
def stop(name: str | None) -> None:
    """Stop containers, you can stop all containers or a specific one by name"""
    stopped = Manager(here()).stop(name or None)
    click.echo(f"stopped container {name}" if name else f"stopped all running containers: {stopped}")


@commands.command()
@click.option(
    "--name", help="the name of container to run the command, empty for creating a new container to run the command"
)
@click.option("--cmd", help="the command to run")
def run(name: str | None, cmd: str | None) -> None:
    """Run a cmd in a container, without giving a name of a specific container, a new container will be created"""
    if not cmd:
        raise click.UsageError("which command? --cmd TEXT")
    place = here()
    container = Manager(place).ready(name or None)
    click.echo("command output:")
    sys.exit(place.execute(container, cmd, _pass_on))


_slurm = click.option("--slurm", is_flag=True, help="as a job of Slurm: waits for it and prints the same")


@commands.command(name="task2")
@click.option("--size", type=click.IntRange(1, task2.MOST), default=task2.SIZE, help="so many numbers")
@click.option("--containers", type=click.IntRange(1, MOST_AT_ONCE), default=task2.CONTAINERS, help="so many containers")
@click.option("--seed", type=int, help="what the numbers come from, for the same ones again")
@click.option("--total", is_flag=True, help="also what all numbers come to")
@_slurm
def task2_(size: int, containers: int, seed: int | None, total: bool, slurm: bool) -> None:
    """This is a parallel data processing task in which 4 containers will execute asynchronously"""
    if size < containers:
        raise click.UsageError(f"{size} numbers are too few for {containers} containers")
    if slurm:
        from container_manager import in_job

        in_job.run_again(sys.argv[1:])
    results = task2.run(Manager(here()), size=size, containers=containers, seed=seed, progress=_progress)
    for position, result in enumerate(results, 1):
        click.echo(f"result from container {position} : {result}")
    if total:
        click.echo(f"result from all containers : {task2.whole(results, size)}")


@commands.command(name="task3")
@click.option("--seed", type=click.IntRange(0, task3.MOST_SEED), help="what all chance comes from, for the same result")
@_slurm
def task3_(seed: int | None, slurm: bool) -> None:
    """This is a linear regression implemented in Pytorch"""
    if slurm:
        from container_manager import in_job

        in_job.run_again(sys.argv[1:])
    task3.run(Manager(here()), seed=seed, output=_pass_on)


def main() -> None:
    """Be the command."""
    console.be(commands)


def _described(container: Container) -> dict[str, str]:
    return {
        "NAME": container.name,
        "IMAGE": container.image,
        "STATUS": container.status,
        "CREATED": container.created,
        "CONTAINER ID": container.id,
    }


def _pass_on(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


def _progress(text: str) -> None:
    click.echo(text, err=True)


def _print_table(containers: Sequence[Container]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    in_cluster = any(container.machine for container in containers)
    for heading in ("NAME", "STATUS", "CREATED", "CONTAINER ID", *(("MACHINE", "JOB") if in_cluster else ())):
        table.add_column(heading, no_wrap=True)
    for container in containers:
        created = container.created.partition(".")[0].replace("T", " ")
        row = [container.name, container.status, created, container.id[:12]]
        table.add_row(*row, *((container.machine, str(container.job or "")) if in_cluster else ()))
    # Wider than any row: what is cut off cannot be copied.
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
