"""Delegates: where a method runs.

A delegate holds at most one sub-delegate; together they are a chain, outermost first. A chain is compiled into a list
of hops, which are plain data; the call itself is packed once, and opened only where it runs.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from delegate_function import caller, files, slurm
from delegate_function.caller import CallInfo
from delegate_function.errors import ConfigurationError, NotOffered, ResultNotReturned

Hook = tuple[Any, str, tuple[Any, ...], dict[str, Any]]
SHELL = "SHELL"


class BaseDelegate:
    """Run a method through the sub-delegate, or here when there is none.

    Args:
        subdelegate: the delegate that goes on from where this one leads.
        debug_pre_hook: `(object, method, args, kwargs)` or "SHELL", run in the caller's process before the outermost
            delegate executes, when DELEGATE_FUNCTION_DEBUG_ENABLED=yes. Offered on the outermost delegate alone.
        interactive: whether the call reads from the terminal. Offered where nothing leaves this process.
    """

    def __init__(
        self,
        subdelegate: BaseDelegate | None = None,
        debug_pre_hook: Hook | str | None = None,
        interactive: bool = False,
    ) -> None:
        if debug_pre_hook not in (None, SHELL) and not _is_hook(debug_pre_hook):
            raise ConfigurationError("debug_pre_hook is (object, method, args, kwargs) or 'SHELL'")
        self.interactive = interactive
        self.last_call: CallInfo | None = None
        self._debug_pre_hook = debug_pre_hook
        self._subdelegate: BaseDelegate | None = None
        self.set_subdelegate(subdelegate)

    def set_subdelegate(self, subdelegate: BaseDelegate | None) -> None:
        """Let another delegate go on from where this one leads."""
        if subdelegate is not None and not isinstance(subdelegate, BaseDelegate):
            raise ConfigurationError(f"a sub-delegate is a delegate, not {type(subdelegate).__name__}")
        self._subdelegate = subdelegate

    def invoke(self, obj: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run `obj.method(*args, **kwargs)` through this chain; return its value and bring `obj` up to date.

        Raises:
            what the method raised, with its remote traceback as the cause, or a DelegateFunctionException.
        """
        return self.call(obj, method, args, kwargs)

    def call(
        self,
        obj: Any,
        method: str,
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        inputs: Iterable[str | os.PathLike[str]] = (),
        outputs: Iterable[str | os.PathLike[str]] = (),
    ) -> Any:
        """Do as `invoke`, with files that go with the call and come back from it.

        Args:
            inputs: files that the method reads, relative to the working directory.
            outputs: files that it writes, likewise; each takes the place of what is there, once it has come entirely.

        A call with files runs in a directory of its own, unless it stays in this process.
        """
        hops = self.compile()
        self._run_hook(hops)
        info = self.last_call = CallInfo()
        if hops:
            return caller.call(hops, obj, method, args, kwargs or {}, inputs=inputs, outputs=outputs, info=info)
        value = getattr(obj, method)(*args, **(kwargs or {}))
        missing = [path for path in files.checked(outputs) if not Path(path).is_file()]
        if missing:
            raise ResultNotReturned(f"the call did not write {', '.join(missing)}")
        return value

    def compile(self) -> list[dict[str, Any]]:
        """Return the hops of this chain, as plain data, outermost first; none means that the call stays here."""
        hops: list[dict[str, Any]] = []
        delegate: BaseDelegate | None = self
        while delegate is not None:
            hops += delegate.hops()
            if delegate.interactive and hops:
                raise NotOffered(
                    "a call that reads from the terminal can only stay in this process: interactive=True is offered "
                    "for chains of TrivialDelegate alone"
                )
            if delegate is not self and delegate._debug_pre_hook is not None:
                raise NotOffered("debug_pre_hook is offered on the outermost delegate of a chain alone")
            delegate = delegate._subdelegate
        for hop in hops[:-1]:
            if hop["type"] == "sandbox":
                raise ConfigurationError("nothing can be started from inside a sandbox: SandboxDelegate comes last")
        return hops

    def hops(self) -> list[dict[str, Any]]:
        """Return this delegate's own hops, without its sub-delegate's."""
        return []

    def _run_hook(self, hops: list[dict[str, Any]]) -> None:
        if self._debug_pre_hook is None:
            return
        name = type(self).__name__
        if os.environ.get("DELEGATE_FUNCTION_DEBUG_ENABLED") != "yes":
            print(
                f"{name}: the debugging hook is disabled on {os.uname().nodename}; "
                "DELEGATE_FUNCTION_DEBUG_ENABLED=yes enables it",
                file=sys.stderr,
            )
            return
        command = " ".join(slurm.srun_argv(hops[0])) if hops and hops[0]["type"] == "slurm" else "delegate-function-run"
        with _environment(DELEGATE_FUNCTION_COMMAND=command, DELEGATE_NAME=name):
            if isinstance(self._debug_pre_hook, str):
                shell_hook()
                return
            obj, method, args, kwargs = self._debug_pre_hook
            getattr(obj, method)(*args, **kwargs)


def _is_hook(hook: Any) -> bool:
    return isinstance(hook, tuple) and len(hook) == 4 and isinstance(hook[1], str)


