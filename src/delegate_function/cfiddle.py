"""Let CFiddle run its experiments through a delegate.

    from cfiddle import cfiddle_config, run
    from delegate_function.cfiddle import execution_method

    with cfiddle_config(RunnerDelegate_type=execution_method(CHAIN)):
        run(executables, "function", arguments)

CFiddle 0.6.1 makes an object of what stands in `RunnerDelegate_type` and calls its `execute(command, runner)` with a
command that would run the pickled runner in a process here. What an invocation needs (its library, and the runner
without what only displays things) is packed instead, runs at the end of the chain, and the measurements come back.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from delegate_function import steps
from delegate_function.delegates import BaseDelegate, DelegateChain, SandboxDelegate, SlurmDelegate
from delegate_function.errors import ConfigurationError, DelegateFunctionException, ProcessDied
from delegate_function.reporting import progress

_OUTDATED = "pkg_resources is deprecated as an API"
# CFiddle 0.6.1 says so each time it is imported, and a call imports it where it runs.
warnings.filterwarnings("ignore", message=_OUTDATED, category=UserWarning)
_RUN = "from cfiddle.Runner import invoke_runner; invoke_runner()"


def execution_method(
    config: BaseDelegate | str | os.PathLike[str] | None = None,
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    outputs: Iterable[str | os.PathLike[str]] = (),
) -> ExecutionMethod:
    """Return what CFiddle's `RunnerDelegate_type` takes.

    Args:
        config: a delegate, YAML, or the name of a file with YAML; without it, a sandbox on a worker.
        inputs, outputs: files that the measured functions read and write, relative to the working directory.
    """
    if config is None:
        config = DelegateChain(SlurmDelegate, SandboxDelegate)()
    elif not isinstance(config, BaseDelegate):
        from delegate_function.generator import DelegateGenerator

        is_text = isinstance(config, str) and "\n" in config
        config = DelegateGenerator(yaml=str(config)) if is_text else DelegateGenerator(filename=config)
    return ExecutionMethod(config, inputs, outputs)


class ExecutionMethod:
    """CFiddle's way to a delegate. CFiddle calls it to make one, copies it with its configuration, and pickles it."""

    __name__ = "ExecutionMethod"

    def __init__(
        self,
        delegate: BaseDelegate,
        inputs: Iterable[str | os.PathLike[str]] = (),
        outputs: Iterable[str | os.PathLike[str]] = (),
    ) -> None:
        self.delegate = delegate
        self._inputs = list(inputs)
        self._outputs = list(outputs)

    def __call__(self) -> ExecutionMethod:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ExecutionMethod:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Where a pickled runner is opened, it runs; CFiddle's own way stands for whatever led there.
        from cfiddle.Runner import SubprocessDelegate as LocalRunner

        return functools.partial, (LocalRunner,)

    def execute(self, command: list[str], runner: Any) -> None:
        """Run CFiddle's runner through the delegate and leave the results in the file that the command names.

        Raises:
            a DelegateFunctionException that is a CFiddleException too: CFiddle takes any other for a defect of its own
            and raises a text in its place.
        """
        try:
            self._execute(command, runner)
        except DelegateFunctionException as error:
            error.__class__ = _known_to_cfiddle(type(error))
            raise

    def _execute(self, command: list[str], runner: Any) -> None:
        options = dict(zip(command[1::2], command[2::2], strict=True))
        if not {"--runner", "--results"} <= options.keys():
            raise ConfigurationError(f"cannot tell from {command} where CFiddle's runner is and its results belong")
        if not steps.leaves(self.delegate.compile()):
            _run_here(options)
            return
        invocations = list(runner.get_invocations())
        packed = _pack(runner, invocations)
        results = self.delegate.call(_Experiment(packed), "run", inputs=self._inputs, outputs=self._outputs)
        for result in results if isinstance(results, list) else ():
            if isinstance(getattr(result, "invocation", None), int):
                result.invocation = invocations[result.invocation]
        with open(options["--results"], "wb") as file:
            pickle.dump(results, file)


