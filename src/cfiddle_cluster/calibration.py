"""Calibration: a worker that is slower than its fellows takes no jobs, or a measurement would depend on where it ran.

The program (images/cluster/calibrate.c) runs as a job of the account `probe` on a worker that joined, was restarted or
has another CPU or program than before; ./invoke calibrate runs it on all. What each worker showed is kept in the state.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

from cfiddle_cluster import slurm
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.state import State

RECORDS = "calibration.json"
"""The file of the state that holds each worker's figures."""
PROGRAM = "/usr/local/lib/cfiddle/calibrate"
REASON = "calibration: "
"""What a drain's reason begins with that was made here. Only such a drain is ended here."""

ROUNDS = 2
SIMULATED_ROUNDS = 3
TIMEOUT_S = 60.0
PARALLEL = 8
SIMULATED_SHARE = 3.0
"""How many times the share of a simulated worker's fellows may be its own: they take this machine's CPUs in turns."""

# Where a worker's service runs, past Slurm: a drained node takes no job.
_THERE = f"""
container=$(docker ps --quiet --filter label=com.docker.swarm.service.name=slurm-stack_slurmd)
exec docker exec --user {slurm.PROBE} "$container" {PROGRAM}
"""


@dataclass(frozen=True)
class Identity:
    """Which machine a worker is; equal ones have comparable figures.

    Attributes:
        program: a hash of the program that measures.
        boot: a name that the kernel gave itself when it started.
        model: the CPU's.
    """

    program: str
    boot: str
    model: str


@dataclass(frozen=True)
class Figures(Identity):
    """What a worker showed.

    Attributes:
        cpu_ns, memory_ns: nanoseconds of CPU time for one step of each kernel, the least of its repetitions.
        cpu_median_ns, memory_median_ns: the median of them.
        share: of one CPU, how much the program got.
    """

    cpu_ns: float
    cpu_median_ns: float
    memory_ns: float
    memory_median_ns: float
    share: float

    @property
    def identity(self) -> Identity:
        return Identity(self.program, self.boot, self.model)

    def or_better(self, other: "Figures | None") -> "Figures":
        """Return the better figures of two measurements of one worker."""
        if other is None or other.identity != self.identity:
            return self
        mine, others = asdict(self), asdict(other)
        best = {name: min(mine[name], others[name]) for name in mine if name.endswith("_ns")}
        return Figures(**{**mine, **best, "share": max(self.share, other.share)})


@dataclass(frozen=True)
class Difference:
    """How a worker compares with its fellows.

    Attributes:
        percent: by how much it is slower; negative if it is faster.
        text: the same in words, with the figures.
        is_off: whether that is more than it may be.
    """

    percent: float
    text: str
    is_off: bool


@dataclass(frozen=True)
class Outcome:
    """What came of one worker.

    Attributes:
        name: the worker.
        figures: what is known of it; None if it was never measured.
        difference: how it compares; None without figures, or without a fellow of its CPU model.
        what: what was done, or why it was not measured now.
    """

    name: str
    figures: Figures | None
    difference: Difference | None
    what: str


def ensure_calibrated(
    state: State, workers: Iterable[Machine], identities: Mapping[str, Identity], limit_percent: int
) -> list[Outcome]:
    """Measure the workers that are not the machines that were measured, and drain those that are off.

    Args:
        state: where the figures are kept.
        workers: all of the cluster's.
        identities: which machines they are, by name, as far as it is known.
        limit_percent: by how much one may be slower.

    Returns those that were measured.
    """
    workers = list(workers)
    known = _read(state)
    new = [
        worker
        for worker in workers
        if worker.name in identities
        and (worker.name not in known or known[worker.name].identity != identities[worker.name])
    ]
    return calibrate(state, workers, limit_percent, wanted=new) if new else []


def calibrate(
    state: State, workers: Iterable[Machine], limit_percent: int, *, wanted: Sequence[Machine] | None = None
) -> list[Outcome]:
    """Measure workers, all or those wanted, drain those that are off and resume those that are so no longer.

    What seems off is measured again before it is believed. Simulated workers run one after the other, for they share
    this machine's CPUs, and their fellows are measured again with them.
    """
    workers = list(workers)
    wanted = workers if wanted is None else wanted
    names = {worker.name for worker in workers}
    simulated = any(worker.simulated for worker in workers)
    nodes = slurm.nodes()
    known = {name: figures for name, figures in _read(state).items() if name in names}
    measured: dict[str, Figures] = {}
    suspects = list(wanted)
    for again in range(SIMULATED_ROUNDS if simulated else ROUNDS):
        asked = workers if again and simulated else suspects
        for name, figures in _measure(asked, nodes, at_once=1 if simulated else PARALLEL).items():
            measured[name] = figures.or_better(measured.get(name))
        known |= measured
        suspects = [worker for worker in wanted if worker.name in measured and _is_off(worker, known, limit_percent)]
        if not suspects:
            break
    state.write_json(RECORDS, {name: asdict(figures) for name, figures in known.items()})
    return [_settle(worker, nodes, known, limit_percent, is_new=worker.name in measured) for worker in wanted]