def shell_hook() -> None:
    """Start the user's shell on this terminal, and go on when it ends."""
    subprocess.run([os.environ.get("SHELL", "/bin/bash")], check=False)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class TrivialDelegate(BaseDelegate):
    """Run here."""


class SubprocessDelegate(BaseDelegate):
    """Run in a new process.

    Args:
        temporary_file_root: for compatibility; nothing is written to files on the way.
        delegate_executable_path: the program to start in the place of this package's own (`delegate-function-run`).
    """

    def __init__(
        self,
        subdelegate: BaseDelegate | None = None,
        debug_pre_hook: Hook | str | None = None,
        interactive: bool = False,
        *,
        temporary_file_root: str | None = None,
        delegate_executable_path: str | None = None,
    ) -> None:
        super().__init__(subdelegate, debug_pre_hook, interactive)
        self._executable = _checked_executable(delegate_executable_path)

    def hops(self) -> list[dict[str, Any]]:
        """Return the one hop of a process here."""
        return [_without_none(type="subprocess", executable=self._executable)]


class SlurmDelegate(BaseDelegate):
    """Run in a Slurm job of its own, on one node.

    Args:
        temporary_file_root: for compatibility; nothing is written to files on the way.
        delegate_executable_path: the program to start there, in the place of `python3 -I -m delegate_function.hop`.
        options: partition, time (minutes, or as Slurm writes it), account, qos, reservation, constraint, nodelist,
            exclude, cpus, memory_mb, job_name; each as srun's option of that meaning.
    """

    def __init__(
        self,
        subdelegate: BaseDelegate | None = None,
        debug_pre_hook: Hook | str | None = None,
        interactive: bool = False,
        *,
        temporary_file_root: str | None = None,
        delegate_executable_path: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(subdelegate, debug_pre_hook, interactive)
        self._executable = _checked_executable(delegate_executable_path)
        self._options = slurm.checked(options)

    def hops(self) -> list[dict[str, Any]]:
        """Return the one hop of a job."""
        return [_without_none(type="slurm", executable=self._executable, options=self._options)]


class SandboxDelegate(BaseDelegate):
    """Run in a container that serves this one call, on the node of the Slurm job around it.

    Args:
        profile: which of the administrator's profiles; it says image and limits.
        seconds: wall clock of the call, less than the profile's own.
        memory_mb: memory of the call, less than the profile's own.
    """

    def __init__(
        self,
        subdelegate: BaseDelegate | None = None,
        debug_pre_hook: Hook | str | None = None,
        interactive: bool = False,
        *,
        profile: str = "default",
        seconds: float | None = None,
        memory_mb: int | None = None,
    ) -> None:
        super().__init__(subdelegate, debug_pre_hook, interactive)
        if not isinstance(profile, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,31}", profile):
            raise ConfigurationError(f"{profile!r} is no name of a profile")
        if seconds is not None and (type(seconds) not in (int, float) or not 0 < seconds < math.inf):
            raise ConfigurationError(f"seconds is a number greater than 0, not {seconds!r}")
        if memory_mb is not None and (type(memory_mb) is not int or memory_mb <= 0):
            raise ConfigurationError(f"memory_mb is a whole number greater than 0, not {memory_mb!r}")
        self._hop = _without_none(type="sandbox", profile=profile, seconds=seconds, memory_mb=memory_mb)

    def hops(self) -> list[dict[str, Any]]:
        """Return the one hop of a sandbox."""
        return [dict(self._hop)]


def _without_none(**items: Any) -> dict[str, Any]:
    return {name: value for name, value in items.items() if value}


def _checked_executable(path: str | None) -> str | None:
    if path is None:
        return None
    if not isinstance(path, str) or not path or path.startswith("-") or "\0" in path:
        raise ConfigurationError(f"{path!r} is no path of a program")
    return path


Factory = Callable[..., BaseDelegate]


class DelegateChain:
    """A factory of chains: `DelegateChain(SlurmDelegate, SandboxDelegate)()` is one, outermost first.

    `kwargs` go to each factory, also those given when a chain is made. `interactive` of an inner delegate makes the
    outer ones interactive. `__name__` and `pytest_name` are the factories' names, joined by `_to_`.
    """

    def __init__(self, *factories: Factory, **kwargs: Any) -> None:
        if not factories:
            raise ConfigurationError("a chain needs a delegate")
        self._factories = factories
        self._kwargs = kwargs
        self.__name__ = "_to_".join(str(getattr(factory, "__name__", factory)) for factory in factories)
        self.pytest_name = self.__name__

    def __call__(self, subdelegate: BaseDelegate | None = None, **kwargs: Any) -> BaseDelegate:
        keywords = {**self._kwargs, **kwargs}
        chain = subdelegate
        for factory in reversed(self._factories):
            interactive = chain is not None and chain.interactive
            try:
                chain = factory(subdelegate=chain, **keywords)
            except TypeError as error:
                raise ConfigurationError(f"{getattr(factory, '__name__', factory)}: {error}") from error
            chain.interactive = chain.interactive or interactive
        assert chain is not None
        return chain
