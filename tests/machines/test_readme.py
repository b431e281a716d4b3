"""Point 1: README's chapter for real machines, as it is written; what it promises of the machines holds."""

import pytest

from machines.real import ACCOUNTS, CARRIED, HOMES, IMAGE_FILE, UP_TIMEOUT_S, RealCluster, Record


@pytest.mark.timeout(1200)
def test_job_has_run_on_each_worker(cluster: RealCluster) -> None:
    proven = cluster.slurm("sacct -X -n -P -u probe -S 2000-01-01 -o NodeList,State").split()
    assert {f"{worker.name}|COMPLETED" for worker in cluster.workers} <= set(proven)


def test_engine_is_installed_where_there_was_none(cluster: RealCluster) -> None:
    for machine in (cluster.head, *cluster.workers):
        assert machine.run("dpkg-query -W -f '${db:Status-Abbrev}' docker.io").ok().strip() == "ii"
        assert machine.run("systemctl is-enabled docker && systemctl is-active docker").ok().split()[-1] == "active"


def test_accounts_and_homes_of_the_machines_are_not_touched(cluster: RealCluster, record: Record) -> None:
    for machine in (cluster.head, *cluster.workers):
        now = machine.run(ACCOUNTS).ok()
        assert record.before[machine.name].startswith(now)


def test_call_in_a_sandbox_returns_its_value(cluster: RealCluster) -> None:
    assert cluster.call_in_sandbox() == "42"


def test_image_that_is_missing_is_loaded_from_a_file(cluster: RealCluster) -> None:
    listed = f"docker image ls --format '{{{{.Repository}}}}:{{{{.Tag}}}}' cfiddle-{CARRIED}"
    image = cluster.head.run(listed).ok()
    cluster.head.run(f"docker image rm {image}").ok()
    assert not cluster.head.run(listed).ok()
    cluster.invoke(f"load-images /mnt/{IMAGE_FILE}").ok()
    assert cluster.head.run(listed).ok() == image


@pytest.mark.timeout(UP_TIMEOUT_S)
def test_second_up_changes_nothing(cluster: RealCluster) -> None:
    def seen() -> str:
        # No service's version: `docker stack deploy` counts it on where nothing has changed.
        services = "docker ps -q --no-trunc --filter label=com.docker.swarm.service.id | sort"
        there = [cluster.head.run(f"{services}; docker node ls -q; exportfs -s").ok()]
        return "\n".join(there + [worker.run(services).ok() for worker in cluster.workers])

    before = seen()
    cluster.invoke("up", timeout_s=UP_TIMEOUT_S).ok()
    assert seen() == before


def test_doctor_finds_nothing_that_must_be_mended(cluster: RealCluster) -> None:
    assert cluster.invoke("doctor").exit_status == 0


def test_homes_are_on_the_head_for_their_owners_alone(cluster: RealCluster) -> None:
    assert cluster.head.run(f"stat -c '%u %a' {HOMES}/jovyan").ok().split() == ["1000", "700"]
