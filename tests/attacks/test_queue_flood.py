"""Attack 18: one user queues hundreds of jobs; another's wait is no longer for it."""

from live import LiveCluster, wait_until

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
        before = _waiting(cluster, job)
        one = cluster.sbatch("true", other)
        overtaken = 0
        while f"{one} PENDING" in cluster.queue():
            overtaken = before - _waiting(cluster, job)
            assert overtaken <= len(cluster.workers), "of the flood's tasks started before the other's one job"
    finally:
        cluster.slurm(f"scancel {job}")


def _waiting(cluster: LiveCluster, job: int) -> int:
    """Return how many tasks of a job array wait."""
    return len(cluster.slurm(f"squeue -h -a -r -t PENDING -j {job} -o %i").split())
