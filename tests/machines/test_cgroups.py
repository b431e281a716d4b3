"""Point 4: cgroup v2. Limits hold, what daemonises dies with its job, and attacks on the kernel fail here too."""

import shlex

import pytest

from live import wait_until
from machines.real import RealCluster

ATTACK_TIMEOUT_S = 300
ATTACKS = (
    "test_sandbox.py::test_call_sees_a_sandbox_around_it",
    "test_sandbox.py::test_every_way_out_is_closed",
    "test_left_behind.py",
    "test_docker_socket.py",
    "test_other_users.py",
    "test_output_files.py",
    "test_containers.py -k 'links_in_a_home or inside_is or set_uid or is_reached or left_for or fork_bomb or disk_of'",
    "test_homes.py::test_user_has_no_port_that_servers_trust",
)
"""Those of tests/attacks in which the kernel is what holds the enemy, and no speed is judged."""

SLEEPER = """
import time
from delegate_function import SandboxDelegate, SlurmDelegate
class Sleeper:
    def run(self):
        print("begun", flush=True)
        time.sleep(300)
SlurmDelegate(SandboxDelegate(memory_mb=151)).invoke(Sleeper(), "run")
"""
LIMITS = r"""
for container in $(docker ps -q --no-trunc --filter label={label}); do
    cd "$(find /sys/fs/cgroup -type d -name "*$container*" | head -n1)" || exit
    paste -d' ' memory.max memory.swap.max pids.max
done
"""
DAEMON = "setsid --fork sh -c 'trap \"\" TERM HUP; setsid --fork sleep 4000; sleep 4000' </dev/null >/dev/null 2>&1"


def test_engines_use_cgroup_v2_by_systemd(cluster: RealCluster) -> None:
    for machine in (cluster.head, *cluster.workers):
        assert machine.run("docker info --format '{{.CgroupVersion}} {{.CgroupDriver}}'").ok().split() == [
            "2",
            "systemd",
        ]


def test_limits_of_a_call_are_its_sandbox_s_cgroup_s(cluster: RealCluster) -> None:
    worker = cluster.workers[0]
    cluster.user(f"python3 -c {shlex.quote(SLEEPER)} </dev/null >/dev/null 2>&1 &").ok()
    try:

        def limits() -> list[list[str]]:
            said = worker.run(LIMITS.replace("{label}", "cfiddle.sandbox")).output
            return [line.split() for line in said.splitlines() if line.startswith(f"{151 << 20} ")]

        [[_, swap, processes]] = wait_until(limits, timeout_s=60, what="a sandbox with the call's memory")
        assert swap == "0"
        assert processes.isdigit()
    finally:
        cluster.slurm("scancel --user=jovyan")


def test_limits_of_a_container_are_its_cgroup_s(cluster: RealCluster) -> None:
    worker = cluster.workers[0]
    cluster.user("cm run --cmd true").ok()
    try:
        found = worker.run(LIMITS.replace("{label}", "cfiddle.container")).ok().split()
        assert len(found) == 3
        assert all(value.isdigit() for value in (found[0], found[2])), found
    finally:
        cluster.user("cm stop && cm delete").ok()


def test_processes_that_daemonise_die_with_their_job(cluster: RealCluster) -> None:
    worker = cluster.workers[0]
    mine = "pgrep -u 1000 -fa 'sleep 4000'"
    job = cluster.sbatch(f"{DAEMON}; sleep 600")
    wait_until(lambda: worker.run(mine).stdout.count("sleep 4000") >= 2, timeout_s=60, what="the daemons run")
    cluster.slurm(f"scancel {job}")
    wait_until(lambda: not worker.run(mine).stdout, timeout_s=30, what="they are gone")


def test_job_that_daemonises_and_ends_leaves_nothing(cluster: RealCluster) -> None:
    worker = cluster.workers[0]
    job = cluster.sbatch(f"{DAEMON}; sleep 1")
    cluster.wait_for_state(job, "COMPLETED")
    wait_until(lambda: not worker.run("pgrep -u 1000").stdout, timeout_s=30, what="nothing of the user's runs")


@pytest.mark.timeout(ATTACK_TIMEOUT_S)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.split()[0])
def test_attack_is_repelled_here_too(cluster: RealCluster, attack: str) -> None:
    said = cluster.pytest(f"--real-machines tests/attacks/{attack}", timeout_s=ATTACK_TIMEOUT_S)
    assert said.exit_status == 0, said.output[-3000:]
