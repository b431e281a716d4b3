"""Wait for the end of a job, told of it by Slurm rather than by asking again and again."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time

import click

from container_manager import interrupts, jobs, slurm
from container_manager.errors import ContainerError

_TIMED_OUT = 124
"""As timeout(1) has it."""
_SOONEST_S, _LATEST_S = 0.05, 5.0
_HANGING_S = 600
_STEP = "--overlap --nodes=1 --ntasks=1 --mem=0 --mpi=none --job-name=wait --quiet".split()
"""It takes nothing from the clones."""
_AWAY_S = 300.0
"""How long slurmctld may be silent: it is restarted within less."""


def wait(number: int) -> int:
    """Wait for the end of a job; say how it ended, and return the exit status for it.

    Ctrl-C ends the job; other signals leave it to itself.
    """
    try:
        return _told(number, _ended(number))
    except interrupts.Interrupted as interrupted:
        if interrupted.exit_status == 128 + signal.SIGINT:
            with interrupts.put_off():
                jobs.kill(str(number))
            click.echo(f"interrupted: job {number} was ended", err=True)
        else:
            click.echo(f"interrupted: job {number} goes on", err=True)
        raise SystemExit(interrupted.exit_status) from interrupted


def _ended(number: int) -> dict[str, str]:
    """Return what Slurm knows of the job once it is over.

    While it runs, a step of its own that only sleeps ends with it, and its srun is told so at once. While it waits to
    run it is asked for: the longer it has waited already the less often, so that this is late by a tenth at most.
    """
    known, tries, since, heard = {}, 1, time.monotonic(), time.monotonic()
    while True:
        try:
            known = jobs.job(number)
            heard = time.monotonic()
        except ContainerError:
            if time.monotonic() > heard + _AWAY_S:
                raise
        if not known:
            raise ContainerError(f"Slurm knows nothing of job {number} any more")
        state, now = known["JobState"].split()[0], int(known.get("Restarts", "0")) + 1
        if now > tries:
            click.echo(f"job {number}: its node died; {jobs.ordinal(now)} try", err=True)
            tries, since = now, time.monotonic()
        if state not in jobs.UNFINISHED:
            return known
        if state == "RUNNING" and _hang_on(number):
            since = time.monotonic()
        time.sleep(min(max((time.monotonic() - since) / 10, _SOONEST_S), _LATEST_S))


def _hang_on(number: int) -> bool:
    """Hang on the job until it ends, or for a while; say whether that could be done."""
    # With us, and not before: what is interrupted here must not leave it behind.
    argv = ["setpriv", "--pdeathsig", "TERM", "srun", f"--jobid={number}", *_STEP, "sleep", str(_HANGING_S)]
    begun = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_HANGING_S * 2,
            check=False,
            start_new_session=True,
            env=slurm.environment(),
        )
    return time.monotonic() > begun + 0.5


def _told(number: int, known: dict[str, str]) -> int:
    """Say how a job ended; return the exit status for it."""
    state = known["JobState"].split()[0].lower()
    code, _, killed = known.get("ExitCode", "0:0").partition(":")
    tries = int(known.get("Restarts", "0")) + 1
    how = jobs.how_it_ended(state, known.get("ExitCode", "0:0"), jobs.short(known.get("TimeLimit", "")))
    if state == "completed":
        return 0
    said = how or state
    if tries > 1:
        said += f", {jobs.ordinal(tries)} try"
    click.echo(f"job {number}: {said}", err=True)
    if state == "timeout":
        return _TIMED_OUT
    if state == "failed":
        return 128 + int(killed) if killed not in ("", "0") else int(code) or 1
    return 1
