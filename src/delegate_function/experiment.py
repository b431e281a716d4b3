"""A CFiddle runner that runs somewhere else: what of it travels, and what is said of it there."""

from __future__ import annotations

import copy
import ctypes
import os
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from delegate_function import counters
from delegate_function.errors import ConfigurationError
from delegate_function.reporting import progress

OUTDATED = "pkg_resources is deprecated as an API"
# CFiddle 0.6.1 says so each time it is imported, and a call imports it where it runs.
warnings.filterwarnings("ignore", message=OUTDATED, category=UserWarning)


def pack(runner: Any, invocations: list[Any]) -> dict[str, Any]:
    """Return all that is needed to run the invocations somewhere else."""
    from cfiddle.config import peek_config
    from cfiddle.MakeBuilder import MakeBuilder
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
    runner._result_factory, runner._result_list_factory = Measured, list
    config = peek_config()
    config["Builder_type"] = MakeBuilder
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


class Measured:
    """What CFiddle makes one of for each invocation, where it runs."""

    def __init__(self, invocation: Any, results: list[dict[str, str]], return_value: Any) -> None:
        self.invocation, self.results, self.return_value = invocation, results, return_value
        if invocation.perf_counters and not ctypes.CDLL("libcfiddle.so").check_valid_perfcounters():
            from cfiddle.Exceptions import CFiddleException

            raise CFiddleException(f"the performance counters {invocation.perf_counters} could not be read")


class Experiment:
    """What runs a packed runner, in an empty directory somewhere else."""

    def run(self, packed: dict[str, Any]) -> dict[str, Any]:
        """Run the invocations; return as plain data what was measured, or what of CFiddle's ended it.

        What an invoker of one's own returns instead of making it as CFiddle asks it to, is returned as it is.
        """
        from cfiddle.config import cfiddle_config
        from cfiddle.Exceptions import CFiddleException
        from cfiddle.perfcount import UnknownPerformanceCounter

        for name, library in packed["libraries"].items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(library)
        runner = packed["runner"]
        _check_loadable()
        with cfiddle_config(**packed["config"]):
            try:
                results = runner._delegated_run()
            except CFiddleException as error:
                names = {name for invocation in runner.get_invocations() for name in invocation.perf_counters}
                if isinstance(error, UnknownPerformanceCounter) and (reason := counters.unavailable(names)):
                    return {"no counters": [sorted(names), reason]}
                return {"error": [type(error).__name__, [str(argument) for argument in error.args]]}
        numbers = {id(invocation): number for number, invocation in enumerate(runner.get_invocations())}
        for result in results:
            number = numbers.get(id(getattr(result, "invocation", None)))
            if number is not None:
                result.invocation = number
        return {
            "results": [
                [result.invocation, result.results, result.return_value] if isinstance(result, Measured) else result
                for result in results
            ]
        }


def _check_loadable() -> None:
    try:
        ctypes.CDLL("libcfiddle.so")
    except OSError as error:
        raise ConfigurationError(
            f"CFiddle's library cannot be loaded on {os.uname().nodename}: {error}; the dynamic linker there must know "
            "the directory that `cfiddle-lib-path` prints"
        ) from error
