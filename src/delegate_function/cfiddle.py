"""Let CFiddle build its executables and run its experiments through delegates.

    from cfiddle import build, cfiddle_config, run
    from delegate_function.cfiddle import build_method, execution_method

    with cfiddle_config(Builder_type=build_method(), RunnerDelegate_type=execution_method()):
        run(build(SOURCE), "function", arguments)

CFiddle 0.6.1 makes an object of what stands in `RunnerDelegate_type` and calls its `execute(command, runner)` with a
command that would run the pickled runner in a process here. What an invocation needs (its library, and the runner
without what only displays things) is packed instead, runs at the end of the chain, and the measurements come back, as
plain data of which results are made here. What stands in `Builder_type` makes one executable of one source.
"""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from delegate_function import counters, steps, terminal
from delegate_function.building import BuildMethod
from delegate_function.callinfo import CallInfo
from delegate_function.delegates import BaseDelegate, DelegateChain, SandboxDelegate, SlurmDelegate
from delegate_function.errors import (
    ConfigurationError,
    CountersUnavailable,
    ProcessDied,
    ResultNotReturned,
    also,
)
from delegate_function.experiment import OUTDATED, Experiment, pack
from delegate_function.fingerprint import OversubscribedNode, UnlikeNodes, differences

COLUMNS = (
    *("node", "job", "seconds", "wall_s", "user_s", "system_s", "peak_memory_mb"),
    *("cpu_model", "cores", "cpus", "governor", "boost", "smt", "kernel", "image", "counters"),
)
"""What `execution_method(columns=…)` adds to the measurements of a run, where it is known."""

_TEXT = 10_000
_RUN = "from cfiddle.Runner import invoke_runner; invoke_runner()"

_nodes: list[dict[str, Any]] = []
"""Fingerprints of the nodes on which this process has measured, of those that are alike only the first."""


def execution_method(
    config: BaseDelegate | str | os.PathLike[str] | None = None,
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    outputs: Iterable[str | os.PathLike[str]] = (),
    columns: Iterable[str] = (),
    results: str | None = None,
) -> ExecutionMethod:
    """Return what CFiddle's `RunnerDelegate_type` takes.

    Args:
        config: a delegate, YAML, or the name of a file with YAML; without it, a sandbox on a worker.
        inputs, outputs: files that the measured functions read and write, relative to the working directory.
        columns: which of COLUMNS the results have beside the measurements. They are the same for all of one run.
        results: "data" for functions that are not trusted, as in `BaseDelegate.call`: only text and numbers come back,
            of which CFiddle's results are made here.
    """
    return ExecutionMethod(_delegate(config, SlurmDelegate, SandboxDelegate), inputs, outputs, columns, results)


def build_method(
    config: BaseDelegate | str | os.PathLike[str] | None = None,
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    includes: bool = True,
) -> BuildMethod:
    """Return what CFiddle's `Builder_type` takes, so that `build` compiles somewhere else.

    Args:
        config: a delegate, YAML, or the name of a file with YAML; without it, a sandbox of the profile `build`, on a
            worker that other jobs may share.
        inputs: further files that the compiler reads, relative to the working directory.
        includes: whether a source travels with what it includes, as far as that is found beside it, in the working
            directory, or by a relative `-I` among the build's parameters. For sources of people whom you do not trust,
            False: else a source that names a file of yours has it.
    """
    shared = functools.partial(SlurmDelegate, partition="shared")
    return BuildMethod(_delegate(config, shared, functools.partial(SandboxDelegate, profile="build")), inputs, includes)


def _delegate(config: BaseDelegate | str | os.PathLike[str] | None, *default: Any) -> BaseDelegate:
    if config is None:
        return DelegateChain(*default)()
    if isinstance(config, BaseDelegate):
        return config
    from delegate_function.generator import DelegateGenerator

    is_text = isinstance(config, str) and "\n" in config
    return DelegateGenerator(yaml=str(config)) if is_text else DelegateGenerator(filename=config)


