"""A load for tests of faults: calls of several users, most of them queued, and the proof of how each of them ended."""

import itertools
import json
import re
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from live import PATIENCE, Background, LiveCluster, wait_until

USERS = ("jovyan", "test_user1", "test_user2")
FINAL = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)

PROGRAM = """
import itertools, json, signal, sys, threading, time
from delegate_function import DelegateChain, DelegateFunctionException, Executor, SandboxDelegate, SlurmDelegate, lease

def work(number, seconds):
    time.sleep(seconds)
    return number

class Task:
    def run(self, number, seconds):
        return work(number, seconds)

stop = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: stop.set())
lock = threading.Lock()
numbers = itertools.count()

def say(**what):
    with lock:
        print(json.dumps(what), flush=True)

def begin():
    with lock:
        number = next(numbers)
    say(begun=number)
    return number, time.monotonic()

def end(kind, number, began, ask):
    known, text = None, ""
    try:
        value, known = ask()
        outcome = "result" if value == number else f"wrong result {value!r}"
    except DelegateFunctionException as error:
        outcome, text, known = type(error).__name__, str(error), error.call
    except BaseException as error:
        outcome, text = "untyped", repr(error)
    job = known.job_id if known else None
    say(ended=number, kind=kind, outcome=outcome, text=text, job=job, seconds=time.monotonic() - began)

def call(kind, delegate):
    number, began = begin()
    end(kind, number, began, lambda: (delegate.invoke(Task(), "run", number, 0.1), delegate.last_call))

def chain():
    while not stop.is_set():
        call("chain", DelegateChain(SlurmDelegate, SandboxDelegate)())

def leases():
    while not stop.is_set():
        with lease(seconds=120, idle_s=5) as held:
            while not stop.is_set() and not held.is_over:
                call("lease", held)

def futures():
    with Executor(max_workers=1) as executor:
        while not stop.is_set():
            begun = [begin() for _ in range(3)]
            asked = [(*one, executor.submit(work, one[0], 0.1)) for one in begun]
            for number, began, future in asked:
                end("future", number, began, lambda: (future.result(), future.call))

kinds = chain, leases, futures
threads = [threading.Thread(target=kind) for kind, count in zip(kinds, sys.argv[1:]) for _ in range(int(count))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
say(all=next(numbers))
"""


SLEEPER = """
import os, sys, time
from delegate_function import DelegateFunctionException, SandboxDelegate, SlurmDelegate

class Sleeper:
    def run(self):
        print("begun", flush=True)
        time.sleep(1000)

delegate = SlurmDelegate(SandboxDelegate(), nodelist=sys.argv[1])
try:
    delegate.invoke(Sleeper(), "run")
except DelegateFunctionException as error:
    print("told", error.call.job_id, type(error).__name__, str(error).replace(chr(10), " "), flush=True)
"""


@dataclass(frozen=True)
class Call:
    """How one call ended.

    Attributes:
        outcome: "result", or the class of the error.
        at: when it ended, by time.monotonic().
    """

    user: str
    number: int
    kind: str
    outcome: str
    text: str
    job: str | None
    seconds: float
    at: float


