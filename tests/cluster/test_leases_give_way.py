"""The quality of service `lease`: jobs that hold a machine for many calls, and give way to others' jobs."""

import time

from live import LiveCluster, job_name, wait_until

# What a hop does: TERM lets it finish the call that runs, and go.
HOLD = "trap 'echo got-term; exit 0' TERM; echo holds; while :; do sleep 0.1; done"


def test_a_lease_gives_way_to_another_user_s_job(cluster: LiveCluster) -> None:
    hold = ["srun", f"--nodes={len(cluster.workers)}", "--qos=lease", f"--job-name={job_name()}", "bash", "-c", HOLD]
    lease = cluster.background(hold, "test_user1")
    lease.wait_for_line("holds")
    start = time.monotonic()
    assert cluster.user(["srun", "-J", job_name(), "echo", "ran"], "test_user2", timeout_s=30).ok() == "ran\n"
    assert time.monotonic() - start < 15, "it waited for KILL, which comes 30 s after TERM"
    assert "got-term" in lease.wait(timeout_s=10).output


def test_a_lease_waits_for_an_ordinary_job(cluster: LiveCluster) -> None:
    ordinary = cluster.sbatch("sleep 60", "test_user1", f"--nodes={len(cluster.workers)}")
    cluster.wait_until_runs(ordinary)
    lease = cluster.sbatch("true", "test_user2", "--qos=lease")
    wait_until(lambda: f"{lease} PENDING" in cluster.queue(), timeout_s=10, what="the lease waits")
    assert f"{ordinary} RUNNING" in cluster.queue()
    cluster.slurm(f"scancel {ordinary}")
    cluster.wait_for_state(lease, "COMPLETED")


def test_a_user_has_four_leases_at_once(cluster: LiveCluster) -> None:
    options = ("--qos=lease", "--partition=shared", "--ntasks=1", "--mem=1", "--overcommit")
    jobs = [cluster.sbatch("sleep 60", "test_user1", *options) for _ in range(5)]

    def reasons() -> list[str]:
        return cluster.slurm(f"squeue -h -j {','.join(map(str, jobs))} -o %r").split()

    wait_until(
        lambda: "QOSMaxJobsPerUserLimit" in reasons(), timeout_s=30, what="the fifth waits for its user's others"
    )
    assert reasons().count("QOSMaxJobsPerUserLimit") == 1
    cluster.slurm(f"scancel {' '.join(map(str, jobs))}")


def test_a_lease_of_more_than_an_hour_is_refused(cluster: LiveCluster) -> None:
    result = cluster.user("sbatch --qos=lease --time=61 --wrap=true", "test_user1")
    assert result.exit_status != 0
    assert "QOSMaxWallDurationPerJobLimit" in result.output
