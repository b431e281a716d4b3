"""What every command does at its end: say in words what went wrong, and end with the exit status that fits."""

import sys

import click

from container_manager import interrupts
from container_manager.errors import ContainerError, Refusal


def be(command: click.Command) -> None:
    """Be a command of click's."""
    interrupts.raise_them()
    try:
        command()
    except Refusal as refusal:
        sys.exit(str(refusal))
    except ContainerError as error:
        sys.exit(f"error: {error}")
    except interrupts.Interrupted as interrupted:
        click.echo("interrupted", err=True)
        sys.exit(interrupted.exit_status)
