"""The services of the stack as they run: what is there, what is healthy, and the containers on this machine."""

import math
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from docker.errors import APIError
from docker.models.containers import Container
from docker.models.services import Service

from cfiddle_cluster import engine
from cfiddle_cluster.commands import docker_cli, run
from cfiddle_cluster.config import STACK
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.wait import PATIENCE, wait_until

START_PERIOD_S = 300
"""Seconds from a container's start in which a health check that fails is not counted: a machine may be busy."""

NAMESPACE = "com.docker.stack.namespace"
"""The label by which Docker marks what belongs to a stack."""

_BUSY = "DeadlineExceeded"
"""What an engine says that gave up its own question to the swarm."""


def health_check() -> dict[str, int]:
    """Return what takes the place of parts of the images' health checks: seconds, and how many may fail in a row.

    Where patience is asked for, a check costs the machine seconds of its CPU, and may come to its end too late.
    """
    found = {"start_period": int(START_PERIOD_S * PATIENCE)}
    if PATIENCE > 1:
        found |= {"interval": int(5 * PATIENCE), "timeout": int(60 * PATIENCE), "retries": int(20 * PATIENCE)}
    return found


def patience() -> dict[str, str]:
    """Return the environment that tells what waits in a container how much longer it may; nothing where it need not."""
    return {"CFIDDLE_PATIENCE": str(math.ceil(PATIENCE))} if PATIENCE > 1 else {}


def services() -> list[Service]:
    """Return the stack's services; none where there is no swarm."""
    if not is_manager():
        return []
    found = engine.client().services.list(filters={"label": f"{NAMESPACE}={STACK}"})
    return sorted(found, key=lambda service: str(service.name))


def references() -> set[str]:
    """Return by what references the services know the images that they run, and those that the agent starts."""
    specs = [service.attrs["Spec"]["TaskTemplate"]["ContainerSpec"] for service in services()]
    given = (variable.partition("=")[2] for spec in specs for variable in spec.get("Env") or [])
    return {*(str(spec["Image"]) for spec in specs), *given}


def container(service: str) -> Container | None:
    """Return the running container of one of the head's services; None if there is none."""
    label = f"com.docker.swarm.service.name={STACK}_{service}"
    running = engine.client().containers.list(ignore_removed=True, filters={"label": label, "status": "running"})
    return max(running, key=lambda found: str(found.attrs["Created"]), default=None)


def scale(service: str, replicas: int) -> None:
    """Have so many containers of one of the head's services."""
    _update(_find(service), mode={"Replicated": {"Replicas": replicas}})


def restart(service: str) -> None:
    """Replace each container of a service by one like it."""
    found = _find(service)
    template = found.attrs["Spec"]["TaskTemplate"]
    _update(found, task_template=template | {"ForceUpdate": template["ForceUpdate"] + 1})


def wait_until_healthy(service: str = "", *, timeout_s: float) -> None:
    """Wait until a service, or every one, runs, healthy, what was last deployed, on every machine that it belongs on.

    Raises:
        ClusterError: one does not; the message says which, and how its last tasks ended.
    """

    def amiss() -> list[str]:
        return [name for name in unhealthy() if service in ("", name.removeprefix(f"{STACK}_"))]

    def is_well() -> bool:
        try:
            return not amiss()
        except APIError as error:
            # An engine that is busy with starting all of them gives up its own questions to the swarm after 20 s.
            if _BUSY in str(error.explanation):
                return False
            raise

    try:
        wait_until(is_well, timeout_s=timeout_s, interval_s=0.5, what="all services healthy")
    except ClusterError as error:
        lines = "\n".join(_describe(name) for name in amiss())
        raise ClusterError(
            f"not all services became healthy within {timeout_s:.0f} s:\n{lines}", "./invoke logs SERVICE shows more"
        ) from error


def unhealthy() -> list[str]:
    """Return the names of the services that do not run everywhere what was last deployed."""
    api = engine.client().api
    tasks = api.tasks(filters={"label": f"{NAMESPACE}={STACK}", "desired-state": "running"})
    return [
        str(service.name)
        for service in services()
        # Swarm calls a task running when its health check has passed.
        if sum(task["Status"]["State"] == "running" and _is_current(task, service) for task in tasks) < _wanted(service)
        or any(task["ServiceID"] == service.id and not _is_current(task, service) for task in tasks)
    ]


