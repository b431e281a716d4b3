"""What the cluster is doing, in one table; also where there is no cluster, or one that another checkout made."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import docker.errors
import requests.exceptions

from cfiddle_cluster import engine, images, registry, services, slurm, userhost
from cfiddle_cluster.config import LABEL, STACK, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import State

MACHINE_PREFIX = "cfiddle-machine-"
MOST_JOBS = 20

# Which image each service runs from; the sandbox's is in the agent's environment.
_IMAGE_OF = {
    "mysql": "mysql",
    "slurmdbd": "cluster",
    "slurmctld": "cluster",
    "slurmd": "cluster",
    "agent": "agent",
    "userhost": "user",
    "registry": "registry",
}
# What the agent makes containers of, by the setting that tells it which.
_IN_THE_AGENT = {"SANDBOX_IMAGE": "sandbox", "COMPILER_IMAGE": "compiler", "TASK_IMAGE": "task"}


def main(config: Config, state: State, *, as_json: bool = False) -> int:
    """Print the status; return 0, or 1 where something that should run does not."""
    found = collect(config, state)
    print(json.dumps(found, indent=2) if as_json else text(found))
    return 0 if found["well"] or not found["services"] else 1


def collect(config: Config, state: State) -> dict[str, Any]:
    """Return the status: machines, services, nodes, queue, images, and the address of JupyterLab."""
    found: dict[str, Any] = {
        "machines": [],
        "services": [],
        "nodes": [],
        "queue": [],
        "images": [],
        "jupyter": "",
        "well": False,
    }
    try:
        engine.client().ping()
    except (docker.errors.DockerException, requests.exceptions.RequestException, ClusterError):
        return found | {"engine": "no Docker Engine runs on this machine"}
    found["engine"] = str(engine.client().info()["ServerVersion"])
    found["machines"] = _machines()
    found["services"] = _services()
    found["images"] = _images(config)
    if found["services"]:
        found["jupyter"] = userhost.address(config)
    if services.container("slurmctld") and slurm.is_answering():
        found["nodes"] = [
            {"name": node.name, "state": node.state, "answers": node.is_answering, "reason": node.reason}
            for node in slurm.nodes().values()
        ]
        found["queue"] = [
            {
                "id": job.id,
                "user": job.user,
                "partition": job.partition,
                "state": job.state,
                "elapsed": job.elapsed,
                "nodes": job.nodes,
            }
            for job in slurm.jobs()
        ]
    found["well"] = bool(
        found["services"]
        and all(service["running"] >= service["wanted"] for service in found["services"])
        and found["nodes"]
        and all(node["answers"] for node in found["nodes"])
    )
    return found


def text(found: Mapping[str, Any]) -> str:
    """Return the status as a table."""
    rows: list[tuple[str, ...]] = []
    for machine in found["machines"]:
        rows.append(
            (
                "machine",
                machine["name"],
                machine["state"],
                f"{machine['role']} {machine['address']} {machine['engine']}".strip(),
            )
        )
    for service in found["services"]:
        rows.append(("service", service["name"], f"{service['running']} of {service['wanted']}", service["trouble"]))
    for node in found["nodes"]:
        rows.append(
            ("node", node["name"], node["state"] if node["answers"] else f"{node['state']}, no answer", node["reason"])
        )
    for job in found["queue"][:MOST_JOBS]:
        rows.append(
            (
                "job",
                job["id"],
                job["state"].lower(),
                f"{job['user']} {job['partition']} {job['elapsed']} {job['nodes']}".strip(),
            )
        )
    if len(found["queue"]) > MOST_JOBS:
        rows.append(
            ("job", "…", "", f"{len(found['queue']) - MOST_JOBS} more; ./invoke shell --command squeue shows one's own")
        )
    for image in found["images"]:
        rows.append(("image", image["name"], image["state"], image["built"]))
    lines = _aligned(rows) if rows else []
    if not found["services"]:
        said = found["engine"] if found["engine"].startswith("no ") else "the cluster does not run"
        lines.append(f"{said}; ./invoke up starts it")
    elif found["jupyter"]:
        lines.append(f"JupyterLab: {found['jupyter']} (./invoke url shows it with its token)")
    return "\n".join(lines)


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = [("what", "name", "state", "details"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]


def _machines() -> list[dict[str, str]]:
    """Return the machines of the swarm that have a role, and simulated ones that are not in it."""
    found = {}
    for node in engine.client().api.nodes() if services.is_manager() else []:
        labels = node["Spec"].get("Labels") or {}
        if any(label.startswith("slurm_") for label in labels):
            description = node["Description"]
            state = node["Status"]["State"]
            if node["Spec"]["Availability"] != "active":
                state += f", {node['Spec']['Availability']}"
            roles = [role for role in ("head", "worker") if labels.get(f"slurm_{role}") == "true"]
            found[description["Hostname"]] = {
                "name": description["Hostname"],
                "role": " and ".join(roles) or labels.get("slurm_role", ""),
                "state": state,
                "address": node["Status"].get("Addr", ""),
                "engine": f"Docker {description['Engine']['EngineVersion']}",
            }
    for container in engine.client().containers.list(all=True, ignore_removed=True, filters={"label": LABEL}):
        if str(container.name).startswith(MACHINE_PREFIX):
            name = str(container.name).removeprefix(MACHINE_PREFIX)
            if name not in found:
                found[name] = {
                    "name": name,
                    "role": "simulated",
                    "state": f"{container.status}, not in the swarm",
                    "address": "",
                    "engine": "",
                }
    return sorted(found.values(), key=lambda machine: ("head" not in machine["role"], machine["name"]))


def _services() -> list[dict[str, Any]]:
    found = []
    unhealthy = set(services.unhealthy()) if services.is_manager() else set()
    for service in _all_services():
        tasks = engine.client().api.tasks(filters={"service": service.name})
        running = sum(task["Status"]["State"] == "running" and task["DesiredState"] == "running" for task in tasks)
        wanted = sum(task["DesiredState"] == "running" for task in tasks)
        wanted = int(service.attrs["Spec"]["Mode"].get("Replicated", {"Replicas": wanted})["Replicas"])
        troubles = sorted(
            (str(task["UpdatedAt"]), str(task["Status"].get("Err") or task["Status"].get("Message", "")))
            for task in tasks
            if task["Status"]["State"] not in ("running", "shutdown", "complete")
        )
        name = _short(str(service.name))
        is_well = running >= wanted and service.name not in unhealthy
        found.append(
            {
                "name": name,
                "running": running,
                "wanted": wanted,
                "image": service.attrs["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"],
                "trouble": "" if is_well else troubles[-1][1] if troubles else "not healthy yet",
            }
        )
    return found


def _all_services() -> list[Any]:
    if not services.is_manager():
        return []
    named = engine.client().services.list(filters={"name": registry.SERVICE})
    return [*(service for service in named if service.name == registry.SERVICE), *services.services()]


def _short(name: str) -> str:
    return "registry" if name == registry.SERVICE else name.removeprefix(f"{STACK}_")


def _images(config: Config) -> list[dict[str, str]]:
    """Compare what runs with what this checkout builds; where they differ, `./invoke up` brings them together."""
    try:
        built = images.built(config)
    except ClusterError:
        return []
    running: dict[str, set[str]] = {name: set() for name in (*_IMAGE_OF.values(), *_IN_THE_AGENT.values())}
    for service in _all_services():
        specification = service.attrs["Spec"]["TaskTemplate"]["ContainerSpec"]
        name = _short(str(service.name))
        if name in _IMAGE_OF:
            running[_IMAGE_OF[name]].add(specification["Image"])
        for variable in specification.get("Env") or []:
            setting, _, value = variable.partition("=")
            if setting in _IN_THE_AGENT:
                running[_IN_THE_AGENT[setting]].add(value)
    found = []
    for name, references in running.items():
        identity = engine.image_id(built[name])
        if not references:
            state = "built" if identity else "not built"
        elif identity and all(engine.image_id(reference) == identity for reference in references):
            state = "current"
        else:
            state = "differs from what runs"
        found.append(
            {"name": f"cfiddle-{name}", "state": state, "built": built[name], "running": ", ".join(sorted(references))}
        )
    return found
