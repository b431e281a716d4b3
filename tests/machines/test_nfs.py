"""Point 3: homes over the kernel's NFS: for members alone, not for their root, and with a server that restarts."""

import pytest

from live import wait_until
from machines.real import HOMES, UP_TIMEOUT_S, RealCluster
from machines.virtual import VirtualMachine

MOUNT = "mount -i -t nfs4 -o addr={addr},vers=4.2,soft,timeo=50,retrans=1 {addr}:{path} /mnt"
"""By the kernel alone, so that no machine needs NFS's programs, which bring a server of their own."""


def test_file_of_a_job_is_its_owner_s_everywhere(cluster: RealCluster) -> None:
    job = cluster.sbatch("id -u > where; hostname >> where")
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.user("cat where").ok().split() == ["1000", cluster.workers[0].name]
    assert cluster.user("stat -c %u where").ok().strip() == "1000"
    assert cluster.head.run(f"stat -c %u {HOMES}/jovyan/where").ok().strip() == "1000"
    mounted = cluster.in_service("slurmd", "findmnt -no FSTYPE,OPTIONS /home", cluster.workers[0]).ok()
    assert mounted.startswith("nfs4") and "vers=4.2" in mounted and "hard" in mounted and "nosuid" in mounted


def test_root_of_a_worker_is_nobody_there(cluster: RealCluster) -> None:
    worker = cluster.workers[0]
    slurmd = "docker ps -q --filter label=com.docker.swarm.service.name=slurm-stack_slurmd"
    there = "ls /home/jovyan; touch /home/mine; cp /bin/true /home/jovyan/true"
    said = worker.run(f"docker exec $({slurmd}) sh -c '{there}'").output
    assert said.count("Permission denied") == 3, said


def test_stranger_is_refused(cluster: RealCluster, stranger: VirtualMachine) -> None:
    mount = MOUNT.format(addr=cluster.head.addr, path=HOMES)
    cluster.workers[0].run(f"{mount} && umount /mnt").ok()
    said = stranger.run(mount)
    assert said.exit_status != 0
    assert "follow remote path" in said.output, f"by NFS 4 there is nothing there for it: {said.output}"


def test_only_members_are_told_of_the_export(cluster: RealCluster) -> None:
    exports = cluster.head.run(["exportfs", "-s"]).ok().splitlines()
    members = {cluster.head.addr, *(worker.addr for worker in cluster.workers)}
    assert {line.split()[1].partition("(")[0] for line in exports} == members
    assert all("root_squash" in line and "no_root_squash" not in line for line in exports)


def test_server_that_restarts_delays_a_job_and_loses_nothing(cluster: RealCluster) -> None:
    job = cluster.sbatch("for i in $(seq 60); do echo $i >> lines; sync lines; sleep 1; done", "--open-mode=truncate")
    written = f"wc -l <{HOMES}/jovyan/lines"
    wait_until(lambda: int(cluster.head.run(written).stdout or 0) > 3, timeout_s=60, what="the job writes")
    cluster.head.run("systemctl restart nfs-server").ok()
    cluster.wait_for_state(job, "COMPLETED", timeout_s=300)
    assert cluster.user("cat lines && rm lines").ok().split() == [str(number) for number in range(1, 61)]


@pytest.mark.timeout(3 * UP_TIMEOUT_S)
def test_homes_of_a_server_that_exists_already(cluster: RealCluster, stranger: VirtualMachine) -> None:
    members = [cluster.head.addr, *(worker.addr for worker in cluster.workers)]
    clients = " ".join(f"{addr}(rw,sync,root_squash)" for addr in members)
    install = "apt-get update -q && apt-get install -qy --no-install-recommends nfs-kernel-server"
    stranger.run(install, timeout_s=120).ok()
    for name, uid, gid in (("jovyan", 1000, 100), ("test_user1", 2001, 2001), ("test_user2", 2002, 2002)):
        stranger.run(f"install -d -m 0700 -o {uid} -g {gid} /export/{name}").ok()
    stranger.run(f"echo '/export {clients}' >/etc/exports && exportfs -ra").ok()
    try:
        cluster.settings({"HOME_SERVER": stranger.addr, "HOME_ROOT": "/export"})
        cluster.invoke("up", timeout_s=UP_TIMEOUT_S).ok()
        cluster.wait_for_state(cluster.sbatch("hostname > there"), "COMPLETED")
        assert stranger.run("cat /export/jovyan/there").ok().strip() == cluster.workers[0].name
    finally:
        cluster.settings({"HOME_SERVER": "", "HOME_ROOT": HOMES})
        cluster.invoke("up", timeout_s=UP_TIMEOUT_S).ok()
