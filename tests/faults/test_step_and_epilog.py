"""What grants a job on a worker, or ends it there, fails or hangs: it takes no further job, and the others go on."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from live import LiveCluster, wait_until
from load import Load, Victim

GRANTS = "/run/cfiddle-grants"
HEALTH = "/usr/local/lib/cfiddle/node-health"
EPILOG = "/usr/local/lib/cfiddle/epilog"
VICTIM, *OTHERS = "test_user1", "test_user2", "jovyan"

UNGRANTED = "health check: jobs cannot be granted to their users"
TOLD = ("ConnectionLost", "HopFailed", "JobCancelled", "JobError")
"""What a call is told whose job could not begin."""


@contextlib.contextmanager
def _no_grant_can_be_written(cluster: LiveCluster, worker: str) -> Iterator[None]:
    """Put a full file system over the grants, which slurmd's container alone sees."""
    in_slurmd = ["nsenter", "-m", "-t", _process(cluster, worker)]
    cluster.on_worker(worker, [*in_slurmd, "mount", "-t", "tmpfs", "-o", "size=4k", "none", GRANTS]).ok()
    try:
        cluster.in_service("slurmd", f"head -c 4096 /dev/zero >{GRANTS}/.full", worker).ok()
        yield
    finally:
        cluster.on_worker(worker, [*in_slurmd, "umount", GRANTS]).ok()
        # The epilog did not find those of jobs that have ended meanwhile; the node is drained.
        cluster.in_service("slurmd", f"find {GRANTS} -mindepth 1 -delete", worker).ok()


def _process(cluster: LiveCluster, worker: str) -> str:
    container = cluster.container("slurmd", worker)
    return cluster.on_worker(worker, ["docker", "inspect", "-f", "{{.State.Pid}}", container]).ok().strip()


@contextlib.contextmanager
def _locks_are_held(cluster: LiveCluster, worker: str) -> Iterator[None]:
    """Hold the locks under which these users' jobs begin and end: whoever wants one hangs."""
    for user in OTHERS:
        lock = f"/run/cfiddle-locks/{cluster.ids(user)[0]}"
        cluster.in_service("slurmd", f"flock {lock} sleep 1000 >/dev/null 2>&1 & echo $! >>/tmp/holders", worker).ok()
    try:
        yield
    finally:
        cluster.in_service("slurmd", "for holder in $(cat /tmp/holders); do pkill -P $holder; done", worker).ok()
        cluster.in_service("slurmd", "rm /tmp/holders", worker).ok()


def _epilog_fails(cluster: LiveCluster, worker: str) -> AbstractContextManager[None]:
    return _epilog_then(cluster, worker, "exit 3")


@contextlib.contextmanager
def _epilog_then(cluster: LiveCluster, worker: str, more: str) -> Iterator[None]:
    """Have the epilog do something more when it has done all that it should."""
    program = f"#!/bin/sh\n{EPILOG}.whole\n{more}\n"
    cluster.in_service(
        "slurmd", f"cp {EPILOG} {EPILOG}.whole && printf '{program}' >{EPILOG}.new && chmod 755 {EPILOG}.new", worker
    ).ok()
    cluster.in_service("slurmd", f"mv {EPILOG}.new {EPILOG}", worker).ok()
    try:
        yield
    finally:
        cluster.in_service("slurmd", f"mv {EPILOG}.whole {EPILOG}", worker).ok()


def _state(cluster: LiveCluster, worker: str) -> str:
    return cluster.slurm(f"sinfo -h -N -p normal -n {worker} -o '%T %E'").strip()


@pytest.mark.parametrize(
    ("fault", "reason", "lost"),
    [
        (_no_grant_can_be_written, UNGRANTED, 1),
        pytest.param(_locks_are_held, UNGRANTED, 1, marks=pytest.mark.slow),
        (_epilog_fails, "Epilog error", 0),
    ],
    ids=["step fails", "step hangs", "epilog fails"],
)
def test_worker_takes_no_further_job_and_others_go_on(
    cluster: LiveCluster, fault: Callable[[LiveCluster, str], AbstractContextManager[None]], reason: str, lost: int
) -> None:
    worker = cluster.workers[0]
    kinds = {"chains": 3, "leases": 0, "executors": 0}
    with Victim(cluster, worker, VICTIM) as victim, Load(cluster, users=OTHERS, **kinds) as load:
        with fault(cluster, worker):
            victim.program.kill()
            drained = f"drained {reason}"
            wait_until(lambda: _state(cluster, worker) == drained, timeout_s=90, what=f"{worker} is drained")
            load.wait_for_results(5)
            assert _state(cluster, worker) == drained
            errors = load.errors()
            assert len(errors) == lost, errors
            assert all(error.outcome in TOLD for error in errors), errors
        if reason == UNGRANTED:
            cluster.in_service("slurmd", HEALTH, worker).ok()  # as Slurm does every minute
        else:
            cluster.slurm(f"scontrol update nodename={worker} state=resume")
        wait_until(lambda: cluster.nodes()[worker] in ("allocated", "mixed"), timeout_s=90, what=f"{worker} has jobs")
        load.wait_for_results(3)
        load.stop()
        assert len(load.errors()) == lost, load.errors()


@pytest.mark.slow
def test_epilog_that_hangs_holds_its_machine_and_no_other(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    hanging = "sleep 987"
    kinds = {"chains": 3, "leases": 0, "executors": 0}
    with Victim(cluster, worker, VICTIM) as victim, Load(cluster, users=OTHERS, **kinds) as load:
        with _epilog_then(cluster, worker, f"exec {hanging}"):
            victim.program.kill()
            hangs = f"pgrep -xf '{hanging}'"
            wait_until(
                lambda: cluster.in_service("slurmd", hangs, worker).exit_status == 0, timeout_s=60, what="it hangs"
            )
            load.wait_for_results(5)
            assert _state(cluster, worker).split()[0] in ("completing", "allocated"), "its job is not over for Slurm"
            assert cluster.slurm(f"squeue -h -w {worker} -t running").strip() == ""
            cluster.in_service("slurmd", f"pkill -xf '{hanging}'", worker).ok()
            wait_until(lambda: "Epilog error" in _state(cluster, worker), timeout_s=60, what=f"{worker} is drained")
        cluster.slurm(f"scontrol update nodename={worker} state=resume")
        load.wait_for_results(3)
        load.stop()
        assert not load.errors(), load.errors()
