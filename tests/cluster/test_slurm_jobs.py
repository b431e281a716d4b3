"""Slurm as its users meet it: nodes, jobs, records, exclusive and shared machines, privacy, fair share."""

import itertools
import time

import pytest

from live import LiveCluster, job_name, wait_until

USERS = ("jovyan", "test_user1", "test_user2")


def test_sinfo_shows_every_worker_idle(cluster: LiveCluster) -> None:
    text = cluster.user("sinfo -h -p normal -t idle -o %N").ok().strip()
    names = cluster.user(["scontrol", "show", "hostnames", text]).ok().split()
    assert sorted(names) == cluster.workers
    if cluster.config.simulated and len(names) == 2:
        assert text == "c[1-2]"


def test_both_partitions_have_every_node(cluster: LiveCluster) -> None:
    lines = cluster.user("sinfo -h -N -o '%R %N'").ok().split("\n")
    for partition in ("normal", "shared"):
        assert sorted(line.split()[1] for line in lines if line.startswith(partition)) == cluster.workers
    assert cluster.user("sinfo -h -o '%P'").ok().split().count("normal*") == 1


def test_job_runs_on_each_worker_and_has_a_record(cluster: LiveCluster) -> None:
    for worker in cluster.workers:
        job = int(cluster.user(f"srun -w {worker} -J {job_name()} printenv SLURM_JOB_ID").ok())
        record = cluster.wait_for_state(job, "COMPLETED")
        assert (record["nodes"], record["user"], record["exit_code"]) == (worker, "jovyan", "0:0")


def test_exit_status_of_a_job_reaches_its_caller_and_its_record(cluster: LiveCluster) -> None:
    name = job_name()
    result = cluster.user(f"srun -J {name} bash -c 'exit 7'")
    assert result.exit_status == 7
    command = f"sacct -X -n -P --name {name} -o State,ExitCode"
    wait_until(lambda: cluster.user(command).ok().strip() == "FAILED|7:0", timeout_s=30, what="the job's record")


@pytest.mark.parametrize("user", USERS)
def test_user_is_the_same_on_userhost_and_workers(cluster: LiveCluster, user: str) -> None:
    here = cluster.user("id -u; id -g; pwd; echo $HOME $USER", user).ok()
    there = cluster.user(
        f"cd ~ && srun -N{len(cluster.workers)} -l bash -c 'id -u; id -g; pwd; echo $HOME $USER'", user
    ).ok()
    for rank in range(len(cluster.workers)):
        assert "".join(f"{line[3:]}\n" for line in there.splitlines() if line.startswith(f"{rank}: ")) == here


def test_homes_are_the_same_everywhere(cluster: LiveCluster) -> None:
    program = """
    echo from-userhost > .test-home
    srun -N1 -w {worker} bash -c 'cat .test-home; echo from-$(hostname) > .test-home'
    cat .test-home; rm .test-home
    """
    for worker in cluster.workers:
        text = cluster.user(program.format(worker=worker), "test_user1").ok()
        assert text.split() == ["from-userhost", f"from-{worker}"]


def test_normal_partition_gives_whole_machines(cluster: LiveCluster) -> None:
    count = len(cluster.workers) + 2
    stamp = "date +%s.%N >> .test-times-$SLURM_JOB_ID; hostname >> .test-times-$SLURM_JOB_ID"
    jobs = [
        cluster.sbatch(f"cd ~; {stamp}; sleep 1; {stamp}", user, "-n1", "--mem=1")
        for user, _ in zip(itertools.cycle(("test_user1", "test_user2")), range(count))
    ]
    spans: dict[str, list[tuple[float, float]]] = {}
    for job in jobs:
        record = cluster.wait_for_state(job, "COMPLETED")
        home = f"/home/{record['user']}"
        begin, node, end, _ = (
            cluster.user(f"cat {home}/.test-times-{job}; rm {home}/.test-times-{job}", record["user"]).ok().split()
        )
        spans.setdefault(node, []).append((float(begin), float(end)))
    for node, times in spans.items():
        for earlier, later in itertools.pairwise(sorted(times)):
            assert earlier[1] <= later[0], f"two jobs on {node} at once: {earlier}, {later}"
    assert sorted(spans) == cluster.workers


