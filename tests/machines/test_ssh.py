"""Point 2: who logs in and how, keys of machines that are unknown or changed, and machines that are down."""

from collections.abc import Iterator

import pytest

from machines.real import KNOWN_HOSTS, UP_TIMEOUT_S, RealCluster, Record
from machines.virtual import NETWORK, VirtualMachine

NOBODY = f"{NETWORK}.99"
"""An address among the machines that none has."""


@pytest.fixture
def worker(cluster: RealCluster) -> Iterator[VirtualMachine]:
    """Return a worker; afterwards the head knows its key and its SSH settings as before, and no connection is kept."""
    head = cluster.head
    head.run(f"cp {KNOWN_HOSTS} /root/known && cp cfiddle-cluster/config.sh /root/config.before").ok()
    forget_connections(cluster)
    yield cluster.workers[0]
    head.run(f"cp /root/known {KNOWN_HOSTS} && cp /root/config.before cfiddle-cluster/config.sh").ok()
    forget_connections(cluster)


def forget_connections(cluster: RealCluster) -> None:
    """End the connections that the administrator's commands share for a minute."""
    cluster.head.run("for c in /var/lib/cfiddle-cluster/ssh/control-*; do ssh -O exit -o ControlPath=$c x; done; true")


def test_unknown_host_key_is_shown_and_asked_about_once(cluster: RealCluster, record: Record) -> None:
    for machine in cluster.workers:
        shown = machine.run("ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub").ok().split()[1]
        assert record.asked.count(shown) == 1
    assert record.asked.count("(yes/no/[fingerprint])?") == len(cluster.workers)


def test_host_keys_are_kept_in_a_file_of_the_cluster_s_own(cluster: RealCluster) -> None:
    for machine in cluster.workers:
        cluster.head.run(["ssh-keygen", "-F", machine.addr, "-f", KNOWN_HOSTS]).ok()
    assert cluster.head.run("cat /root/.ssh/known_hosts").exit_status != 0


def test_unknown_host_key_is_refused_where_nobody_can_be_asked(cluster: RealCluster, worker: VirtualMachine) -> None:
    cluster.head.run(["ssh-keygen", "-R", worker.addr, "-f", KNOWN_HOSTS]).ok()
    said = cluster.invoke("machines")
    assert said.exit_status == 1
    assert f"the host key of {worker.addr} is not known yet" in said.output


def test_changed_host_key_is_refused_with_the_mend(cluster: RealCluster, worker: VirtualMachine) -> None:
    worker.run("cd /etc/ssh && mkdir before && mv ssh_host_* before && ssh-keygen -qA && systemctl restart ssh").ok()
    try:
        said = cluster.invoke("machines")
        assert said.exit_status == 1
        assert f"{worker.addr} shows another host key than the known one" in said.output
        mend = next(line for line in said.output.splitlines() if "ssh-keygen -f" in line)
        cluster.head.run(mend[mend.index("ssh-keygen") :]).ok()
        assert "is not known yet" in cluster.invoke("machines").output
    finally:
        worker.run("cd /etc/ssh && rm ssh_host_* && mv before/* . && rmdir before && systemctl restart ssh").ok()


def test_user_with_sudo_does_as_root_does(cluster: RealCluster, worker: VirtualMachine) -> None:
    worker.run(
        "useradd -m teacher && cp -r .ssh /home/teacher/ && chown -R teacher: /home/teacher/.ssh"
        " && echo 'teacher ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/teacher"
    ).ok()
    try:
        cluster.settings({"SSH_USER": "teacher"})
        cluster.invoke("machines").ok()
        worker.run("echo 'teacher ALL=(ALL) ALL' >/etc/sudoers.d/teacher").ok()
        said = cluster.invoke("machines")
        assert said.exit_status == 1
        assert "cannot become root" in said.output
    finally:
        forget_connections(cluster)
        worker.run("rm /etc/sudoers.d/teacher; pkill -u teacher; userdel -r teacher")


def test_key_of_a_file(cluster: RealCluster, worker: VirtualMachine) -> None:
    cluster.head.run("mv .ssh/id_ed25519 elsewhere").ok()
    try:
        said = cluster.invoke("machines")
        assert said.exit_status == 1
        assert f"{worker.addr} does not let root@{worker.addr} in" in said.output
        cluster.settings({"SSH_KEY": "/root/elsewhere"})
        cluster.invoke("machines").ok()
    finally:
        cluster.head.run("mv elsewhere .ssh/id_ed25519").ok()


def test_key_of_an_agent(cluster: RealCluster, worker: VirtualMachine) -> None:
    cluster.head.run("mv .ssh/id_ed25519 elsewhere").ok()
    try:
        cluster.head.run(f"ssh-agent sh -c 'ssh-add elsewhere && {cluster.command('machines')}'", timeout_s=120).ok()
    finally:
        cluster.head.run("mv elsewhere .ssh/id_ed25519").ok()


@pytest.mark.usefixtures("worker")
def test_machine_that_is_down_is_named_and_the_others_go_on(cluster: RealCluster) -> None:
    job = cluster.sbatch("sleep 5")
    cluster.settings({"WORKER_ADDRS": " ".join([*(machine.addr for machine in cluster.workers), NOBODY])})
    said = cluster.invoke("up", timeout_s=UP_TIMEOUT_S)
    assert said.exit_status == 1
    assert f"left out: {NOBODY} cannot be reached by SSH" in said.output
    assert "a job on each worker" in said.output
    assert "this brings in who was left out: ./invoke up" in said.output.splitlines()[-1]
    cluster.wait_for_state(job, "COMPLETED")
    assert set(cluster.nodes()) >= {machine.name for machine in cluster.workers}
