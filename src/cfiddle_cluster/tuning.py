"""Set what measurements vary with on real workers: governor, boost, SMT, swap, and whether users may count.

A setting is a file of the kernel's with a value. What one was before its first change is kept in the state, and put
back by `undo`. All is gone after a restart of the machine; doctor says so, and `tune` sets it again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from cfiddle_cluster import facts, slurm, stack
from cfiddle_cluster.config import Config
from cfiddle_cluster.facts import Facts
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.state import State
from cfiddle_cluster.wait import wait_until

SCRIPT = Path(__file__).with_name("tune.sh")
RECORDS = "tuning.json"
"""The file of the state that holds, for each machine, what its settings were."""
REASON = "cfiddle: settings of the machine are being changed"
SET_TIMEOUT_S = 300.0
"""What is in swap may have to be read back."""
EMPTY_TIMEOUT_S = 24 * 3600.0
RETURN_TIMEOUT_S = 120.0

PARANOID = "/proc/sys/kernel/perf_event_paranoid"
_CPU = "/sys/devices/system/cpu"


@dataclass(frozen=True)
class Knob:
    """A kind of setting.

    Attributes:
        kind: its name in TUNE of config.sh.
        pattern: which files it is, * for any part of a name.
        wanted: what it should be.
        meaning: what is so where it is something else; `{}` stands for its value.
        is_unwanted: whether a value is one that measurements vary with.
    """

    kind: str
    pattern: str
    wanted: str
    meaning: str
    is_unwanted: Callable[[str], bool]


# In the order in which they are set: without SMT, files of half the CPUs are gone.
KNOBS = (
    Knob("governor", f"{_CPU}/cpu*/cpufreq/scaling_governor", "performance", "governor {}", "performance".__ne__),
    Knob("boost", f"{_CPU}/cpufreq/boost", "0", "boost on", "1".__eq__),
    Knob("boost", f"{_CPU}/intel_pstate/no_turbo", "1", "boost on", "0".__eq__),
    Knob("swap", "swap:*", "off", "swap on", "on".__eq__),
    # perf_event_open(2): with more than 2, users may not even count what their own programs do.
    Knob("counters", PARANOID, "2", "hardware counters are closed to users", lambda value: int(value) > 2),
    Knob("smt", f"{_CPU}/smt/control", "off", "SMT on", "on".__eq__),
)


@dataclass(frozen=True)
class Change:
    """A setting that is not as it should be.

    Attributes:
        kind: its name in TUNE of config.sh.
        file: the kernel's file, or swap:DEVICE.
        value: what it is.
        wanted: what it should be.
        meaning: that in words.
    """

    kind: str
    file: str
    value: str
    wanted: str
    meaning: str


def unwanted(settings: Mapping[str, str]) -> list[Change]:
    """Return those of a machine's settings that measurements vary with, in the order in which they are to be set."""
    return [
        Change(knob.kind, file, value, knob.wanted, knob.meaning.format(value))
        for knob in KNOBS
        for file, value in settings.items()
        if fnmatchcase(file, knob.pattern) and knob.is_unwanted(value)
    ]


def tune(config: Config, state: State, workers: Iterable[Machine], say: Callable[[str], None]) -> list[str]:
    """Set on each worker what may be set, one after the other, the idle ones first; say what was changed, or why not.

    Returns the names of the workers on which something was changed.

    Raises:
        ClusterError: a worker does not answer, or its jobs do not end.
    """
    wanted: dict[str, list[Change]] = {}
    machines = {}
    for fact in _look(config, workers):
        machines[fact.name] = fact.machine
        found = unwanted(fact.settings)
        wanted[fact.name] = [change for change in found if change.kind in config.tune]
        for meaning in dict.fromkeys(change.meaning for change in found if change.kind not in config.tune):
            say(f"{fact.name}: {meaning}, and stays: TUNE in config.sh does not name it")
        if not found:
            say(f"{fact.name}: all is as it should be")
    changed = [name for name, changes in wanted.items() if changes]
    for name in _idle_first(changed):
        changes = wanted[name]
        with _free_of_jobs(name, say):
            # Before the first change: should this be interrupted, it is known what was.
            before = state.read_json(RECORDS, {})
            before[name] = {**{change.file: change.value for change in changes}, **before.get(name, {})}
            state.write_json(RECORDS, before)
            failed = _set(machines[name], [(change.file, change.wanted) for change in changes])
            _tell(say, name, [(change.file, change.value, change.wanted) for change in changes], failed)
            if any(change.kind == "smt" and change.file not in failed for change in changes):
                _register_again(machines[name])
    return changed


