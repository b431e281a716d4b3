"""Small objects for tries and tests, importable wherever a call may end."""

from __future__ import annotations

import os
import pdb
import subprocess
from typing import Any


class TestClass:
    """An object that says where it runs, and whose state can be changed there."""

    __test__ = False  # not a test of pytest's

    def __init__(self) -> None:
        self._value: Any = None

    def hello(self) -> int:
        """Print a greeting; return the id of the process that runs this."""
        print("hello from", os.uname().nodename)
        return os.getpid()

    def set_value(self, value: Any) -> None:
        """Set the state of the object."""
        self._value = value


class ShellCommandClass:
    """A command to run somewhere else, with the arguments of subprocess.run."""

    def __init__(self, *args: Any, env: dict[str, str] | None = None, **kwargs: Any) -> None:
        self._args = args
        self._env = env
        self._kwargs = kwargs

    def run(self) -> subprocess.CompletedProcess[Any]:
        """Run the command with `env` added to the environment; return what subprocess.run returns."""
        env = None if self._env is None else {**os.environ, **self._env}
        keywords: dict[str, Any] = {"check": False, "env": env, **self._kwargs}
        done: subprocess.CompletedProcess[Any] = subprocess.run(*self._args, **keywords)
        return done


class PDBClass:
    """An object that starts Python's debugger where it runs; it needs a terminal there."""

    def run(self) -> None:
        """Stop in the debugger."""
        pdb.set_trace()
