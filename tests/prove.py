"""Prove that tests see what they are there for: weaken the cluster, and each must fail; then mend it again.

`./invoke test --prove` runs this. What is weakened for which attack stands in attacks/weakenings.yaml, and for which
other test in cluster/weakenings.yaml.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from xml.etree import ElementTree

import yaml

from cfiddle_cluster import engine, images
from cfiddle_cluster.config import STACK
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.stack import IMAGES
from live import ROOT, LiveCluster, docker, run, wait_until

TESTS = ROOT / "tests"
TABLES = ("attacks", "cluster")
"""The directories of tests that have a table of weakenings."""
COUNT = 22
"""So many attacks there are; they are numbered."""

PLACES = {
    "src/agent/": "/usr/lib/python3/dist-packages/agent/",
    "src/container_manager/": "/opt/cfiddle/container_manager/",
    "src/delegate_function/": "/opt/cfiddle/delegate_function/",
    "conf/slurm.conf": "/etc/slurm/slurm.conf",
    "conf/slurmdbd.conf": "/etc/slurm/slurmdbd.conf.in",
    "policy.yaml": "/etc/cfiddle/policy.yaml",
    "images/cluster/files/": "/",
    "images/mpi/files/": "/",
    "images/user/files/": "/",
    "images/registry/files/": "/",
}
"""Where in a service's container a file of the checkout lies, by how its path begins."""

# The agent's image has compiled files that Python takes without a look at the source: it must not find them.
_UNCOMPILED = ("--env-add", "PYTHONPYCACHEPREFIX=/nonexistent")
_START_S = 180
_TEST_S = 240
_LINES = 25
_SUCCEEDED, _REPELLED, _UNCLEAR = "succeeded", "repelled", "unclear"


class ProofError(Exception):
    """A weakening cannot be applied, or cannot be undone."""


@dataclass(frozen=True)
class Change:
    """One step of a weakening: exactly one of a service, a place, or the checkout's own code is changed.

    Attributes:
        service: a service that is started anew with patched files, and more options of `docker service update`.
        where: where `run` is run, and later `undo`: in a service's container (slurmd's and agent's: on each worker), or
            on the `head`, where IMAGE_NAME and STATE_DIR are in the environment.
        checkout: whether patches are for what the test itself imports, in a copy.
        patch: by a file's path in the checkout, what is replaced by what in it. Each stands there exactly once.
    """

    service: str = ""
    update: str = ""
    where: str = ""
    run: str = ""
    undo: str = ""
    checkout: bool = False
    patch: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Weakening:
    """What is changed, and which tests must then fail.

    Attributes:
        name: what is weakened, for people.
        seen: by a test's name below tests, what its failure must say (regular expressions), so that it is known to have
            failed because of what is weakened (an attack succeeded), and not because the cluster is broken. In a table
            names are below its directory.
    """

    name: str
    change: Sequence[Change]
    seen: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Entry:
    """A part of a table: an attack, or what else belongs together.

    Attributes:
        number: the attack's; None where it is none.
        controls: tests that only prove that the attack's own means are good for something, or what no cluster can lack.
    """

    number: int | None
    title: str
    weakenings: Sequence[Weakening]
    controls: Sequence[str] = ()


def load(directory: str) -> list[Entry]:
    """Read the table of a directory of tests."""
    return [
        Entry(
            entry.get("attack"),
            entry["title"],
            [
                Weakening(
                    weakening["name"],
                    [Change(**change) for change in weakening["change"]],
                    {f"{directory}/{test}": _listed(said) for test, said in weakening["seen"].items()},
                )
                for weakening in entry["weakenings"]
            ],
            [f"{directory}/{test}" for test in entry.get("controls", ())],
        )
        for entry in yaml.safe_load((TESTS / directory / "weakenings.yaml").read_text())
    ]


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def patched(path: str, replacements: Mapping[str, str]) -> str:
    """Return a file of the checkout with replacements made.

    Raises:
        ProofError: what shall be replaced is not there exactly once.
    """
    text = (ROOT / path).read_text()
    for old, new in replacements.items():
        if text.count(old) != 1:
            raise ProofError(f"{path} has {text.count(old)} times what shall be replaced there: {old!r}")
        text = text.replace(old, new)
    return text


def place(path: str) -> str:
    """Return where a file of the checkout lies in a service's container."""
    for beginning, target in PLACES.items():
        if path.startswith(beginning):
            return target + path.removeprefix(beginning)
    raise ProofError(f"{path} lies in no service's container, as far as PLACES knows")