class ExecutionMethod:
    """CFiddle's way to a delegate. CFiddle calls it to make one, copies it with its configuration, and pickles it."""

    __name__ = "ExecutionMethod"

    def __init__(
        self,
        delegate: BaseDelegate,
        inputs: Iterable[str | os.PathLike[str]] = (),
        outputs: Iterable[str | os.PathLike[str]] = (),
        columns: Iterable[str] = (),
        results: str | None = None,
    ) -> None:
        self.delegate = delegate
        self._inputs = list(inputs)
        self._outputs = list(outputs)
        self._results = results
        self._columns = [columns] if isinstance(columns, str) else list(columns)
        if unknown := sorted(set(self._columns) - set(COLUMNS)):
            raise ConfigurationError(f"there is no column {', '.join(unknown)}; there are: {', '.join(COLUMNS)}")

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
            a DelegateFunctionException that is a CFiddleException too.
        """
        from cfiddle.Exceptions import CFiddleException

        options = dict(zip(command[1::2], command[2::2], strict=True))
        with also(CFiddleException):
            if not {"--runner", "--results"} <= options.keys():
                raise ConfigurationError(f"cannot tell from {command} where CFiddle's runner is and its results belong")
            leaves = steps.leaves(self.delegate.compile())
            results = self._run_there(runner) if leaves else self._run_here(options, runner)
        with open(options["--results"], "wb") as file:
            pickle.dump(results, file)

    def _run_there(self, runner: Any) -> Any:
        invocations = list(runner.get_invocations())
        packed = pack(runner, invocations)
        said = self.delegate.call(
            Experiment(), "run", (packed,), inputs=self._inputs, outputs=self._outputs, results=self._results
        )
        info = self.delegate.last_call or CallInfo()
        try:
            if "error" in said:
                return _exception(*said["error"])
            if "no counters" in said:
                names, reason = said["no counters"]
                raise _no_counters(names, reason, info)
            results = [_result(entry, runner, invocations) for entry in said["results"]]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ResultNotReturned(f"what came back are no results of CFiddle's: {error}", where=info.where) from error
        _judge(info)
        return self._collected(results, runner, info)

    def _run_here(self, options: dict[str, str], runner: Any) -> Any:
        """Do as CFiddle itself: in a process of its own, which a function that crashes takes down alone."""
        self.delegate.last_call = CallInfo()
        _run_in_process(options)
        with open(options["--results"], "rb") as file:
            results = pickle.load(file)
        from cfiddle.perfcount import UnknownPerformanceCounter

        names = {name for invocation in runner.get_invocations() for name in invocation.perf_counters}
        if isinstance(results, UnknownPerformanceCounter) and (reason := counters.unavailable(names)):
            raise _no_counters(sorted(names), reason, self.delegate.last_call)
        return results

    def _collected(self, results: list[Any], runner: Any, info: CallInfo) -> Any:
        known = {**dict.fromkeys(COLUMNS), **info.node, **info.usage}
        known |= {"node": info.node.get("name") or _last_node(info), "job": info.job_id, "seconds": info.seconds}
        added = {name: known[name] for name in self._columns}
        if info.void:
            added["void"] = info.void
        for result in results if added else ():
            result.results = [{**row, **added} for row in result.results or [{}]]
        collected = runner._result_list_factory()
        collected.extend(results)
        return collected


def _no_counters(names: list[str], reason: str, info: CallInfo) -> CountersUnavailable:
    told = str(info.node.get("counters"))
    if told.startswith(("policy: ", "kernel: ", "machine: ")):
        reason = told  # by the agent, who knows the profile
    reason = _shown(reason)
    return CountersUnavailable(f"no counter {_shown(', '.join(names))} here, {reason}", where=info.where, reason=reason)


def _exception(name: str, arguments: list[str]) -> Exception:
    """Return the exception of CFiddle's that has this name."""
    from cfiddle.Exceptions import CFiddleException

    kinds = [CFiddleException]
    for kind in kinds:  # grows meanwhile
        kinds += kind.__subclasses__()
    texts = map(_shown, arguments)
    found: Exception = next((kind for kind in kinds if kind.__name__ == name), CFiddleException)(*texts)
    str(found)  # which fails now, not where it is shown, if these are not its arguments
    return found


def _shown(text: str) -> str:
    """Return what may be shown of a text that the measured code may have made."""
    return terminal.clean(text, limit=_TEXT)


def _result(entry: Any, runner: Any, invocations: list[Any]) -> Any:
    if not isinstance(entry, list):  # of an invoker of one's own
        entry.invocation = invocations[entry.invocation]
        return entry
    number, rows, value = entry
    if not all(isinstance(text, str) for row in rows for pair in row.items() for text in pair):
        raise TypeError("a measurement is not text")
    return runner._result_factory(invocation=invocations[number], results=rows, return_value=value)


def _judge(info: CallInfo) -> None:
    """Warn where the measurements of a run cannot be trusted, or compared with earlier ones."""
    if info.void:
        warnings.warn(f"{info.void}: these measurements are void", OversubscribedNode, stacklevel=2)
    if not info.node or any(not differences(earlier, info.node) for earlier in _nodes):
        return
    for earlier in _nodes:
        unlike = [f"{name} is {b}, not {a}" for name, (a, b) in differences(earlier, info.node).items()]
        warnings.warn(
            f"{info.node.get('name')} is not like {earlier.get('name')}, where this process measured before: "
            f"{'; '.join(unlike)}. Do not compare the one's times with the other's",
            UnlikeNodes,
            stacklevel=2,
        )
    _nodes.append(info.node)


def _last_node(info: CallInfo) -> str | None:
    return info.hops[-1].get("node") if info.hops else None


def _run_in_process(options: dict[str, str]) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            f"ignore:{OUTDATED}:UserWarning",
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
