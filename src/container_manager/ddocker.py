"""The command `ddocker`: the useful commands of docker, over all machines of the cluster at once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from container_manager import console, names
from container_manager.errors import ContainerError

if TYPE_CHECKING:
    from container_manager.fleet import Fleet, Found

_SHELL = ("/bin/sh", "-c", "command -v bash >/dev/null && exec bash; exec sh")
_MOST_PORTS = 64

_SYNOPSES = {
    "ps": "List-up running containers",
    "ps [-a,--all]": "List-up every container",
    "images": "List-up images",
    "inspect <CONTAINER_NAME>": "Container details",
    "exec <CONTAINER_NAME>": "Access in container",
    "start <CONTAINER_NAME>": "Start container",
    "stop <CONTAINER_NAME>": "Stop container",
    "rm <CONTAINER_NAME>": "Remove container",
    "rmi <IMAGE_NAME>": "Remove image",
    "nvidia-smi <HOST_NAME>": "Show GPU usage",
    "create": "Create/start container with selected types",
    "commit <CONTAINER_NAME> <IMAGE_NAME>": "Commit container",
    "setup": "Check machines, images and containers in the way (administrator)",
}

Choice = TypeVar("Choice")


class _Commands(click.Group):
    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        lines = "".join(f"  ddocker {synopsis:<40}{words}\n" for synopsis, words in _SYNOPSES.items())
        formatter.write(f"\nUsage: ddocker COMMAND [ARGUMENTS]\n\nCommands:\n{lines}")


@click.group(cls=_Commands)
def commands() -> None:
    pass


@commands.command(help=_SYNOPSES["ps"])
@click.option("-a", "--all", "everything", is_flag=True, help="also those that do not run")
def ps(everything: bool) -> None:
    fleet = _fleet()
    found = [container for container in fleet.containers() if everything or container.is_running]
    headings = ("NAME", "PORT", "IMAGE", "CREATED", "HOST", "TYPE", "RUNNING")
    _print_table(headings, [_row(container) for container in found])
    _name_silent(fleet)


@commands.command(help=_SYNOPSES["images"])
def images() -> None:
    fleet = _fleet()
    rows = [
        (image.name, image.id.removeprefix("sha256:")[:12], _size(image.size), image.owner, ",".join(image.machines))
        for image in fleet.images()
    ]
    _print_table(("IMAGE", "IMAGE ID", "SIZE", "OWNER", "HOSTS"), rows)
    _name_silent(fleet)


@commands.command(help=_SYNOPSES["inspect <CONTAINER_NAME>"])
@click.argument("container_name")
def inspect(container_name: str) -> None:
    click.echo(json.dumps([_fleet().inspect(container_name)], indent=4))


@commands.command(
    name="exec",
    help=_SYNOPSES["exec <CONTAINER_NAME>"],
    context_settings={"allow_interspersed_args": False},
)
@click.option("-i", "interactive", is_flag=True, hidden=True)
@click.option("-t", "tty", is_flag=True, hidden=True)
@click.argument("container_name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def execute(container_name: str, command: tuple[str, ...], interactive: bool, tty: bool) -> None:
    del interactive, tty  # docker wants to be told; here it is seen
    from contextlib import closing

    from container_manager import attach

    terminal = attach.has_terminal()
    with closing(_fleet().execute(container_name, command or _SHELL, terminal=terminal)) as stream:
        status = attach.run(stream, terminal=terminal)
    if status is None:
        raise ContainerError(f"container {container_name} ended while the command ran")
    sys.exit(status)


@commands.command(help=_SYNOPSES["start <CONTAINER_NAME>"])
@click.argument("container_name")
def start(container_name: str) -> None:
    _fleet().start(container_name)
    click.echo(container_name)


@commands.command(help=_SYNOPSES["stop <CONTAINER_NAME>"])
@click.argument("container_name")
def stop(container_name: str) -> None:
    _fleet().stop(container_name)
    click.echo(container_name)


@commands.command(help=_SYNOPSES["rm <CONTAINER_NAME>"])
@click.argument("container_name")
def rm(container_name: str) -> None:
    _fleet().remove(container_name)
    click.echo(container_name)


@commands.command(help=_SYNOPSES["rmi <IMAGE_NAME>"])
@click.argument("image_name")
def rmi(image_name: str) -> None:
    fleet = _fleet()
    fleet.remove_image(image_name)
    click.echo(image_name)
    _name_silent(fleet)


@commands.command(help=_SYNOPSES["commit <CONTAINER_NAME> <IMAGE_NAME>"])
@click.argument("container_name")
@click.argument("image_name")
def commit(container_name: str, image_name: str) -> None:
    fleet = _fleet()
    fleet.commit(container_name, image_name)
    click.echo(image_name)
    _name_silent(fleet)


@commands.command(name="nvidia-smi", help=_SYNOPSES["nvidia-smi <HOST_NAME>"])
@click.argument("host_name")
def nvidia_smi(host_name: str) -> None:
    click.echo(_fleet().gpu_report(host_name), nl=False)


@commands.command(help=f"{_SYNOPSES['create']}. What no option says is asked for.")
@click.option("--type", "type_", help="a service type, by its name or number")
@click.option("--ports", type=click.IntRange(0, _MOST_PORTS), help="so many ports")
@click.option("--image", help="an image, by its name or number")
@click.option("--name", help="of the container")
def create(type_: str | None, ports: int | None, image: str | None, name: str | None) -> None:
    fleet = _fleet()
    types, names_of_images = fleet.types(), [image.name for image in fleet.images()]
    kind = _chosen("Service types.", [kind.name for kind in types], type_, "--type")
    if ports is None:
        ports = _asked("Input the number of ports (default: 1)", 1, click.IntRange(0, _MOST_PORTS), "--ports")
    picture = _chosen("Docker Images.", names_of_images, image, "--image")
    if name is None:
        default = _default_name()
        name = _asked(f"Input Container name (default: {default})", default, str, "--name")
    names.check(name)
    click.echo("Start to create")
    fleet.create(name, image=names_of_images[picture], kind=types[kind], ports=ports)
    click.echo(name)
    click.echo("Successfully created!")


@commands.command(help=_SYNOPSES["setup"])
def setup() -> None:
    fleet = _fleet()
    found = fleet.amiss()
    for machine, faults in found.items():
        for fault in faults or ["is ready"]:
            click.echo(f"{machine}: {fault}")
    _name_silent(fleet)
    if fleet.silent or any(found.values()):
        sys.exit(1)


def main() -> None:
    """Be the command."""
    console.be(commands)


def _fleet() -> Fleet:
    from container_manager.fleet import Fleet

    return Fleet()


def _chosen(heading: str, names: Sequence[str], given: str | None, option: str) -> int:
    """Return the number of what is chosen: given by name or number, or asked for."""
    if given is None:
        click.echo(heading)
        for number, name in enumerate(names):
            click.echo(f"{number} : {name}")
        return _asked("Select one of types (default: 0)", 0, click.IntRange(0, len(names) - 1), option)
    for name in (given, f"{given}:latest"):
        if name in names:
            return names.index(name)
    if given.isascii() and given.isdigit() and int(given) < len(names):
        return int(given)
    raise ContainerError(f"{option} {given!r} is none of these: {'; '.join(names)}")


def _asked(question: str, default: Choice, kind: Any, option: str) -> Choice:
    try:
        answer: Choice = click.prompt(question, default=default, show_default=False, type=kind)
        return answer
    except click.Abort as error:
        raise ContainerError("standard input is at its end", f"say it with {option}") from error


def _default_name() -> str:
    import getpass

    return f"{getpass.getuser()}_{time.strftime('%Y%m%d-%H%M%S')}"


def _row(container: Found) -> tuple[str, ...]:
    ports = ",".join(f"0.0.0.0:{port}->{port}/tcp" for port in container.ports)
    shape = f"{container.cpus} cpus,{container.memory_mb / 1024:g}g mem"
    if container.gpus:
        shape += f",{len(container.gpus)} {' '.join(dict.fromkeys(container.gpus))}"
    created = _when(container.created)
    return (container.name, ports, container.image, created, container.machine, shape, str(container.is_running))


def _when(iso: str) -> str:
    """Return an engine's time as in 20-05-29T15:35:39."""
    return iso.partition(".")[0].removesuffix("Z")[2:]


def _size(number: int) -> str:
    return f"{number / 1e9:.2f}GB" if number >= 1e9 else f"{number / 1e6:.0f}MB"


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        click.echo("".join(f"{cell:<{width + 3}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _name_silent(fleet: Fleet) -> None:
    for machine in fleet.silent:
        click.echo(f"{machine} does not answer", err=True)


if __name__ == "__main__":
    main()
