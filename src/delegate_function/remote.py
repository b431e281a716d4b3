"""Commands that lead a call to another process, user, machine or container, and what it means when one fails.

Each command is a list whose shape is fixed here. What a caller names is checked so that no name can become an option.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys

from delegate_function import __version__
from delegate_function.errors import (
    ConfigurationError,
    DelegateFunctionException,
    HopFailed,
    NotOffered,
    VersionMismatch,
)

TYPE_CHECKING = False  # the module `typing` takes longer to load than all that a hop needs
if TYPE_CHECKING:
    from typing import Any

KINDS = ("subprocess", "sudo", "ssh", "docker")
_USER = r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,62}\$?"
_NAMES = {
    "user": _USER,
    "sudo user": rf"{_USER}|#[0-9]{{1,10}}",
    "host": r"[A-Za-z0-9:][A-Za-z0-9.:%_-]{0,252}",
    "Docker image": r"[a-z0-9][A-Za-z0-9._/:@-]{0,511}",
}
_SERVE = ["-I", "-m", "delegate_function.hop"]
_MISSING = "No module named 'delegate_function'"
_NO_ENGINE = r"annot connect to the Docker daemon|permission denied while trying to connect|docker: command not found"


def checked_name(kind: str, value: Any) -> str:
    """Return a name that becomes part of a command; raise ConfigurationError for what cannot be one."""
    if not isinstance(value, str) or not re.fullmatch(_NAMES[kind], value, re.ASCII):
        raise ConfigurationError(f"{value!r} is no name of a {kind}")
    return value


def checked_arguments(name: str, values: Any) -> list[str]:
    """Return more arguments for a command; raise ConfigurationError unless they are a list of strings."""
    if values is None:
        return []
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise ConfigurationError(f"{name} is a list of strings, one for each argument, not {values!r}")
    if any("\0" in value or value == "--" for value in values):
        raise ConfigurationError(f"{name} holds what cannot be an option: {list(values)!r}")
    return list(values)


def argv(hop: dict[str, Any]) -> list[str]:
    """Return the command that starts a hop of one of these kinds."""
    kind = hop["type"]
    if kind == "subprocess":
        return _here(hop)
    if kind == "sudo":
        return [*_sudo(hop), *_here(hop)]
    if kind == "ssh":
        command = [str(hop["executable"])] if hop.get("executable") else ["python3", *_SERVE]
        # ssh takes the first value that it is given for an option: these are not up to ssh_options.
        fixed = ["BatchMode=yes", "ClearAllForwardings=yes", "RequestTTY=no", "RemoteCommand=none"]
        options = [word for option in fixed for word in ("-o", option)]
        return ["ssh", *options, *hop.get("options", []), "-l", hop["user"], "--", hop["host"], shlex.join(command)]
    command = [str(hop["executable"])] if hop.get("executable") else ["python3", *_SERVE]
    prefix = _sudo(hop["sudo"]) if hop.get("sudo") else []
    return [*prefix, "docker", "run", "--rm", "-i", *hop.get("options", []), "--", hop["image"], *command]


def _sudo(hop: dict[str, Any]) -> list[str]:
    user = ["-u", hop["user"]] if hop.get("user") else []
    return ["sudo", "-n", *user, *hop.get("options", []), "--"]


def _here(hop: dict[str, Any]) -> list[str]:
    if hop.get("executable"):
        return [str(hop["executable"])]
    # The same package as here, whether it is installed or lies in a checkout.
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = f"import sys; sys.path.insert(0, {package!r}); from delegate_function.hop import main; main()"
    return [sys.executable, "-I", "-c", program]


def node(hop: dict[str, Any]) -> str:
    """Return where a hop is going to run, as far as that is known before it says so itself."""
    kind = hop.get("type")
    if kind == "ssh":
        return str(hop["host"])
    return os.uname().nodename if kind in ("subprocess", "sudo", "docker", "sandbox") else ""


def cannot_start(hop: dict[str, Any], error: OSError, where: str) -> DelegateFunctionException:
    """Return why a hop's command could not be started at all."""
    if hop.get("type") == "docker" and not hop.get("sudo"):
        return _no_engine(str(error), where)
    return HopFailed(f"cannot be started: {error}", where=where)


def explain(hop: dict[str, Any], status: int | None, said: str, where: str) -> DelegateFunctionException:
    """Return why a hop's command ended before the call did, from its exit status and what it said."""
    kind = hop["type"]
    quoted = f"; it said:\n{said}" if said else ""
    if _MISSING in said:
        text = f"delegate_function, of which version {__version__} is needed, cannot be imported there"
        return VersionMismatch(text + quoted, where=where, exit_status=status)
    if kind == "docker" and re.search(_NO_ENGINE, said):
        return _no_engine(said, where)
    name = "its process"
    if kind == "ssh" and status == 255:
        name = f"ssh to {hop['user']}@{hop['host']}"
    elif kind == "sudo" and status == 1 and said.startswith("sudo:"):
        name = "sudo"
    elif kind == "docker" and status in (125, 126, 127):
        name = f"docker run of {hop['image']}"
    return HopFailed(f"{name} {status_text(status)} before the call did{quoted}", where=where, exit_status=status)


def _no_engine(said: str, where: str) -> NotOffered:
    text = (
        "you have no Docker Engine here; SandboxDelegate, after SlurmDelegate, runs a call in a container on a worker"
    )
    return NotOffered(f"{text} ({said})", where=where)


def status_text(status: int | None) -> str:
    """Return in words how a process ended."""
    if status is None:
        return "ended"
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    return f"ended with status {status}"