class Weakener:
    """Applies changes to the live cluster and undoes them."""

    def __init__(self, cluster: LiveCluster) -> None:
        self._cluster = cluster

    @contextmanager
    def applied(self, weakening: Weakening) -> Iterator[list[str]]:
        """Have a weakening in force; give options for pytest. It is undone in the order in which it was done.

        (What is started anew reads what was changed before it, so it comes after it both times.)
        """
        options: list[str] = []
        undo: list[ExitStack] = []
        try:
            for change in weakening.change:
                undo.append(ExitStack())
                options += self._apply(change, undo[-1])
            yield options
        finally:
            with _uninterrupted(), ExitStack() as stack:
                for step in reversed(undo):
                    stack.push(step.pop_all())

    def _apply(self, change: Change, undo: ExitStack) -> list[str]:
        if change.checkout:
            return _checkout(change.patch, undo)
        if change.where:
            undo.callback(self._run, change.where, change.undo)
            self._run(change.where, change.run)
        else:
            _update(change, undo)
        return []

    def _run(self, where: str, command: str) -> None:
        if where == "head":
            config = self._cluster.config
            names = {f"IMAGE_{name.upper()}": images.reference(config, name) for name in IMAGES}
            results = [run(["bash", "-c", command], env={"STATE_DIR": str(config.state_dir), **names})]
        elif where in ("slurmd", "agent"):
            results = [self._cluster.in_service(where, command, worker) for worker in self._cluster.workers]
        else:
            results = [self._cluster.in_service(where, command)]
        for result in results:
            if result.exit_status:
                raise ProofError(f"on {where}, {command!r} ended with {result.exit_status}: {result.output[-1000:]}")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let no signal stop what is mended."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _checkout(patches: Mapping[str, Mapping[str, str]], undo: ExitStack) -> list[str]:
    """Copy the sources and patch the copy; return the option by which pytest takes them from there."""
    copy = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="weakened-")))
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for path, replacements in patches.items():
        (copy / path).write_text(patched(path, replacements))
    return ["--override-ini", f"pythonpath=. {copy / 'src'} tests"]


def _update(change: Change, undo: ExitStack) -> None:
    """Start a service anew, with patched files as Swarm's configurations in the place of its own."""
    name = change.service if "-" in change.service else f"{STACK}_{change.service}"
    before = _spec(name)
    tasks = len(_tasks(name))
    options = shlex.split(change.update)
    there = {config["File"]["Name"]: config["ConfigName"] for config in _container(before).get("Configs") or []}
    for path, replacements in change.patch.items():
        config = f"{STACK}_weakened-{time.time_ns()}"
        # The stack's label: the next `up` removes what a killed run leaves, as it brings the service back.
        argv = ["config", "create", "--label", f"cfiddle.stack={STACK}", "--label", "cfiddle.cluster=cfiddle"]
        docker(*argv, config, "-", input=patched(path, replacements)).ok()
        undo.callback(docker, "config", "rm", config)
        if place(path) in there:
            options += ["--config-rm", there[place(path)]]
        mode = "0555" if os.access(ROOT / path, os.X_OK) else "0444"
        options += ["--config-add", f"source={config},target={place(path)},mode={mode}"]
    if any(path.startswith("src/agent/") for path in change.patch):
        options += _UNCOMPILED
    undo.callback(_restore, name, before, tasks)
    docker("service", "update", "--quiet", "--detach", *options, name).ok()
    _wait_until_current(name, tasks)


def _restore(name: str, before: dict[str, Any], tasks: int) -> None:
    """Bring a service back to what it was, byte for byte."""
    if _spec(name) != before:
        service = engine.client().api.inspect_service(name)
        engine.client().api.update_service(
            service["ID"],
            service["Version"]["Index"],
            task_template=before["TaskTemplate"],
            name=before["Name"],
            labels=before["Labels"],
            mode=before["Mode"],
            update_config=before.get("UpdateConfig"),
            rollback_config=before.get("RollbackConfig"),
            endpoint_spec=before.get("EndpointSpec"),
        )
    if _spec(name) != before:
        raise ProofError(f"{name} is not what it was; ./invoke up brings it back")
    _wait_until_current(name, tasks)


def _spec(name: str) -> dict[str, Any]:
    return dict(engine.client().api.inspect_service(name)["Spec"])


def _container(spec: Mapping[str, Any]) -> dict[str, Any]:
    return dict(spec["TaskTemplate"]["ContainerSpec"])


def _tasks(name: str) -> list[dict[str, Any]]:
    return list(engine.client().api.tasks(filters={"service": name, "desired-state": "running"}))


def _wait_until_current(name: str, count: int) -> None:
    """Wait until every task of a service runs, healthy, what was last asked for."""

    def look() -> bool:
        wanted = _spec(name)["TaskTemplate"]
        tasks = _tasks(name)
        return len(tasks) == count and all(
            task["Status"]["State"] == "running"
            and task["Spec"]["ContainerSpec"] == wanted["ContainerSpec"]
            and task["Spec"].get("ForceUpdate") == wanted.get("ForceUpdate")
            and task["Spec"].get("Networks") == wanted.get("Networks")
            for task in tasks
        )

    try:
        wait_until(look, timeout_s=_START_S, interval_s=0.3, what=f"{name} runs what it shall")
    except AssertionError as error:
        raise ProofError(f"{error}; ./invoke logs shows why, ./invoke up mends it") from error