def test_shared_partition_puts_two_users_on_one_machine(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    jobs = [
        cluster.sbatch("sleep 60", user, "-p", "shared", "-n1", "-c1", "--mem=16", "-w", worker)
        for user in ("test_user1", "test_user2")
    ]
    if int(cluster.slurm(f"sinfo -h -n {worker} -p shared -o %c")) > 1:
        wait_until(lambda: {f"{job} RUNNING" for job in jobs} <= set(cluster.queue()), timeout_s=60, what="both run")
    for job in jobs:
        cluster.slurm(f"scancel {job}")


def test_array_job_runs_every_element(cluster: LiveCluster) -> None:
    job = cluster.sbatch(
        "touch ~/.test-array-$SLURM_ARRAY_TASK_ID", "test_user1", "--array=0-4", "-p", "shared", "-c1", "--mem=16"
    )

    def states() -> list[str]:
        text = cluster.user(f"sacct -X -n -P -j {job} -o State", "test_user1").ok()
        return [] if not text else text.split()

    wait_until(lambda: states() == ["COMPLETED"] * 5, timeout_s=90, what="five elements done")
    assert cluster.user("cd ~; ls -d .test-array-*; rm .test-array-*", "test_user1").ok().split() == [
        f".test-array-{i}" for i in range(5)
    ]


def test_job_on_all_workers_at_once(cluster: LiveCluster) -> None:
    text = cluster.user(f"srun -N{len(cluster.workers)} hostname").ok()
    assert sorted(text.split()) == cluster.workers


def test_cancelled_job_ends_soon_and_nothing_of_it_lives(cluster: LiveCluster) -> None:
    mark = job_name()
    stubborn = f"bash -c 'trap \"\" TERM INT HUP; while :; do sleep 1; done' {mark}"
    job = cluster.sbatch(stubborn, "test_user1")
    cluster.wait_until_runs(job)
    node = cluster.slurm(f"squeue -h -j {job} -o %N").strip()
    wait_until(lambda: mark in _processes(cluster, node), timeout_s=20, what="its process is seen")
    cluster.user(f"scancel {job}", "test_user1").ok()
    cluster.wait_for_state(job, "CANCELLED", timeout_s=30)
    wait_until(lambda: mark not in _processes(cluster, node), timeout_s=20, what="its process is gone")


def _processes(cluster: LiveCluster, node: str) -> str:
    return cluster.in_service("slurmd", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '; true", node).ok()


def test_users_see_their_own_jobs_only(cluster: LiveCluster) -> None:
    job = cluster.sbatch("sleep 60", "test_user1")
    cluster.wait_until_runs(job)
    assert cluster.user(f"squeue -h -j {job} -o %i", "test_user1").ok().split() == [str(job)]
    assert str(job) not in cluster.user("squeue -h -a -o %i", "test_user2").ok()
    assert str(job) not in cluster.user("sacct -a -X -n -P -o JobID", "test_user2").output
    assert cluster.user(f"scontrol show job {job}", "test_user2").exit_status != 0
    assert cluster.user(f"scancel {job}", "test_user2").output
    assert f"{job} RUNNING" in cluster.queue()
    cluster.user(f"scancel {job}", "test_user1").ok()


def test_who_used_less_goes_first(cluster: LiveCluster) -> None:
    nodes = f"-N{len(cluster.workers)}"
    users = ("jovyan", "test_user2")

    def shares(column: str) -> dict[str, float]:
        lines = cluster.slurm(f"sshare -n -P -u {','.join(users)} -o User,{column}").splitlines()
        return {user: float(value) for user, value in (line.split("|") for line in lines) if user in users}

    used = shares("RawUsage")
    less, more = sorted(users, key=lambda user: used[user])
    heavy = cluster.sbatch("sleep 5", more, nodes)
    cluster.wait_for_state(heavy, "COMPLETED")

    # Slurm adds up what was used, and says who is due, once a minute.
    def is_known() -> bool:
        due = shares("FairShare")
        return shares("RawUsage")[more] > used[more] and due[more] < due[less]

    wait_until(is_known, timeout_s=150, interval_s=2, what="the usage of the heavy job is known")
    holder = cluster.sbatch("sleep 120", "test_user1", nodes)
    cluster.wait_until_runs(holder)
    second = cluster.sbatch("sleep 2", more, nodes)
    first = cluster.sbatch("sleep 2", less, nodes)
    priorities = dict(line.split() for line in cluster.slurm(f"squeue -h -j {first},{second} -o '%i %Q'").splitlines())
    assert int(priorities[str(first)]) > int(priorities[str(second)]), (used, priorities)
    cluster.slurm(f"scancel {holder}")
    cluster.wait_until_runs(first)
    assert f"{second} PENDING" in cluster.queue()
    for job in (first, second):
        cluster.wait_for_state(job, "COMPLETED")


def test_srun_is_quick(cluster: LiveCluster) -> None:
    times = []
    for _ in range(5):
        start = time.monotonic()
        cluster.user(["srun", "true"]).ok()
        times.append(time.monotonic() - start)
    assert min(times) < 2, times