def _known_to_cfiddle(kind: type[DelegateFunctionException]) -> type[DelegateFunctionException]:
    from cfiddle.Exceptions import CFiddleException

    known: type[DelegateFunctionException] = type(kind.__name__, (kind, CFiddleException), {"__doc__": kind.__doc__})
    return known


def _run_here(options: dict[str, str]) -> None:
    """Do as CFiddle itself: in a process of its own, which a function that crashes takes down alone."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            f"ignore:{_OUTDATED}:UserWarning",
            "-c",
            _RUN,
            "--runner",
            options["--runner"],
            "--results",
            options["--results"],
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise ProcessDied(f"CFiddle's runner ended with status {done.returncode}", exit_status=done.returncode)


def _pack(runner: Any, invocations: list[Any]) -> dict[str, Any]:
    """Return all that is needed to run the invocations somewhere else."""
    from cfiddle.config import peek_config
    from cfiddle.Runner import SubprocessDelegate as LocalRunner

    executables: dict[int, Any] = {}
    libraries: dict[str, bytes] = {}
    moved = []
    for invocation in invocations:
        built = invocation.executable
        if id(built) not in executables:
            directory = f"build-{len(executables)}"
            name = f"{directory}/{Path(built.lib).name}"
            libraries[name] = Path(built.lib).read_bytes()
            executable = executables[id(built)] = copy.copy(built)
            executable.__class__ = _plain(type(built))
            executable.lib, executable.build_dir = name, directory
        there = copy.copy(invocation)
        there.executable = executables[id(built)]
        moved.append(there)
    runner = copy.copy(runner)
    runner._invocations = moved
    runner._cmd_runner = LocalRunner
    runner._progress_bar = _told
    config = peek_config()
    config["RunnerDelegate_type"] = LocalRunner
    config["ProgressBar"] = _told
    config["Executable_type"] = _plain(config["Executable_type"])
    return {"config": config, "runner": runner, "libraries": libraries}


def _told(items: Collection[Any], **options: Any) -> Iterator[Any]:
    """Stand for CFiddle's progress bar where nobody sees one: tell the caller how many of the items are done."""
    for number, item in enumerate(items):
        progress(number, len(items))
        yield item
    progress(len(items), len(items))


def _plain(kind: type[Any]) -> type[Any]:
    """Return the class that does the same without a notebook's display."""
    if not kind.__module__.startswith("cfiddle.jupyter."):
        return kind
    from cfiddle.source import InstrumentedExecutable

    plain: type[Any] = InstrumentedExecutable
    return plain


class _Experiment:
    """A packed runner, to be run in an empty directory somewhere else."""

    def __init__(self, packed: dict[str, Any]) -> None:
        self._packed: dict[str, Any] | None = packed

    def run(self) -> Any:
        """Run the invocations; return their results, or the exception of CFiddle's that ended them."""
        from cfiddle.config import cfiddle_config
        from cfiddle.Exceptions import CFiddleException

        packed, self._packed = self._packed, None
        assert packed is not None
        for name, library in packed["libraries"].items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(library)
        runner = packed["runner"]
        _check_loadable()
        with cfiddle_config(**packed["config"]):
            try:
                results = runner._delegated_run()
            except CFiddleException as error:
                return error
        numbers = {id(invocation): number for number, invocation in enumerate(runner.get_invocations())}
        for result in results:
            number = numbers.get(id(getattr(result, "invocation", None)))
            if number is not None:
                result.invocation = number
        return results


def _check_loadable() -> None:
    try:
        ctypes.CDLL("libcfiddle.so")
    except OSError as error:
        raise ConfigurationError(
            f"CFiddle's library cannot be loaded on {os.uname().nodename}: {error}; the dynamic linker there must know "
            "the directory that `cfiddle-lib-path` prints"
        ) from error
