"""The users' node: where people work, in a shell or in JupyterLab."""

import subprocess
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from docker.models.containers import Container

from cfiddle_cluster import services
from cfiddle_cluster.commands import CommandError, docker_cli, run
from cfiddle_cluster.config import Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import State

if TYPE_CHECKING:
    from cfiddle_cluster.users import User


def running() -> Container:
    """Return the container of the users' node.

    Raises:
        ClusterError: it does not run.
    """
    found = services.container("userhost")
    if found is None:
        raise ClusterError("the users' node does not run", "./invoke up starts it; ./invoke status shows what runs")
    return found


def shell(config: Config, *, user: str = "jovyan", command: str | None = None) -> int:
    """Run a shell, or a command by it, as a user on the users' node; return its exit status.

    Raises:
        ClusterError: the users' node does not run.
    """
    argv = ["as-user", user, "bash", "--login"]
    return _attached(argv if command is None else [*argv, "-c", command])


def ddocker(words: Iterable[str]) -> int:
    """Run `ddocker` as the administrator, who sees the containers of all users; return its exit status.

    Raises:
        ClusterError: the users' node does not run.
    """
    return _attached(["ddocker", *words])


def url(config: Config, state: State) -> str:
    """Return the address of JupyterLab, with its token."""
    return f"{address(config)}/lab?token={state.secret('jupyter-token')}"


def address(config: Config) -> str:
    """Return the address of JupyterLab, without its token."""
    return f"http://{config.head_addr or 'localhost'}:{config.jupyter_port}"


def fill_homes(users: Iterable["User"]) -> None:
    """Put into the users' homes what they lack of the skeleton; the users' node does so itself when it starts."""
    container = services.container("userhost")
    for user in users:
        if container:
            try:
                _exec(container, ["timeout", "20", "as-user", user.name, "fill-home"], user="0:0")
            except CommandError as error:  # what is in the way there is the user's own, and nobody else's concern
                print(f"warning: the home of {user.name} was not filled: {error.output.strip()}", file=sys.stderr)


def end_sessions(user: "User") -> None:
    """End every process of the user on the users' node."""
    container = services.container("userhost")
    if container:
        # kill(2): -1 is every process that this uid may signal, but for the one that asks.
        _exec(container, ["sh", "-c", "kill -KILL -1 2>/dev/null || true"], user=f"{user.uid}:{user.gid}")


def _attached(argv: list[str]) -> int:
    container = running()
    terminal = ["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    sys.stdout.flush()
    wrapped = [docker_cli(), "exec", "--interactive", *terminal, str(container.id), *argv]
    return subprocess.run(wrapped, check=False).returncode


def _exec(container: Container, argv: list[str], *, user: str) -> None:
    run([docker_cli(), "exec", "--user", user, "--workdir", "/", str(container.id), *argv], timeout_s=60)