def undo(config: Config, state: State, workers: Iterable[Machine], say: Callable[[str], None]) -> list[str]:
    """Put back what `tune` changed on those workers, likewise; what somebody else changed since then stays.

    Returns the names of the workers on which something was changed.
    """
    before: dict[str, dict[str, str]] = state.read_json(RECORDS, {})
    there = {fact.name: fact for fact in _look(config, workers)} if before else {}
    changed = [name for name in there if before.get(name)]
    for name in _idle_first(changed):
        with _free_of_jobs(name, say):
            failed = _put_back(there[name], before[name], say)
            before = {**before, name: {file: before[name][file] for file in failed}}
            state.write_json(RECORDS, {name: files for name, files in before.items() if files})
    return changed


def _put_back(fact: Facts, before: Mapping[str, str], say: Callable[[str], None]) -> dict[str, str]:
    """Return what could not be put back, and why."""
    # Swap that is off is not listed, and neither are files of CPUs that are off: they are as tune left them.
    kinds = {file: knob for file in before for knob in KNOBS if fnmatchcase(file, knob.pattern)}
    ours = [file for file in before if fact.settings.get(file, kinds[file].wanted) == kinds[file].wanted]
    ours.sort(key=lambda file: KNOBS.index(kinds[file]), reverse=True)
    failed = _set(fact.machine, [(file, before[file]) for file in ours])
    _tell(say, fact.name, [(file, kinds[file].wanted, before[file]) for file in ours], failed)
    if any(kinds[file].kind == "smt" and file not in failed for file in ours):
        _register_again(fact.machine)
    return failed


def _look(config: Config, workers: Iterable[Machine]) -> list[Facts]:
    found = facts.gather(workers, home_root=config.home_root, ports=(), targets=())
    for answer in found:
        if not isinstance(answer, Facts):
            raise answer.error
    return [answer for answer in found if isinstance(answer, Facts)]


def _set(machine: Machine, settings: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Set what can be set; return the others, and why they cannot."""
    words = [word for setting in settings for word in setting]
    lines = machine.script(SCRIPT.read_text(), ["", *words], timeout_s=SET_TIMEOUT_S).splitlines()
    failures = [line.split(" ", 2) for line in lines if line.startswith("failed ")]
    return {file: why for _, file, why in failures}


def _tell(
    say: Callable[[str], None], name: str, settings: Sequence[tuple[str, str, str]], failed: Mapping[str, str]
) -> None:
    """Say what became of each file; those of many CPUs, which differ in their number, in one line."""
    groups: dict[str, int] = {}
    for file, old, new in settings:
        kind = next(knob.pattern for knob in KNOBS if fnmatchcase(file, knob.pattern))
        shown = file if kind.startswith("swap:") else kind
        line = f"{shown} stays {old}: {failed[file]}" if file in failed else f"{shown}: {old} → {new}"
        groups[line] = groups.get(line, 0) + 1
    for line, count in groups.items():
        say(f"{name}: {line}" + (f" ({count} CPUs)" if count > 1 else ""))


@contextmanager
def _free_of_jobs(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Let no job run on a node meanwhile: a measurement must not see its machine change."""
    if not slurm.is_answering():
        yield
        return
    node = slurm.nodes().get(name)
    try:
        if not (node and node.is_drained):
            slurm.drain([name], REASON)
        slurm.wait_until_empty([name], timeout_s=EMPTY_TIMEOUT_S, say=say)
        yield
    finally:
        slurm.resume(name for name, node in slurm.nodes().items() if node.reason == REASON)


def _idle_first(names: Sequence[str]) -> list[str]:
    """Return the nodes, those on which no job runs before the others."""
    nodes = slurm.nodes() if names and slurm.is_answering() else {}
    return sorted(names, key=lambda name: name in nodes and nodes[name].state in slurm.WORKING)


def _register_again(machine: Machine) -> None:
    """Let a worker whose number of CPUs has changed bring itself as a node anew, and its agent count them again."""
    if not slurm.is_answering() or machine.name not in slurm.nodes():
        return
    stack.stop_worker_services(machine)
    slurm.delete_node(machine.name)
    wait_until(
        lambda: machine.name in slurm.nodes() and slurm.nodes()[machine.name].is_answering,
        timeout_s=RETURN_TIMEOUT_S,
        what=f"{machine.name} to come back with another number of CPUs",
        remedy="./invoke logs slurmd shows why it does not",
    )