def stale_on(node_id: str, names: Collection[str]) -> list[str]:
    """Return those of the named services that do not run on a member of the swarm, healthy, what was last deployed."""
    wanted = {"label": f"{NAMESPACE}={STACK}", "desired-state": "running", "node": node_id}
    tasks = engine.client().api.tasks(filters=wanted)
    return [
        short
        for service in services()
        if (short := str(service.name).removeprefix(f"{STACK}_")) in names
        and [
            _is_current(task, service) and task["Status"]["State"] == "running"
            for task in tasks
            if task["ServiceID"] == service.id
        ]
        != [True]
    ]


def running_tasks(service: str) -> list[dict[str, Any]]:
    """Return the running tasks of one service, on any machine."""
    tasks = engine.client().api.tasks(filters={"service": f"{STACK}_{service}", "desired-state": "running"})
    return [task for task in tasks if task["Status"]["State"] == "running"]


def machines_of(service: str) -> set[str]:
    """Return the names of the machines that answer and on which a container of the service may still run."""
    api = engine.client().api
    names = {
        node["ID"]: str(node["Description"]["Hostname"]) for node in api.nodes() if node["Status"]["State"] == "ready"
    }
    tasks = api.tasks(filters={"service": f"{STACK}_{service}"})
    alive = ("starting", "running")
    return {names[task["NodeID"]] for task in tasks if task["Status"]["State"] in alive and task.get("NodeID") in names}


def live_tasks() -> list[dict[str, Any]]:
    """Return the tasks that may still have a container, on machines that answer."""
    api = engine.client().api
    ready = {node["ID"] for node in api.nodes() if node["Status"]["State"] == "ready"}
    return [task for task in api.tasks(filters={"label": f"{NAMESPACE}={STACK}"}) if task.get("NodeID") in ready]


def is_manager() -> bool:
    """Tell whether this machine's engine manages a swarm."""
    # Not by /info, for which an engine starts runc and others to ask for their versions, each time.
    try:
        engine.client().api.inspect_swarm()
    except APIError as error:
        if error.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
            return False
        raise
    return True


def _find(service: str) -> Service:
    return engine.client().services.get(f"{STACK}_{service}")


def _update(service: Service, **changed: object) -> None:
    """Change this of a service's specification and nothing else, or the next `docker stack deploy` changes it back.

    docker-py's `Service.scale` and `force_update` write an engine's defaults into it, and `docker service update` sorts
    its mounts; either costs a new container.
    """
    spec = service.attrs["Spec"]
    kept = {
        "task_template": spec["TaskTemplate"],
        "name": spec["Name"],
        "labels": spec["Labels"],
        "mode": spec["Mode"],
        "update_config": spec.get("UpdateConfig"),
        "rollback_config": spec.get("RollbackConfig"),
        "endpoint_spec": spec.get("EndpointSpec"),
    }
    engine.client().api.update_service(service.id, service.version, **(kept | changed))


def _wanted(service: Service) -> int:
    """Return how many tasks a service must have: its replicas, or one on each machine with the label that it names."""
    spec = service.attrs["Spec"]
    if "Replicated" in spec["Mode"]:
        return int(spec["Mode"]["Replicated"]["Replicas"])
    constraints = spec["TaskTemplate"]["Placement"]["Constraints"]
    return sum(
        node["Status"]["State"] == "ready"
        and node["Spec"]["Availability"] == "active"
        and all(_meets(node["Spec"].get("Labels") or {}, constraint) for constraint in constraints)
        for node in engine.client().api.nodes()
    )


def _meets(labels: Mapping[str, str], constraint: str) -> bool:
    label, _, value = constraint.replace(" ", "").partition("==")
    return labels.get(label.removeprefix("node.labels.")) == value


def _is_current(task: Mapping[str, Any], service: Service) -> bool:
    wanted = service.attrs["Spec"]["TaskTemplate"]["ContainerSpec"]
    return bool(task["ServiceID"] == service.id and task["Spec"]["ContainerSpec"] == wanted)


def _describe(name: str) -> str:
    """Say of a service what its last tasks and its log say."""
    tasks: Sequence[dict[str, Any]] = engine.client().api.tasks(filters={"service": name})
    tasks = sorted(tasks, key=lambda task: str(task["UpdatedAt"]))[-3:]
    endings = {task["Status"].get("Err") or task["Status"]["Message"] for task in tasks}
    log = run([docker_cli(), "service", "logs", "--raw", "--tail", "5", name], timeout_s=20).strip()
    return f"{name}: {'; '.join(sorted(endings)) or 'no machine has the label that it needs'}" + (
        f"\n{log}" if log else ""
    )
