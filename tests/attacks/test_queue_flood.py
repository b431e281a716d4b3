"""Attack 18: one user queues hundreds of jobs; another's wait is no longer for it."""

import re
from collections.abc import Iterator

import pytest

from cfiddle_cluster.slurm import QOS
from live import LiveCluster, job_name, wait_until

USERS = ("test_user1", "test_user2")
FLOOD = 200


def test_user_who_queues_one_job_waits_for_no_more_than_those_that_run(cluster: LiveCluster) -> None:
    def due() -> dict[str, float]:
        lines = cluster.slurm(f"sshare -n -P -u {','.join(USERS)} -o User,FairShare").splitlines()
        return {user: float(share) for user, share in (line.split("|") for line in lines) if user in USERS}

    # Who has used less of late goes first. Where they are equal, who has queued less does.
    other, flooder = sorted(USERS, key=lambda user: -due()[user])
    job = cluster.sbatch("sleep 1", flooder, f"--array=0-{FLOOD - 1}", "--time=1")
    try:
        wait_until(lambda: _waiting(cluster, job) < FLOOD, timeout_s=30, what="the flood has begun")
        one = cluster.sbatch("true", other)
        before = _waiting(cluster, job)
        overtaken = 0
        while f"{one} PENDING" in cluster.queue():
            overtaken = before - _waiting(cluster, job)
            assert overtaken <= len(cluster.workers), "of the flood's tasks started before the other's one job"
    finally:
        cluster.slurm(f"scancel {job}")


@pytest.fixture
def held(cluster: LiveCluster) -> Iterator[str]:
    """Return the name of jobs of `jovyan` that do not start; they are gone afterwards."""
    name = job_name()
    yield name
    cluster.slurm(f"scancel --user=jovyan --name={name}")


def test_job_cannot_be_put_further_to_the_front_than_it_was(cluster: LiveCluster, held: str) -> None:
    job = cluster.sbatch("true", "jovyan", "--hold", "--nice=100", "-J", held)
    assert _nice(cluster, job) >= 100
    refused = cluster.user(["scontrol", "update", f"jobid={job}", "nice=0"])
    assert refused.exit_status != 0
    assert _nice(cluster, job) >= 100
    cluster.user(["scontrol", "update", f"jobid={job}", "nice=3000"]).ok()
    assert _nice(cluster, job) == 3000


def test_digits_without_end_make_nobody_the_first(cluster: LiveCluster, held: str) -> None:
    nines = "9" * 400
    assert cluster.user(["sbatch", f"--array={nines}-{nines}", "-J", held, "--wrap=true"]).exit_status != 0
    job = cluster.sbatch("true", "jovyan", "--hold", "-J", held)
    assert 0 <= _nice(cluster, job) <= 1000


def test_queue_is_not_closed_to_others_by_one_user_s_jobs(cluster: LiveCluster, held: str) -> None:
    most = int(QOS["normal"]["MaxSubmitJobsPU"])
    arrays = [
        cluster.user(["sbatch", "--hold", "--array=0-999", "-J", held, "--wrap=true"]).exit_status == 0
        for _ in range(most // 1000 + 1)
    ]
    assert arrays == [True] * (most // 1000) + [False]
    accepted = cluster.sbatch("true", USERS[0])
    cluster.wait_for_state(accepted, "COMPLETED")


def _nice(cluster: LiveCluster, job: int) -> int:
    return int(re.findall(r"\bNice=(-?\d+)", cluster.slurm(f"scontrol show job {job}"))[0])


def _waiting(cluster: LiveCluster, job: int) -> int:
    """Return how many tasks of a job array wait."""
    return len(cluster.slurm(f"squeue -h -a -r -t PENDING -j {job} -o %i").split())