@dataclass(frozen=True)
class Verdict:
    """What came of one test against a weakened cluster."""

    outcome: str
    said: str = ""


def judged(report: Path, test: str, wanted: Sequence[str]) -> Verdict:
    """Return what pytest's report in JUnit's XML says of a test.

    The weakening succeeded if an assertion of the test itself failed, and said all that is wanted. An error around the
    test, another exception, or another assertion is unclear: perhaps the cluster is broken, and nothing is proved.
    """
    file, _, function = test.partition("::")
    module = f"tests.{file.removesuffix('.py').replace('/', '.')}"
    cases = [
        case
        for case in ElementTree.parse(report).getroot().iter("testcase")
        if (case.get("classname"), case.get("name")) == (module, function)
    ]
    if not cases:
        return Verdict(_UNCLEAR, "it did not run")
    failures = [failure for case in cases for failure in case.iter("failure")]
    errors = [error for case in cases for error in case.iter("error")]
    if not failures:
        return Verdict(_UNCLEAR, _said(errors[0])) if errors else Verdict(_REPELLED)
    message, said = str(failures[0].get("message")), _said(failures[0])
    is_assertion = re.match(r"(AssertionError|assert |Failed: DID NOT RAISE)", message)
    # The test's own lines, which are there too, prove nothing.
    explained = "\n".join([message, *(line for line in said.splitlines() if line.startswith("E "))])
    if is_assertion and all(re.search(pattern, explained) for pattern in wanted):
        return Verdict(_SUCCEEDED)
    return Verdict(_UNCLEAR, said)


def _said(element: ElementTree.Element) -> str:
    return f"{element.get('message')}\n{element.text or ''}"


def _tried(weakening: Weakening, options: Sequence[str]) -> dict[str, Verdict]:
    """Run a weakening's tests; return what came of each."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        argv = [sys.executable, "-m", "pytest", "-vv", "--no-report", "--junit-xml", str(report), *options]
        argv += [f"tests/{test}" for test in weakening.seen]
        try:
            done = run(argv, timeout_s=_TEST_S * len(weakening.seen))
        except subprocess.TimeoutExpired:
            return dict.fromkeys(weakening.seen, Verdict(_UNCLEAR, "it did not end"))
        if not report.exists():
            return dict.fromkeys(weakening.seen, Verdict(_UNCLEAR, done.output[-2000:]))
        return {test: judged(report, test, wanted) for test, wanted in weakening.seen.items()}


def selected(entries: Sequence[Entry], wanted: Sequence[str]) -> list[tuple[Entry, Weakening]]:
    """Return some weakenings: by numbers of attacks, by parts of their tests' names; all if nothing is wanted."""
    return [
        (entry, weakening)
        for entry in entries
        for weakening in entry.weakenings
        if not wanted
        or str(entry.number) in wanted
        or any(not word.isdigit() and word in test for word in wanted for test in weakening.seen)
    ]


def main(arguments: Sequence[str]) -> int:
    """Prove the selected tests, weakening by weakening; return 1 unless each succeeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="numbers of attacks, or parts of tests' names")
    chosen = selected([entry for directory in TABLES for entry in load(directory)], parser.parse_args(arguments).only)
    if not chosen:
        raise ProofError("no attack has that number, and no test that name")
    for number in (signal.SIGINT, signal.SIGTERM):  # what runs in the background may have been started to ignore one
        signal.signal(number, _interrupt)
    cluster = LiveCluster()
    weakener = Weakener(cluster)
    outcomes: list[str] = []
    with cluster.state.lock("test --prove"):
        print(f"{'attack':>6}  {'outcome':<9}  {'seconds':>7}  test, and what was weakened", flush=True)
        cluster.wait_until_idle(timeout_s=_START_S)
        for entry, weakening in chosen:
            began = time.monotonic()
            try:
                with weakener.applied(weakening) as options:
                    verdicts = _tried(weakening, options)
            finally:  # what a test that was interrupted leaves would hold up the next deploy
                cluster.cancel_all()
            cluster.wait_until_idle(timeout_s=_START_S)
            seconds = (time.monotonic() - began) / len(verdicts)
            for test, verdict in verdicts.items():
                what = f"{test}: {weakening.name}"
                print(f"{entry.number or '':>6}  {verdict.outcome:<9}  {seconds:>7.1f}  {what}", flush=True)
                print(
                    "".join(f"        | {line}\n" for line in verdict.said.splitlines()[-_LINES:]), end="", flush=True
                )
                outcomes.append(verdict.outcome)
    print(f"{outcomes.count(_SUCCEEDED)} of {len(outcomes)} tests saw what was weakened")
    return 0 if set(outcomes) == {_SUCCEEDED} else 1


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ProofError as error:
        first = error.__context__  # what could not be applied may not be undone either
        sys.exit("\n".join(f"error: {each}" for each in (first, error) if isinstance(each, ProofError)))
    except ClusterError as error:  # somebody else is at work on it
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; what was weakened is mended")
