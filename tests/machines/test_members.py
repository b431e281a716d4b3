"""Point 8: workers are added, removed and replaced while jobs run."""

from collections.abc import Iterator

import pytest

from live import wait_until
from machines.real import KNOWN_HOSTS, UP_TIMEOUT_S, RealCluster, let_in
from machines.virtual import Lab, VirtualMachine


@pytest.fixture(scope="module")
def second(lab: Lab, made: tuple[RealCluster, object]) -> Iterator[VirtualMachine]:
    """Return a machine that becomes a worker; afterwards it is none."""
    cluster = made[0]
    machine = lab.machine("c2")
    machine.wait_until_up()
    let_in(cluster.head, machine)
    cluster.head.run(f"ssh-keyscan -t ed25519 {machine.addr} >>{KNOWN_HOSTS}").ok()
    yield machine
    if machine.name in cluster.nodes():
        cluster.invoke(f"remove-worker {machine.name}", timeout_s=UP_TIMEOUT_S).ok()


def exported(cluster: RealCluster, machine: VirtualMachine) -> bool:
    """Return whether homes are exported to a machine."""
    return machine.addr in cluster.head.run(["exportfs", "-s"]).ok()


@pytest.mark.timeout(2 * UP_TIMEOUT_S)
def test_worker_is_added_while_a_job_runs(cluster: RealCluster, second: VirtualMachine) -> None:
    job = cluster.sbatch("sleep 100000", "--time=1-0")
    cluster.wait_for_state(job, "RUNNING")
    cluster.invoke(f"add-worker {second.addr}", timeout_s=UP_TIMEOUT_S).ok()
    assert cluster.state(job) == "RUNNING"
    cluster.slurm(f"scancel {job}")
    cluster.wait_for_state(cluster.sbatch("hostname > where", f"--nodelist={second.name}"), "COMPLETED")
    assert cluster.user("cat where").ok().strip() == second.name
    assert exported(cluster, second)


@pytest.mark.timeout(3 * UP_TIMEOUT_S)
def test_machine_is_replaced_by_another_of_its_name(lab: Lab, cluster: RealCluster, second: VirtualMachine) -> None:
    assert second.name in cluster.nodes()
    second.cut_power()
    second.renew()
    lab.restart(second.name)
    let_in(cluster.head, second)
    said = cluster.invoke("machines")
    assert said.exit_status == 1
    assert "shows another host key" in said.output
    mend = next(line for line in said.output.splitlines() if "ssh-keygen -f" in line)
    cluster.head.run(mend[mend.index("ssh-keygen") :]).ok()
    cluster.head.run(f"ssh-keyscan -t ed25519 {second.addr} >>{KNOWN_HOSTS}").ok()
    cluster.invoke("up", timeout_s=2 * UP_TIMEOUT_S).ok()
    assert sorted(cluster.nodes()) == sorted([cluster.workers[0].name, second.name])
    cluster.wait_for_state(cluster.sbatch("true", f"--nodelist={second.name}"), "COMPLETED")


@pytest.mark.timeout(2 * UP_TIMEOUT_S)
def test_worker_is_removed_when_its_job_has_ended(cluster: RealCluster, second: VirtualMachine) -> None:
    assert second.name in cluster.nodes()
    job = cluster.sbatch("sleep 30; hostname > where", f"--nodelist={second.name}")
    cluster.wait_for_state(job, "RUNNING")
    cluster.invoke(f"remove-worker {second.name}", timeout_s=UP_TIMEOUT_S).ok()
    assert cluster.state(job) == "COMPLETED"
    assert list(cluster.nodes()) == [cluster.workers[0].name]
    wait_until(lambda: not exported(cluster, second), timeout_s=10, what="homes are exported to it no longer")
