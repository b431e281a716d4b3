"""Slurm's own commands, run for the user of this process."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence

from container_manager.errors import ContainerError

ANSWER_S = 30.0
_SETTINGS = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_")


def run(
    argv: Sequence[str], *, timeout_s: float = ANSWER_S, cwd: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands, and return how it ended.

    Raises:
        ContainerError: it did not answer in time, or is not here.
    """
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            cwd=cwd,
            env=env,
            # A Ctrl-C of the terminal is for this process alone, which must know what came of the command.
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise ContainerError(f"there is no {argv[0]} here", "run it on the cluster's users' node") from error
    except subprocess.TimeoutExpired as error:
        raise ContainerError(f"Slurm did not answer {argv[0]} within {timeout_s:g} s", "scontrol ping") from error
    except OSError as error:  # a command too long for the system
        raise ContainerError(f"{argv[0]} could not be run: {error.strerror}") from error


def ask(
    argv: Sequence[str],
    *,
    timeout_s: float = ANSWER_S,
    cwd: str | None = None,
    env: dict[str, str] | None = None,
    unless: str = "",
) -> str:
    """Run one of Slurm's commands; return what it printed.

    Args:
        unless: a failure that says what this pattern finds is none.

    Raises:
        ContainerError: it failed, did not answer in time, or is not here.
    """
    done = run(argv, timeout_s=timeout_s, cwd=cwd, env=env)
    if done.returncode and not (unless and re.search(unless, done.stderr)):
        raise ContainerError(f"{argv[0]}: {last_line(done.stderr)}")
    return done.stdout


def environment() -> dict[str, str]:
    """Return the environment for sbatch and srun: without settings that would change what they do."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_SETTINGS) or name.startswith("SLURM_CONF")
    }


def last_line(text: str) -> str:
    """Return the last that a command complained of, without its name."""
    lines = [line for line in text.splitlines() if line.strip()] or ["it failed and did not say why"]
    return re.sub(r"^\w+: (error: )?", "", printable(lines[-1]))


def printable(text: str) -> str:
    """Return text as a terminal can show it on one line without obeying it."""
    return "".join(character if character.isprintable() else "?" for character in text)
