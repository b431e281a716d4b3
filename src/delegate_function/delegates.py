"""Delegates: where a method runs.

A delegate holds at most one sub-delegate; together they are a chain, outermost first. A chain is compiled into a list
of hops, which are plain data; the call itself is packed once, and opened only where it runs.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from delegate_function import caller, data, files, hop, remote, slurm, steps
from delegate_function.callinfo import CallInfo
from delegate_function.conversation import Conversation
from delegate_function.errors import CallNotSent, ConfigurationError, ResultNotReturned
from delegate_function.steps import SHELL

Hook = tuple[Any, str, tuple[Any, ...], dict[str, Any]]


class BaseDelegate:
    """Run a method through the sub-delegate, or here when there is none.

    Args:
        subdelegate: the delegate that goes on from where this one leads.
        debug_pre_hook: `(object, method, args, kwargs)` or "SHELL", run where this delegate executes and before it
            does, if DELEGATE_FUNCTION_DEBUG_ENABLED=yes there.
        interactive: whether the call, and hooks on its way, read the caller's standard input, line by line. One
            interactive delegate makes its whole chain so.
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
        self._conversation: Conversation | None = None
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
        results: str | None = None,
    ) -> Any:
        """Do as `invoke`, with files that go with the call and come back from it.

        Args:
            inputs: files that the method reads, relative to the working directory.
            outputs: files that it writes, likewise; each takes the place of what is there, once it has come entirely.
            results: "data" where the method runs code that the caller does not trust: its value comes as data, what it
                raises as text, and `obj` stays as it is. "pickle" otherwise. Without it, what the chain's
                SandboxDelegate says.

        A call with files runs in a directory of its own, unless it stays in this process.
        """
        hops = self.compile()
        results, hops = results_of(hops, results)
        info = self.last_call = CallInfo()
        interactive = any(step["type"] == steps.TERMINAL for step in hops)
        directory: str | None = None
        done, of = 0, steps.count(hops)
        with steps.Directories() as directories:
            while hops and hops[0]["type"] in (steps.TERMINAL, steps.HOOK, steps.DIRECTORY):
                step = hops.pop(0)
                if step["type"] == steps.HOOK:
                    with _inside(directory):
                        steps.run_hook(step)
                elif step["type"] == steps.DIRECTORY:
                    done += 1
                    place = hop.describe(steps.DIRECTORY, done, of, os.uname().nodename)
                    directory = directories.make(place)
            if hops:
                return caller.call(
                    hops,
                    obj,
                    method,
                    args,
                    kwargs or {},
                    inputs=inputs,
                    outputs=outputs,
                    results=results,
                    info=info,
                    done=done,
                    directory=directory,
                    interactive=interactive,
                    conversation=self._conversation,
                )
            if directory:
                _copy(inputs, ".", directory, CallNotSent)
            with _inside(directory):
                value = getattr(obj, method)(*args, **(kwargs or {}))
                missing = [path for path in files.checked(outputs) if not Path(path).is_file()]
            if missing:
                raise ResultNotReturned(f"the call did not write {', '.join(missing)}")
            if directory:
                _copy(outputs, directory, ".", ResultNotReturned)
            return value

    def compile(self) -> list[dict[str, Any]]:
        """Return the hops of this chain, outermost first, and the steps between them."""
        hops = steps.bound(self.gather())
        for number, step in enumerate(hops):
            if step["type"] == "sandbox" and steps.leaves(hops[number + 1 :]):
                raise ConfigurationError("nothing can be started from inside a sandbox: SandboxDelegate comes last")
        return hops

    def gather(self) -> list[dict[str, Any]]:
        """Return the hops and steps of this chain as it stands, with descriptions that are bound late unread."""
        hops: list[dict[str, Any]] = []
        delegate: BaseDelegate | None = self
        while delegate is not None:
            own = delegate.hops()
            if delegate._debug_pre_hook is not None:
                name, command = type(delegate).__name__, _command(own)
                hops.append({"type": steps.HOOK, "name": name, "command": command, "call": delegate._debug_pre_hook})
            if delegate.interactive:
                hops.append({"type": steps.TERMINAL})
            hops += own
            delegate = delegate._subdelegate
        return hops

    def hops(self) -> list[dict[str, Any]]:
        """Return this delegate's own hops, without its sub-delegate's."""
        return []


