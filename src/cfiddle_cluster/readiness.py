"""Ready means that a job ran on each worker and is on record, not that containers are up."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from cfiddle_cluster import slurm
from cfiddle_cluster.calibration import PROGRAM, Identity
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.wait import wait_until, wait_until_none

REGISTER_TIMEOUT_S = 120.0
JOB_TIMEOUT_S = 60.0
RECORD_TIMEOUT_S = 30.0
BUSY_TIMEOUT_S = 600.0
ATTEMPTS = 3


def wait_until_ready(machines: Iterable[Machine]) -> dict[str, Identity]:
    """Wait until a job of the ordinary account `probe` has run on each worker and its record can be read.

    Returns which machine each worker is, by name, as far as a job ran there now.

    A worker whose node is busy or drained takes no such job now: it is ready if it answers and has such a record.

    Args:
        machines: the cluster's machines; those that are no workers are left alone.

    Raises:
        ClusterError: a worker does not register, does not answer, or its job fails or leaves no record.
    """
    names = [machine.name for machine in machines if "worker" in machine.roles]
    wait_until_none(
        lambda: _missing(names),
        timeout_s=REGISTER_TIMEOUT_S,
        what="{} to answer slurmctld",
        remedy="./invoke logs slurmd shows why",
    )
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = dict(zip(names, pool.map(_ensure_proof, names), strict=True))
    return {name: identity for name, identity in found.items() if identity}


def _missing(names: Iterable[str]) -> list[str]:
    nodes = slurm.nodes()
    return [name for name in names if name not in nodes or not nodes[name].is_answering]


def _ensure_proof(name: str) -> Identity | None:
    """Run a job on the worker and return which machine it is, or find that one has run on it."""
    failures: list[ClusterError] = []
    identity: list[Identity] = []

    def is_proven() -> bool:
        if not slurm.nodes()[name].is_idle:
            return _has_record(name)
        try:
            identity.append(_run_job(name))
        except ClusterError as error:
            # Somebody else's job may have come first, or a slurmd that has only just registered was not quite there.
            failures.append(error)
            if len(failures) == ATTEMPTS:
                raise
            return False
        return True

    wait_until(
        is_proven,
        timeout_s=BUSY_TIMEOUT_S,
        interval_s=1,
        what=f"a job of the account probe on {name}, which is busy or drained and has never run one",
        remedy=f"sinfo --list-reasons tells why it takes no job; scontrol update nodename={name} state=resume lets it",
    )
    return identity[0] if identity else None


def _run_job(name: str) -> Identity:
    """Run a job on an idle worker and wait for its record; return which machine it says it is."""
    options = ["--job-name=ready", "--partition=shared", f"--nodelist={name}", "--mem=1"]
    script = f'echo "$SLURMD_NODENAME $SLURM_JOB_ID" && exec {PROGRAM} identity'
    command = [*slurm.SHORT_JOB, *options, "sh", "-c", script]
    said, identity = slurm.slurm(command, user=slurm.PROBE, timeout_s=JOB_TIMEOUT_S).splitlines()
    where, job = said.split()
    if where != name:
        raise ClusterError(f"the job for {name} ran on {where}", "two machines must not have the same name")
    wait_until(
        lambda: f"{job}|COMPLETED" in _records(name, "--jobs", job),
        timeout_s=RECORD_TIMEOUT_S,
        what=f"the record of job {job} on {name} in the accounting",
        remedy="./invoke logs slurmdbd and ./invoke logs mysql show why",
    )
    return Identity(**json.loads(identity))


def _has_record(name: str) -> bool:
    return any(line.endswith("|COMPLETED") for line in _records(name, "--starttime", "2000-01-01"))


def _records(name: str, *which: str) -> list[str]:
    """Return `JOB|STATE` of jobs of `probe` that ran on the node.

    sacct's own --nodelist is not used: it goes by an order of nodes that slurmdbd does not know of dynamic ones.
    """
    options = ["--noheader", "--parsable2", "--allocations", "--format=NodeList,JobID,State", "--user=probe"]
    lines = slurm.slurm(["sacct", *options, *which]).splitlines()
    return [record for node, _, record in (line.partition("|") for line in lines) if node == name]
