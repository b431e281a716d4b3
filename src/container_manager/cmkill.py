"""`cmkill`: end jobs of one's own."""

import sys

import click

from container_manager import console, jobs
from container_manager.errors import ContainerError


# What looks like an option, such as -5, is for kill to refuse.
@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("job_ids", metavar="JOB_ID...", nargs=-1, required=True, type=click.UNPROCESSED)
def cmkill(job_ids: tuple[str, ...]) -> None:
    """End jobs of yours, by their numbers.

    Each is tried, also when another cannot be ended; then the exit status is 1.
    """
    failed = False
    for job_id in job_ids:
        try:
            jobs.kill(job_id)
        except ContainerError as error:
            click.echo(f"error: {error}", err=True)
            failed = True
    sys.exit(failed)


def main() -> None:
    """Be the command."""
    console.be(cmkill)


if __name__ == "__main__":
    main()
