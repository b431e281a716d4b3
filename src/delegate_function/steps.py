"""What a chain does without leaving a process: hooks for debugging, fresh directories, descriptions bound late.

Such a step stands among the hops of a call. One before another hop is taken by the process that starts that hop; those
at the end by the process in which the call runs.
"""

from __future__ import annotations

import os
import sys

from delegate_function.errors import ConfigurationError, HopFailed

TYPE_CHECKING = False  # the module `typing` takes longer to load than all that a hop needs
if TYPE_CHECKING:
    from typing import Any

SHELL = "SHELL"
DIRECTORY = "temporary directory"
HOOK = "hook"
LATE = "late"
TERMINAL = "terminal"
DATA = "data"
_LATE_LEVELS = 16


def leaves(hops: list[dict[str, Any]]) -> bool:
    """Say whether some of the hops need another process."""
    return any(hop.get("type") not in (DIRECTORY, HOOK, TERMINAL, DATA) for hop in hops)


def count(hops: list[dict[str, Any]]) -> int:
    """Return how many of them have a number in errors."""
    return sum(hop.get("type") not in (HOOK, LATE, TERMINAL, DATA) for hop in hops)


def bound(hops: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the hops with those described in a file in the place of a late one that would be taken here."""
    for _ in range(_LATE_LEVELS):
        number = next((n for n, hop in enumerate(hops) if leaves([hop])), None)
        if number is None or hops[number]["type"] != LATE:
            return hops
        from delegate_function.generator import described_late

        hops = hops[:number] + described_late() + hops[number + 1 :]
    raise ConfigurationError("the file that DELEGATE_FUNCTION_CONFIG names describes a chain by itself")


def hook_refused(name: str) -> str | None:
    """Return what to say where hooks are not enabled, otherwise nothing."""
    if os.environ.get("DELEGATE_FUNCTION_DEBUG_ENABLED") == "yes":
        return None
    return (
        f"{name}: the debugging hook is disabled on {os.uname().nodename}; "
        "DELEGATE_FUNCTION_DEBUG_ENABLED=yes enables it"
    )


def run_hook(step: dict[str, Any]) -> None:
    """Run a hook in this process, or say that hooks are disabled here."""
    refusal = hook_refused(step["name"])
    if refusal:
        print(refusal, file=sys.stderr)
        return
    told = {"DELEGATE_FUNCTION_COMMAND": step["command"], "DELEGATE_NAME": step["name"]}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        if step["call"] == SHELL:
            _run_shell()
            return
        obj, method, args, kwargs = step["call"]
        getattr(obj, method)(*args, **kwargs)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run_shell() -> None:
    import subprocess

    # Without a terminal a shell shows what it is asked only if it is told that somebody is there.
    options = [] if os.isatty(0) else ["-i"]
    subprocess.run([os.environ.get("SHELL", "/bin/bash"), *options], check=False)


class Directories:
    """Directories that only this user may enter, to be removed with all that is in them when the context is left."""

    def __init__(self) -> None:
        self._paths: list[str] = []

    def __enter__(self) -> Directories:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._paths:
            import shutil

            for path in self._paths:
                shutil.rmtree(path, ignore_errors=True)

    def make(self, where: str) -> str:
        """Make one more, for a hop that errors call `where`."""
        import tempfile

        try:
            path = tempfile.mkdtemp(prefix="call-")
        except OSError as error:
            raise HopFailed(f"a directory cannot be made: {error}", where=where) from error
        self._paths.append(path)
        return path
