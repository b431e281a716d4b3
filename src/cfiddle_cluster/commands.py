"""Run a command: quiet when it succeeds, complete when it fails."""

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.wait import PATIENCE

LAST_LINES = 20

# Nothing that a killed `up` started may go on while the next one runs.
_DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")


class CommandError(ClusterError):
    """A command failed or did not end in time.

    Attributes:
        argv: the command.
        returncode: its exit status; None if its time was up.
        output: the last lines of what it wrote, errors last.
    """

    def __init__(self, argv: Sequence[str | Path], returncode: int | None, output: str, how: str) -> None:
        self.argv = [str(part) for part in argv]
        self.returncode = returncode
        self.output = "\n".join(output.strip().splitlines()[-LAST_LINES:])
        super().__init__(f"{shlex.join(self.argv)} {how}" + (f":\n{self.output}" if self.output else ""))


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    input: str | bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a command and return what it wrote to its standard output. It is killed should this process die.

    Args:
        argv: the command; never a shell string, and never with a secret in it: those go through `input`.
        timeout_s: after so many seconds it is killed; `PATIENCE` makes them longer.
        input: its standard input; none by default.
        env: its whole environment; this process's by default.
        cwd: where it runs.

    Raises:
        CommandError: it cannot be started, ends with another status than 0, or not in time.
    """
    timeout_s *= PATIENCE
    data = input.encode() if isinstance(input, str) else input
    source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
    try:
        done = subprocess.run(
            [*_DIE_WITH_US, *argv], timeout=timeout_s, env=env, cwd=cwd, capture_output=True, check=False, **source
        )
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"") + (error.stderr or b"")
        raise CommandError(argv, None, output.decode(errors="replace"), f"did not end in {timeout_s:.0f} s") from error
    except OSError as error:
        raise CommandError(argv, None, "", f"cannot be started: {error.strerror}") from error
    if done.returncode:
        output = (done.stdout + b"\n" + done.stderr).decode(errors="replace")
        if done.returncode in (126, 127) and output.strip().startswith("setpriv: failed to execute"):
            raise CommandError(argv, done.returncode, "", f"cannot be started: {output.strip().rpartition(': ')[2]}")
        raise CommandError(argv, done.returncode, output, f"ended with status {done.returncode}")
    text: str = done.stdout.decode(errors="replace")
    return text


@cache
def docker_cli() -> str:
    """Return the docker client to call: the one that came with the engine, not a newer one earlier in PATH.

    A newer client may insist on plugins (buildx) that the engine's package does not bring.
    """
    return "/usr/bin/docker" if os.access("/usr/bin/docker", os.X_OK) else "docker"