def _is_hook(hook: Any) -> bool:
    return isinstance(hook, tuple | list) and len(hook) == 4 and isinstance(hook[1], str)


def shell_hook() -> str:
    """Return the hook that starts the user's shell; the call goes on when it ends."""
    return SHELL


def _command(hops: list[dict[str, Any]]) -> str:
    """Return the command that a delegate runs, for people."""
    kind = hops[0]["type"] if len(hops) == 1 else ""
    if kind == "slurm":
        return shlex.join(slurm.srun_argv(hops[0]))
    return shlex.join(remote.argv(hops[0])) if kind in ("sudo", "ssh", "docker") else "delegate-function-run"


def _inside(directory: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.chdir(directory) if directory else contextlib.nullcontext()


def _copy(
    paths: Iterable[str | os.PathLike[str]], source: str, target: str, kind: type[CallNotSent | ResultNotReturned]
) -> None:
    try:
        files.copy(source, target, files.checked(paths))
    except files.FileError as error:
        raise kind(f"a file of the call cannot be copied: {error}") from error


class TrivialDelegate(BaseDelegate):
    """Run here."""


class TemporaryDirectoryDelegate(BaseDelegate):
    """Run in a fresh directory that is removed afterwards.

    In a chain that stays in this process, its working directory is changed meanwhile: for all of its threads.
    """

    def hops(self) -> list[dict[str, Any]]:
        """Return the one step."""
        return [{"type": steps.DIRECTORY}]


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


class SudoDelegate(SubprocessDelegate):
    """Run in a new process of another user, to whom sudo lets this one switch without a password.

    Args:
        user: the other user; sudo's default, root, if none is named.
        sudo_args: more arguments for sudo, a list with one string for each.
        delegate_executable_path: the program to start as that user, who must be able to read this Python and this
            package otherwise.
    """

    def __init__(
        self,
        subdelegate: BaseDelegate | None = None,
        debug_pre_hook: Hook | str | None = None,
        interactive: bool = False,
        *,
        user: str | None = None,
        sudo_args: list[str] | None = None,
        temporary_file_root: str | None = None,
        delegate_executable_path: str | None = None,
    ) -> None:
        super().__init__(subdelegate, debug_pre_hook, interactive, delegate_executable_path=delegate_executable_path)
        self._sudo = _sudo(user, sudo_args)

    def hops(self) -> list[dict[str, Any]]:
        """Return the one hop of another user's process."""
        return [_without_none(type="sudo", executable=self._executable, **self._sudo)]


class SSHDelegate(SubprocessDelegate):
    """Run on another machine, where OpenSSH lets this user log in without a question.

    Args:
        user, host: the account there and the machine, as OpenSSH knows it.
        ssh_options: more arguments for ssh, a list with one string for each (`["-p", "2222"]`).
        delegate_executable_path: the program to start there, in the place of `python3 -I -m delegate_function.hop`.
    """

    def __init__(
        self,
        user: str,
        host: str,
        subdelegate: BaseDelegate | None = None,
        debug_pre_hook: Hook | str | None = None,
        interactive: bool = False,
        *,
        ssh_options: list[str] | None = None,
        temporary_file_root: str | None = None,
        delegate_executable_path: str | None = None,
    ) -> None:
        super().__init__(subdelegate, debug_pre_hook, interactive, delegate_executable_path=delegate_executable_path)
        self._user, self._host = remote.checked_name("user", user), remote.checked_name("host", host)
        self._options = remote.checked_arguments("ssh_options", ssh_options)

    def hops(self) -> list[dict[str, Any]]:
        """Return the one hop of another machine."""
        executable, options = self._executable, self._options
        return [_without_none(type="ssh", user=self._user, host=self._host, executable=executable, options=options)]


class DockerDelegate(SubprocessDelegate):
    """Run in a new container of an engine that this user may use; SandboxDelegate is for who has none.

    Args:
        docker_image: an image that has this package for its `python3`.
        docker_cmd_line_args: more arguments for `docker run`, a list with one string for each.
        delegate_executable_path: the program to start there, in the place of `python3 -I -m delegate_function.hop`.
    """

    def __init__(
        self,
        docker_image: str,
        subdelegate: BaseDelegate | None = None,
        debug_pre_hook: Hook | str | None = None,
        interactive: bool = False,
        *,
        docker_cmd_line_args: list[str] | None = None,
        temporary_file_root: str | None = None,
        delegate_executable_path: str | None = None,
    ) -> None:
        super().__init__(subdelegate, debug_pre_hook, interactive, delegate_executable_path=delegate_executable_path)
        self._image = remote.checked_name("Docker image", docker_image)
        self._options = remote.checked_arguments("docker_cmd_line_args", docker_cmd_line_args)

    def hops(self) -> list[dict[str, Any]]:
        """Return the one hop of a container."""
        return [_without_none(type="docker", image=self._image, executable=self._executable, options=self._options)]


class SuDockerDelegate(DockerDelegate):
    """Run in a new container that another user's right to an engine starts.

    Args:
        docker_user: as whom sudo runs `docker`; sudo's default, root, if none is named.
        sudo_args: more arguments for sudo, a list with one string for each.
    """

    def __init__(
        self,
        docker_image: str,
        subdelegate: BaseDelegate | None = None,
        debug_pre_hook: Hook | str | None = None,
        interactive: bool = False,
        *,
        docker_user: str | None = None,
        sudo_args: list[str] | None = None,
        docker_cmd_line_args: list[str] | None = None,
        temporary_file_root: str | None = None,
        delegate_executable_path: str | None = None,
    ) -> None:
        super().__init__(
            docker_image,
            subdelegate,
            debug_pre_hook,
            interactive,
            docker_cmd_line_args=docker_cmd_line_args,
            delegate_executable_path=delegate_executable_path,
        )
        self._sudo = _sudo(docker_user, sudo_args)

    def hops(self) -> list[dict[str, Any]]:
        """Return the one hop of a container, started through sudo."""
        return [{**super().hops()[0], "sudo": {"type": "sudo", **self._sudo}}]


def _sudo(user: str | None, arguments: list[str] | None) -> dict[str, Any]:
    named = remote.checked_name("sudo user", user) if user is not None else None
    return _without_none(user=named, options=remote.checked_arguments("sudo_args", arguments))


class SlurmDelegate(BaseDelegate):
    """Run in a Slurm job of its own, on one node.

    Args:
        temporary_file_root: for compatibility; nothing is written to files on the way.
        delegate_executable_path: the program to start there, in the place of a Python that serves the hop (`hop.py`).
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
        results: "data" for code that is not trusted, as in `BaseDelegate.call`, for all calls of the chain.
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
        results: str | None = None,
    ) -> None:
        super().__init__(subdelegate, debug_pre_hook, interactive)
        if not isinstance(profile, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,31}", profile):
            raise ConfigurationError(f"{profile!r} is no name of a profile")
        if seconds is not None and (type(seconds) not in (int, float) or not 0 < seconds < math.inf):
            raise ConfigurationError(f"seconds is a number greater than 0, not {seconds!r}")
        if memory_mb is not None and (type(memory_mb) is not int or memory_mb <= 0):
            raise ConfigurationError(f"memory_mb is a whole number greater than 0, not {memory_mb!r}")
        self._hop = _without_none(type="sandbox", profile=profile, seconds=seconds, memory_mb=memory_mb)
        self._results = checked_results(results)

    def hops(self) -> list[dict[str, Any]]:
        """Return the one hop of a sandbox, after what its results travel as, if that is said."""
        before = [{"type": steps.DATA}] if self._results == data.DATA else []
        return [*before, dict(self._hop)]


def _without_none(**items: Any) -> dict[str, Any]:
    return {name: value for name, value in items.items() if value}


def checked_results(results: str | None) -> str | None:
    """Return what results travel as; raise ConfigurationError for what is nothing of that."""
    if results not in (None, *data.RESULTS):
        raise ConfigurationError(f"results is 'pickle' or 'data', not {results!r}")
    return results


def results_of(hops: list[dict[str, Any]], asked: str | None) -> tuple[str, list[dict[str, Any]]]:
    """Return what results travel as, which is what was asked for or else the chain says, and the hops without that.

    Raises:
        ConfigurationError: that is unknown, or code that is not trusted would run in this process.
    """
    said = data.DATA if any(step["type"] == steps.DATA for step in hops) else data.PICKLE
    results, hops = checked_results(asked) or said, [step for step in hops if step["type"] != steps.DATA]
    if results == data.DATA and not steps.leaves(hops):
        raise ConfigurationError("results='data' is for code that is not trusted, and this chain stays here")
    return results, hops


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
