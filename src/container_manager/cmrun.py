"""`cmrun`: run clones of a command as a job on several nodes."""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path

import click

from container_manager import console, interrupts, job_settings, jobs, slurm
from container_manager.errors import ContainerError
from container_manager.slurm import printable

LOGS = "cmlogs"
_SCRIPT = Path(__file__).with_name("job.sh")


class Minutes(click.ParamType[int]):
    """A time of Slurm's, which counts whole minutes."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the minutes."""
        try:
            return value if isinstance(value, int) else jobs.minutes(str(value))
        except ValueError as error:
            self.fail(f"{error}: 30 is minutes, 2:00:00 hours, 1-12 a day and a half", param, ctx)


class Name(click.ParamType[str]):
    """A name of Slurm's."""

    name = "name"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name."""
        text = str(value)
        if not (text.isascii() and text.replace("_", "").replace("-", "").isalnum() and text[0] != "-"):
            self.fail(f"{printable(text)!r} is no name of a partition", param, ctx)
        return text


def _settings(context: click.Context, _parameter: click.Parameter, value: bool) -> bool:
    """Take the configuration files' values for those of the options that are not given."""
    if not context.resilient_parsing:
        context.default_map = job_settings.read(context.command.params)
    return value


# Options end where the command begins: what follows it is the command's own.
@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--read-settings", is_flag=True, hidden=True, is_eager=True, expose_value=False, callback=_settings)
@click.option("-n", "--nodes", type=click.IntRange(1, 10**6), default=1, show_default=True, help="On how many nodes.")
@click.option(
    "-p", "--clones", type=click.IntRange(1, 10**6), default=1, show_default=True, help="How many clones on each node."
)
@click.option("--partition", type=Name(), default="shared", show_default=True, help="Whose nodes.")
@click.option(
    "--time", type=Minutes(), help="How long at most: 30 (minutes), 2:00:00, 1-12; else the partition's default."
)
@click.option(
    "--retries", type=click.IntRange(0, 1000), default=0, show_default=True, help="How often again when a node dies."
)
@click.option("--mpi", is_flag=True, help="The clones are the ranks of one MPI program.")
@click.option("--wait", is_flag=True, help="Wait, and end with the job's exit status; Ctrl-C ends the job.")
@click.argument("command", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
def cmrun(
    nodes: int,
    clones: int,
    partition: str,
    time: int | None,
    retries: int,
    mpi: bool,
    wait: bool,
    command: tuple[str, ...],
) -> None:
    """Run clones of a command as a job, and print the job's number.

    What the clones write goes to cmlogs/JOB.CLONE.out and .err in the working directory, what becomes of the job to
    cmlogs/JOB.log. Defaults come from ~/.config/cfiddle/cmrun.yaml and /etc/cfiddle/cmrun.yaml.
    """
    if not command[0]:
        raise click.UsageError("the command is empty")
    _ensure_possible(nodes, clones, partition, time)
    directory = _working_directory()
    _ensure_logs(directory)
    options = [
        f"--nodes={nodes}",
        f"--ntasks={nodes * clones}",
        f"--ntasks-per-node={clones}",
        f"--partition={partition}",
        f"--job-name={printable(os.path.basename(command[0]))[:64] or 'command'}",
        # Slurm looks for its patterns in the directory's name as well.
        f"--output={str(directory).replace('%', '%%')}/{LOGS}/%j.log",
        "--open-mode=append",
        "--requeue" if retries else "--no-requeue",
    ]
    options += [f"--time={time}"] if time else []
    argv = ["sbatch", "--parsable", *options, str(_SCRIPT), str(retries), "pmix" if mpi else "none", *command]
    with interrupts.put_off():
        job_id = int(slurm.ask(argv, cwd=str(directory), env=slurm.environment()).partition(";")[0])
        click.echo(job_id)
    if wait:
        from container_manager import job_wait

        sys.exit(job_wait.wait(job_id))


def _ensure_possible(nodes: int, clones: int, partition: str, time: int | None) -> None:
    """Refuse at once what Slurm would refuse in other words, or let wait for ever."""
    known = jobs.partitions()
    if partition not in known:
        raise ContainerError(f"there is no partition {partition!r}", f"there are {', '.join(known)}")
    members = jobs.nodes(partition)
    fitting = [node for node in members if node.cpus >= clones]
    if len(fitting) < nodes:
        asked = (
            f"{_count(nodes, 'node')} with {_count(clones, 'CPU')} each"
            if len(members) >= nodes
            else _count(nodes, "node")
        )
        have = ", ".join(f"{node.name} with {_count(node.cpus, 'CPU')}" for node in members[:8]) or "no nodes"
        more = f" and {len(members) - 8} more" if len(members) > 8 else ""
        raise ContainerError(f"{asked} cannot be had: the partition {partition} has {have}{more}")
    longest = jobs.longest_minutes(partition)
    if time and longest and time > longest:
        raise ContainerError(f"{_count(time, 'minute')} are too long: in {partition} a job may take {longest}")
    up = sum(node.takes_jobs for node in fitting)
    if up < nodes:
        click.echo(f"warning: {up} of {_count(nodes, 'node')} can run jobs now: the job waits", err=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _working_directory() -> Path:
    """Return where the job runs: here, or at home if the nodes do not see what is here."""
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    try:
        here = Path.cwd()
    except FileNotFoundError as error:
        raise ContainerError("the working directory is there no longer", "cd") from error
    if "\\" in str(here):
        raise ContainerError(
            f"Slurm can write no log in {printable(str(here))}: it has a backslash", "run cmrun elsewhere"
        )
    if _mount(here) == _mount(home.resolve()):
        return here
    click.echo(
        f"warning: the nodes do not see {printable(str(here))}: the command runs in {home}, and its output goes to "
        f"{home / LOGS}",
        err=True,
    )
    return home


def _mount(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if os.path.ismount(parent))


def _ensure_logs(directory: Path) -> None:
    logs = directory / LOGS
    try:
        logs.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise ContainerError(f"{printable(str(logs))} is no directory", "remove it, or run cmrun elsewhere") from error
    except OSError as error:
        raise ContainerError(f"{printable(str(logs))} cannot be made: {error.strerror}") from error
    if not os.access(logs, os.W_OK | os.X_OK):
        raise ContainerError(f"{printable(str(logs))} is not yours to write to", "run cmrun elsewhere")


def main() -> None:
    """Be the command."""
    console.be(cmrun)


if __name__ == "__main__":
    main()