class Load:
    """Programs of several users that make call after call, several at once, until they are told to stop."""

    def __init__(
        self,
        cluster: LiveCluster,
        *,
        users: Sequence[str] = USERS,
        chains: int = 3,
        leases: int = 1,
        executors: int = 1,
    ) -> None:
        """Start it, and wait until every worker has a job and others wait for one."""
        self._cluster = cluster
        self.since = time.time()
        self._first_job = cluster.next_job()
        argv = ["python3", "-c", PROGRAM, str(chains), str(leases), str(executors)]
        self.programs = {user: cluster.background(argv, user) for user in users}
        wait_until(self._is_on, timeout_s=60, what="each worker has a job, and others wait")
        wait_until(lambda: self.calls(), timeout_s=60, what="a first call has ended")

    def _is_on(self) -> bool:
        states = [line.split()[1] for line in self._cluster.queue()]
        return states.count("RUNNING") >= len(self._cluster.workers) and states.count("PENDING") > len(self.programs)

    def calls(self) -> list[Call]:
        """Return the calls that have ended so far, in that order."""
        found = [
            Call(user, said["ended"], said["kind"], said["outcome"], said["text"], said["job"], said["seconds"], at)
            for user, program in self.programs.items()
            for at, said in _said(program)
            if "ended" in said
        ]
        return sorted(found, key=lambda call: call.at)

    def errors(self) -> list[Call]:
        """Return the calls that have ended otherwise than with their result."""
        return [call for call in self.calls() if call.outcome != "result"]

    def wait_for_results(self, count: int, *, timeout_s: float = 120) -> None:
        """Wait until so many more calls than by now have ended with their result."""

        def results() -> int:
            return sum(call.outcome == "result" for call in self.calls())

        wanted = results() + count
        wait_until(lambda: results() >= wanted, timeout_s=timeout_s, what=f"{count} more results")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Kill what still runs of it."""
        for program in self.programs.values():
            program.end()

    def stop(self, *, timeout_s: float = 120) -> list[Call]:
        """Let the calls that are under way end, begin no further one, and prove that all is as it should be.

        Every call ended in exactly one result or one typed error; no sandbox is left without a job; no two jobs were
        on one machine at a time; each job has one record.
        """
        for program in self.programs.values():
            program.kill(signal.SIGUSR1)
        for user, program in self.programs.items():
            result = program.wait(timeout_s=timeout_s)
            assert result.exit_status == 0, f"the calls of {user}: {result.stdout[-2000:]}"
            _each_ended_once(user, [said for _, said in _said(program)])
        self._cluster.wait_until_idle(timeout_s=120)
        calls = self.calls()
        jobs = range(self._first_job, self._cluster.next_job())
        assert {int(call.job) for call in calls if call.job} <= set(jobs)
        each_has_one_record(self._cluster, jobs, self.since)
        self._no_two_jobs_on_one_machine()
        return calls

    def _no_two_jobs_on_one_machine(self) -> None:
        for worker in self._cluster.workers:
            served = sorted(self._cluster.served(worker, self.since))
            for earlier, later in itertools.pairwise(served):
                assert earlier.job == later.job or earlier.end < later.begin + 0.2 * PATIENCE, (worker, earlier, later)


def each_has_one_record(cluster: LiveCluster, jobs: range, since: float) -> None:
    """Prove that each of these jobs, none of which is older than `since`, has one accounting record, a final one."""
    # One that is asked for by its number would be found by its time alone.
    start = datetime.fromtimestamp(since - 1).strftime("%Y-%m-%dT%H:%M:%S")

    def records() -> dict[int, list[str]]:
        found = defaultdict(list)
        text = cluster.slurm(f"TZ=UTC sacct -a -X -D -n -P -S {start} -o JobID,State")
        for job, state in (line.split("|") for line in text.splitlines()):
            if job.isdigit() and int(job) in jobs:
                found[int(job)].append(state.split()[0])
        return found

    def are_final() -> bool:
        found = records()
        return set(found) == set(jobs) and all(state in FINAL for states in found.values() for state in states)

    wait_until(are_final, timeout_s=60, interval_s=1, what="each job has a final record")
    twice = {job: states for job, states in records().items() if len(states) > 1}
    assert not twice, f"more than one record: {twice}"


def _said(program: Background) -> Iterator[tuple[float, dict[str, Any]]]:
    for at, line in list(program.arrivals):
        if line.startswith("{"):
            yield at, json.loads(line)


def _each_ended_once(user: str, said: list[dict[str, Any]]) -> None:
    begun = Counter(line["begun"] for line in said if "begun" in line)
    ended = Counter(line["ended"] for line in said if "ended" in line)
    assert begun == ended == Counter(range(said[-1]["all"])), f"{user}: {begun - ended}, {ended - begun}"
    strange = [line for line in said if "ended" in line and not re.fullmatch("result|[A-Z][A-Za-z]+", line["outcome"])]
    assert not strange, f"{user}: {strange}"


class Victim:
    """A call that runs on a worker until something ends it."""

    def __init__(self, cluster: LiveCluster, worker: str, user: str = "test_user1") -> None:
        """Start it, and wait until it runs."""
        self.program = cluster.background(["python3", "-c", SLEEPER, worker], user)
        self.program.wait_for_line("^begun")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.program.end()

    def told(self, *, timeout_s: float) -> tuple[int, str, str]:
        """Return its job, the class of its error and the error's text; there must be one within that time."""
        line = self.program.wait_for_line("^told", timeout_s=timeout_s)
        assert self.program.wait(timeout_s=20).exit_status == 0
        _, job, kind, text = line.split(maxsplit=3)
        return int(job), kind, text
