"""Which services run what was last deployed."""

from types import SimpleNamespace
from typing import Any

import pytest
from docker.errors import APIError

from cfiddle_cluster import services
from cfiddle_cluster.errors import ClusterError

NOW, BEFORE = {"Image": "new"}, {"Image": "old"}


class Swarm:
    """A swarm with two machines, one of them a worker."""

    def __init__(self) -> None:
        self.is_manager = True
        self.api = self
        self.services = SimpleNamespace(list=lambda filters: list(self.found.values()))
        self.found: dict[str, Any] = {}
        self.running: list[dict[str, Any]] = []
        self.machines = [self.machine("head"), self.machine("c1", slurm_worker="true")]

    @staticmethod
    def machine(name: str, state: str = "ready", **labels: str) -> dict[str, Any]:
        spec = {"Labels": labels, "Availability": "active"}
        return {"ID": name, "Description": {"Hostname": name}, "Status": {"State": state}, "Spec": spec}

    def service(self, name: str, mode: dict[str, Any]) -> None:
        placement = {"Constraints": ["node.labels.slurm_worker == true"]}
        spec = {"Mode": mode, "TaskTemplate": {"ContainerSpec": NOW, "Placement": placement}}
        self.found[name] = SimpleNamespace(id=name, name=f"slurm-stack_{name}", attrs={"Spec": spec})

    def task(self, service: str, spec: dict[str, str] = NOW, state: str = "running", node: str = "c1") -> None:
        task = {"ServiceID": service, "NodeID": node, "Spec": {"ContainerSpec": spec}}
        status = {"State": state, "Err": "no such image" if state == "failed" else "", "Message": state}
        self.running.append({**task, "Status": status, "UpdatedAt": "2026"})

    def inspect_swarm(self) -> dict[str, Any]:
        if self.is_manager:
            return {"ID": "swarm-1"}
        raise APIError("This node is not a swarm manager", response=SimpleNamespace(status_code=503))

    def tasks(self, filters: dict[str, str]) -> list[dict[str, Any]]:
        return self.running

    def nodes(self) -> list[dict[str, Any]]:
        return self.machines


@pytest.fixture
def swarm(monkeypatch: pytest.MonkeyPatch) -> Swarm:
    found = Swarm()
    found.service("slurmctld", {"Replicated": {"Replicas": 1}})
    found.service("slurmd", {"Global": {}})
    monkeypatch.setattr(services.engine, "client", lambda: found)
    monkeypatch.setattr(services, "run", lambda _argv, **_: "the last line of its log\n")
    return found


def test_engine_that_is_too_busy_to_say_is_asked_again(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["rpc error: code = DeadlineExceeded desc = context deadline exceeded", "no such node"])

    def unhealthy() -> list[str]:
        raise APIError("refused", explanation=next(said))

    monkeypatch.setattr(services, "unhealthy", unhealthy)
    with pytest.raises(APIError, match="no such node"):
        services.wait_until_healthy(timeout_s=10)


def test_without_a_swarm_there_are_no_services(swarm: Swarm) -> None:
    swarm.is_manager = False
    assert services.services() == []
    assert services.unhealthy() == []


def test_images_that_services_run_and_that_they_start_are_known(swarm: Swarm) -> None:
    spec = swarm.found["slurmd"].attrs["Spec"]["TaskTemplate"]
    spec["ContainerSpec"] = {"Image": "sha256:a", "Env": ["SANDBOX_IMAGE=10.0.0.1:5000/cfiddle-sandbox@sha256:b"]}
    assert services.references() == {"new", "sha256:a", "10.0.0.1:5000/cfiddle-sandbox@sha256:b"}


def test_all_run_what_was_deployed(swarm: Swarm) -> None:
    swarm.task("slurmctld")
    swarm.task("slurmd")
    assert services.unhealthy() == []
    services.wait_until_healthy(timeout_s=0)


@pytest.mark.parametrize(("spec", "state"), [(BEFORE, "running"), (NOW, "starting"), (NOW, "failed")])
def test_an_old_or_a_starting_task_is_not_yet_what_was_deployed(swarm: Swarm, spec: dict[str, str], state: str) -> None:
    swarm.task("slurmctld")
    swarm.task("slurmd", spec, state)
    assert services.unhealthy() == ["slurm-stack_slurmd"]


def test_an_old_task_beside_the_new_one_is_not_yet_replaced(swarm: Swarm) -> None:
    swarm.task("slurmctld")
    swarm.task("slurmctld", BEFORE)
    swarm.task("slurmd")
    assert services.unhealthy() == ["slurm-stack_slurmctld"]


def test_each_worker_that_answers_must_have_its_task(swarm: Swarm) -> None:
    swarm.task("slurmctld")
    swarm.task("slurmd")
    swarm.machines.append(swarm.machine("c2", slurm_worker="true"))
    assert services.unhealthy() == ["slurm-stack_slurmd"]
    swarm.machines[-1]["Status"]["State"] = "down"
    assert services.unhealthy() == []


def test_machines_that_answer_are_those_whose_containers_count(swarm: Swarm) -> None:
    swarm.task("slurmd")
    swarm.task("slurmd", node="c2")
    swarm.task("slurmd", state="shutdown", node="head")
    swarm.machines.append(swarm.machine("c2", state="down", slurm_worker="true"))
    assert services.machines_of("slurmd") == {"c1"}
    assert [task["NodeID"] for task in services.live_tasks()] == ["c1", "head"]
    assert [task["NodeID"] for task in services.running_tasks("slurmd")] == ["c1", "c2"]


def test_error_names_the_service_how_its_tasks_ended_and_its_last_lines(swarm: Swarm) -> None:
    swarm.task("slurmctld")
    swarm.task("slurmd", state="failed")
    with pytest.raises(ClusterError, match=r"slurm-stack_slurmd: .*no such image.*\nthe last line of its log"):
        services.wait_until_healthy(timeout_s=0)


def test_one_service_is_waited_for_whatever_the_others_do(swarm: Swarm) -> None:
    swarm.task("slurmctld")
    services.wait_until_healthy("slurmctld", timeout_s=0)
    with pytest.raises(ClusterError, match="slurm-stack_slurmd"):
        services.wait_until_healthy("slurmd", timeout_s=0)


@pytest.mark.parametrize(
    ("tasks", "stale"),
    [
        ([(NOW, "running")], []),
        ([], ["slurmd"]),
        ([(BEFORE, "running")], ["slurmd"]),
        ([(NOW, "starting")], ["slurmd"]),
        ([(BEFORE, "running"), (NOW, "running")], ["slurmd"]),
    ],
)
def test_a_member_runs_what_was_deployed_alone_and_healthy(
    swarm: Swarm, tasks: list[tuple[dict[str, str], str]], stale: list[str]
) -> None:
    for spec, state in tasks:
        swarm.task("slurmd", spec, state)
    assert services.stale_on("c1", ["slurmd", "agent"]) == stale


def test_newest_running_container_of_a_service(swarm: Swarm) -> None:
    old, new = (SimpleNamespace(attrs={"Created": created}) for created in ("2026-01-01", "2026-01-02"))
    asked: list[dict[str, str]] = []

    def listed(ignore_removed: bool, filters: dict[str, str]) -> list[Any]:
        asked.append(filters)
        return [old, new]

    swarm.containers = SimpleNamespace(list=listed)  # type: ignore[attr-defined]
    assert services.container("slurmctld") is new
    assert asked == [{"label": "com.docker.swarm.service.name=slurm-stack_slurmctld", "status": "running"}]