def compare(own: Figures, fellows: Sequence[Figures], *, simulated: bool, limit_percent: int) -> Difference | None:
    """Compare a worker with the median of those of the same CPU model; None where there is none.

    Simulated workers have one memory in common, so what differs there is chance.
    """
    fellows = [other for other in fellows if (other.program, other.model) == (own.program, own.model)]
    if not fellows:
        return None
    limit = 1 + limit_percent / 100
    cpu_ns, memory_ns, share = (
        median(getattr(fellow, name) for fellow in fellows) for name in ("cpu_ns", "memory_ns", "share")
    )
    # How many times as long it takes, how many times that may be, and the figures.
    found = [(own.cpu_ns / cpu_ns, limit, f"a CPU step takes {own.cpu_ns:.3f} ns, theirs {cpu_ns:.3f} ns")]
    if not simulated:
        text = f"a step in memory takes {own.memory_ns:.1f} ns, theirs {memory_ns:.1f} ns"
        found.append((own.memory_ns / memory_ns, limit, text))
    text = f"a program gets {own.share * 100:.0f} % of a CPU, theirs {share * 100:.0f} %"
    found.append((share / own.share, max(limit, SIMULATED_SHARE) if simulated else limit, text))
    times, most, text = max(found, key=lambda entry: entry[0] / entry[1])
    percent = (times - 1) * 100
    slower = f"{abs(percent):.0f} % {'slower' if percent >= 0 else 'faster'} than its fellows"
    return Difference(percent, f"{slower}: {text}", times > most)


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the outcomes as a table for people."""
    rows = [("node", "CPU", "cpu ns", "memory ns", "CPU share", "difference", "")]
    for found in outcomes:
        figures, difference = found.figures, found.difference
        shown = (
            (figures.model, f"{figures.cpu_ns:.3f}", f"{figures.memory_ns:.1f}", f"{figures.share * 100:.0f} %")
            if figures
            else ("", "", "", "")
        )
        compared = f"{difference.percent:+.1f} %" if difference else "no fellow" if figures else ""
        rows.append((found.name, *shown, compared, found.what))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_data(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Return the outcomes as plain data for programs."""
    return [asdict(found) for found in outcomes]


def _is_off(worker: Machine, known: Mapping[str, Figures], limit_percent: int) -> bool:
    difference = _difference(worker, known, limit_percent)
    return difference is not None and difference.is_off


def _difference(worker: Machine, known: Mapping[str, Figures], limit_percent: int) -> Difference | None:
    if worker.name not in known:
        return None
    fellows = [figures for name, figures in known.items() if name != worker.name]
    return compare(known[worker.name], fellows, simulated=worker.simulated, limit_percent=limit_percent)


def _settle(
    worker: Machine, nodes: Mapping[str, slurm.Node], known: Mapping[str, Figures], limit_percent: int, *, is_new: bool
) -> Outcome:
    """Drain or resume a worker as its figures say; return what was done."""
    difference = _difference(worker, known, limit_percent)
    node = nodes.get(worker.name)
    if not is_new or node is None:
        what = "not measured now: " + (node.reason or node.state if node else "Slurm does not know it")
    elif difference and difference.is_off:
        slurm.drain([worker.name], REASON + difference.text)
        what = f"drained: {difference.text}"
    elif _is_ours(node):
        slurm.resume([worker.name])
        what = "resumed"
    else:
        what = ""
    return Outcome(worker.name, known.get(worker.name), difference, what)


def _measure(workers: Sequence[Machine], nodes: Mapping[str, slurm.Node], *, at_once: int) -> dict[str, Figures]:
    """Return what those workers show that can be measured now: idle ones, and ones that were drained here."""
    asked = [worker for worker in workers if worker.name in nodes]
    with ThreadPoolExecutor(max_workers=at_once) as pool:
        found = zip(asked, pool.map(lambda worker: _run(worker, nodes[worker.name]), asked), strict=True)
        return {worker.name: figures for worker, figures in found if figures}


def _run(worker: Machine, node: slurm.Node) -> Figures | None:
    if node.is_idle:
        options = ["--job-name=calibration", "--partition=normal", f"--nodelist={worker.name}"]
        try:
            said = slurm.slurm([*slurm.SHORT_JOB, *options, PROGRAM], user=slurm.PROBE, timeout_s=TIMEOUT_S)
        except ClusterError:
            if slurm.nodes()[worker.name].is_idle:
                raise
            return None  # somebody's job came first
    elif _is_ours(node) and node.state == "drained":
        said = worker.script(_THERE, timeout_s=TIMEOUT_S)
    else:
        return None
    return Figures(**json.loads(said))


def _is_ours(node: slurm.Node) -> bool:
    return node.is_drained and node.is_answering and node.reason.startswith(REASON)


def _read(state: State) -> dict[str, Figures]:
    """Return the figures that are known, by worker; those that another version wrote are not."""
    names = {field.name for field in fields(Figures)}
    kept: dict[str, dict[str, Any]] = state.read_json(RECORDS, {})
    return {name: Figures(**figures) for name, figures in kept.items() if set(figures) == names}
