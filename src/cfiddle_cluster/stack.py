"""The stack: its secrets, configurations and services on the swarm.

What a service runs from is named by its content, so a service changes when, and only when, something of it did.
"""

import hashlib
import itertools
import json
import os
import socket
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from string import Template
from typing import Any

import yaml
from docker.errors import APIError

from agent import policy
from agent.container_policy import Buffer
from cfiddle_cluster import engine, homes, registry, slurm
from cfiddle_cluster.commands import docker_cli, run
from cfiddle_cluster.config import CLUSTER, LABEL, STACK, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.services import (
    NAMESPACE,
    health_check,
    is_manager,
    live_tasks,
    patience,
    running_tasks,
    services,
    wait_until_healthy,
)
from cfiddle_cluster.state import State
from cfiddle_cluster.wait import wait_until

SECRETS = ("munge-key", "database-password", "jupyter-token", "ssh-authority", "user-registry-password", "registry-key")
CONFIGS = {
    "slurm.conf": "conf/slurm.conf",
    "cgroup.conf": "conf/cgroup.conf",
    "slurmdbd.conf": "conf/slurmdbd.conf",
    "policy.yaml": "policy.yaml",
}
CERTIFICATES = ("ca.crt", "registry.crt")
"""Configurations, too, but of the state."""
IMAGES = ("mysql", "cluster", "agent", "sandbox", "compiler", "task", "registry", "user")

WORKER_SERVICES = ("slurmd", "agent")
"""The services that a job runs in: never replaced while one does."""
STAGES = (("mysql",), ("slurmdbd",), ("slurmctld",), WORKER_SERVICES, ("user-registry",), ("userhost",))
"""All services, in the order in which an upgrade replaces them: each part of Slurm understands older ones after it
(Slurm's upgrade guide), and no other order."""
SERVICES = tuple(itertools.chain(*STAGES))

DRAIN_REASON = "cfiddle: a new version is being deployed"
DRAIN_TIMEOUT_S = 24 * 3600.0
"""Seconds that running jobs are waited for: the longest time limit that conf/slurm.conf allows."""
START_TIMEOUT_S = 180.0
USERHOST_SHARE = 0.75
"""Of the head's memory, for all programs on the users' node together."""

_DEFINITION = "cfiddle.definition"
_LABELS = {"cfiddle.cluster": CLUSTER, "cfiddle.stack": STACK}


def deploy(config: Config, state: State, references: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Bring the services to what the checkout describes, and wait until all of them are healthy.

    Where the services that jobs run in would change, the workers are drained first, and resumed when it is done.

    Args:
        config: the administrator's settings.
        state: where the secrets are.
        references: for each image, by its short name, what the machines' engines know it by.
        say: is told which jobs are waited for.

    Raises:
        ClusterError: policy.yaml is wrong, the port is somebody else's, jobs did not end in time, or a service does not
            become healthy.
    """
    values = values_of(config, state, references)
    try:
        _drain_if_changing(values, say)
        put(config, state, values)
        wait_until_healthy(timeout_s=START_TIMEOUT_S)
    except BaseException:
        # One machine that does not come up, or a wait that was given up, is no reason for the others to stand idle.
        if slurm.is_answering():
            resume()
        raise
    resume()
    remove_unused(values)


def values_of(config: Config, state: State, references: Mapping[str, str]) -> dict[str, str]:
    """Return everything that docker-compose.yml names in ${…}; its secrets and configurations are there then.

    Raises:
        ClusterError: policy.yaml is wrong, or the port is somebody else's.
    """
    rules = load_policy(config.root, {name: references[image] for name, image in policy.OWN_IMAGES.items()})
    _check_port("JUPYTER_PORT", config.jupyter_port, "JupyterLab")
    if config.ssh_port:
        _check_port("SSH_PORT", config.ssh_port, "SSH to the users' node")
    names = _ensure_secrets(state) | _ensure_configs(config.root, state)
    return _values(config, references, names, rules.containers.buffer if rules.containers else Buffer())


def changed(values: Mapping[str, str]) -> set[str]:
    """Return the services that do not run from what they would be deployed with, or are not there."""
    known = {
        str(service.name).removeprefix(f"{STACK}_"): service.attrs["Spec"]["Labels"].get(_DEFINITION)
        for service in services()
    }
    wanted = {service: values[_variable("DEFINITION", service)] for service in SERVICES}
    return {service for service, definition in wanted.items() if known.get(service) != definition}


def put(config: Config, state: State, values: Mapping[str, str], names: Collection[str] = SERVICES) -> None:
    """Tell Swarm what the named services shall be, and wait for nothing; the others stay as they are."""
    stack = _compose(config)
    stack["services"] = {name: section for name, section in stack["services"].items() if name in names}
    # The registry's account goes with the services, so that a worker which lost an image pulls it again.
    argv: list[str] = [docker_cli(), "--config", str(registry.docker_config(config, state)), "stack", "deploy"]
    argv += ["--with-registry-auth", "--resolve-image", "never", "--compose-file", "-", STACK]
    run(argv, timeout_s=120, env={**os.environ, **values}, input=json.dumps(stack))


def _compose(config: Config) -> dict[str, Any]:
    """Return the stack file, with health checks, patience, and SSH to the users' node where config.sh has a port."""
    stack: dict[str, Any] = yaml.safe_load((config.root / "docker-compose.yml").read_text())
    for service in stack["services"].values():
        service["healthcheck"] = {
            name: value if name == "retries" else f"{value}s" for name, value in health_check().items()
        }
        service["environment"] = service.get("environment", {}) | patience()
    if config.ssh_port:
        more = yaml.safe_load((config.root / "conf" / "ssh-port.yml").read_text())
        stack["services"]["userhost"]["ports"] += more["services"]["userhost"]["ports"]
    return stack


def resume() -> None:
    """Let the nodes take jobs again that a deploy or an upgrade drained, also one that was interrupted."""
    slurm.resume(name for name, node in slurm.nodes().items() if node.reason == DRAIN_REASON)


def stop_worker_services(machine: Machine) -> None:
    """End the containers that jobs run in on one machine, and return when they have ended.

    Swarm starts new ones, unless the machine is paused.
    """
    script = """
    for service in "$@"; do
        docker ps --quiet --filter "label=com.docker.swarm.service.name=$service"
    done | xargs --no-run-if-empty docker stop
    """
    machine.script(script, [f"{STACK}_{service}" for service in WORKER_SERVICES], timeout_s=60)


def remove(*, timeout_s: float = 120) -> None:
    """Take the services away with their networks, secrets and configurations, where there are any; volumes stay.

    Raises:
        ClusterError: containers or networks are still there after that time.
    """
    client = engine.client()
    if is_manager():
        run([docker_cli(), "stack", "rm", STACK], timeout_s=60)
        wait_until(
            lambda: not live_tasks(),
            timeout_s=timeout_s,
            what="the stack's containers to end on all machines",
            remedy="a machine that is switched off holds this up: docker node rm --force NAME, then run this again",
        )
    of_stack = {"label": f"{NAMESPACE}={STACK}"}
    wait_until(
        lambda: (
            not client.containers.list(all=True, ignore_removed=True, filters=of_stack)
            and not client.networks.list(filters=of_stack)
        ),
        timeout_s=timeout_s,
        what="the stack's containers and networks to be gone from this machine",
        remedy=f"docker ps --all --filter label={NAMESPACE}={STACK} shows the containers",
    )
    if is_manager():
        remove_unused({})


def remove_volumes(machine: Machine) -> None:
    """Remove the cluster's volumes from a machine, with all that they hold."""
    script = (
        'docker volume ls --quiet --filter "label=$1" | xargs --no-run-if-empty docker volume rm --force >/dev/null'
    )
    machine.script(script, [LABEL], timeout_s=120)


def _ensure_secrets(state: State) -> dict[str, str]:
    api = engine.client().api
    there = {item["Spec"]["Name"] for item in api.secrets()}
    names = {}
    for secret in SECRETS:
        value = state.path("registry.key").read_bytes() if secret == "registry-key" else state.secret(secret).encode()
        names[_variable("SECRET", secret)] = name = _named(secret, value)
        if name not in there:
            api.create_secret(name, value, labels=_LABELS)
    return names


def load_policy(root: Path, images: Mapping[str, str]) -> policy.Policy:
    """Return the policy; what is wrong with it is found out here, and not by every agent after it was replaced.

    Args:
        root: the checkout.
        images: what each of `policy.OWN_IMAGES` stands for.

    Raises:
        ClusterError: it is wrong.
    """
    try:
        return policy.load(root / "policy.yaml", images=images)
    except policy.PolicyError as error:
        raise ClusterError(str(error), "correct policy.yaml; its comments say what each setting means") from error


def _check_port(setting: str, port: int, what: str) -> None:
    """Find out before the users' node is replaced whether the new one could have its port."""
    userhost = next((found for found in services() if found.name == f"{STACK}_userhost"), None)
    ports = userhost.attrs["Spec"].get("EndpointSpec", {}).get("Ports", []) if userhost else []
    if port in [published["PublishedPort"] for published in ports]:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ClusterError(
                f"port {port}, which {what} shall have, is in use",
                f"set {setting} in config.sh to a free one, or end what uses it (ss -ltnp shows it)",
            ) from error


def _ensure_configs(root: Path, state: State) -> dict[str, str]:
    api = engine.client().api
    there = {item["Spec"]["Name"] for item in api.configs()}
    names = {}
    paths = {name: root / path for name, path in CONFIGS.items()} | {name: state.path(name) for name in CERTIFICATES}
    for config, path in paths.items():
        data = path.read_bytes()
        names[_variable("CONFIG", config)] = name = _named(config, data)
        if name not in there:
            api.create_config(name, data, labels=_LABELS)
    return names


def remove_unused(values: Mapping[str, str]) -> None:
    """Remove the stack's secrets and configurations that are not among those values."""
    api = engine.client().api
    mine = {"label": f"cfiddle.stack={STACK}"}
    for items, remove_one in (
        (api.secrets(filters=mine), api.remove_secret),
        (api.configs(filters=mine), api.remove_config),
    ):
        for item in items:
            if item["Spec"]["Name"] not in values.values():
                try:
                    remove_one(item["ID"])
                except APIError as error:
                    # A service that Swarm is still taking away may hold it; the next deploy looks again.
                    if error.status_code != 400:
                        raise


def _named(name: str, data: bytes) -> str:
    # The secrets are random and long: twelve digits of a hash tell nothing about them.
    return f"{STACK}_{name}-{hashlib.sha256(data).hexdigest()[:12]}"


def _variable(kind: str, name: str) -> str:
    return f"{kind}_{name.upper().replace('-', '_').replace('.', '_')}"


def _values(config: Config, references: Mapping[str, str], names: Mapping[str, str], buffer: Buffer) -> dict[str, str]:
    """Return everything that docker-compose.yml names in ${…}."""
    home = homes.volume_options(config)
    digest = hashlib.sha256(json.dumps(home, sort_keys=True).encode()).hexdigest()[:8]
    values = {_variable("IMAGE", name): references[name] for name in IMAGES} | dict(names)
    values |= {
        # A volume keeps the options that it was made with, so other options need another one. The homes are elsewhere.
        "HOME_VOLUME": f"{STACK}_home-{digest}",
        "HOME_TYPE": home["type"],
        "HOME_OPTIONS": home["o"],
        "HOME_DEVICE": home["device"],
        "JUPYTER_PORT": str(config.jupyter_port),
        "USER_REGISTRY": registry.users_address(config),
        "USER_REGISTRY_PORT": str(config.user_registry_port),
        "SSH_PORT": _number(config.ssh_port),
        "USERHOST_MEMORY_GB": str(max(1, int(USERHOST_SHARE * _memory_bytes() / 2**30))),
        "SLURMD_CPUS": _number(config.local_worker_cpus) if config.simulated else "",
        "SLURMD_MEMORY_MB": _number(config.local_worker_memory_mb) if config.simulated else "",
        "SLURMD_BUFFER_CPUS": str(buffer.cpus),
        "SLURMD_BUFFER_MEMORY_MB": str(buffer.memory_mb),
    }
    return values | definitions(_compose(config), values)


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _number(value: int) -> str:
    return str(value) if value else ""


def definitions(compose: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, str]:
    """Return a hash of all that makes up each of the services, as the label that it carries."""
    known = {**values, **{_variable("DEFINITION", service): "" for service in SERVICES}}
    found = {}
    for service in SERVICES:
        text = json.dumps(_everything_of(compose, service), sort_keys=True)
        digest = hashlib.sha256(Template(text).substitute(known).encode())
        found[_variable("DEFINITION", service)] = digest.hexdigest()[:12]
    return found


def _everything_of(compose: Mapping[str, Any], service: str) -> list[Any]:
    """Return a service's section of the stack file and what it refers to in others: names of content, and volumes."""
    section = compose["services"][service]
    mounts = [mount.partition(":")[0] for mount in section.get("volumes", []) if isinstance(mount, str)]
    return [
        section,
        *(compose[kind][item["source"]] for kind in ("secrets", "configs") for item in section.get(kind, [])),
        *(compose["volumes"][mount] for mount in mounts if mount in compose["volumes"]),
    ]


def _drain_if_changing(values: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Let the workers run empty if a service that jobs run in will change."""
    there = {str(service.name).removeprefix(f"{STACK}_") for service in services()}
    changing = [service for service in WORKER_SERVICES if service in changed(values) & there]
    if changing and running_tasks("slurmd"):
        if not slurm.is_answering():
            raise ClusterError(
                f"{' and '.join(changing)} would be replaced, but slurmctld does not say whether jobs run",
                "./invoke logs slurmctld shows why; ./invoke down, then ./invoke up, if no job matters",
            )
        taking_jobs = [name for name, node in slurm.nodes().items() if node.is_answering and not node.is_drained]
        slurm.drain(taking_jobs, DRAIN_REASON)
        slurm.wait_until_empty(slurm.nodes(), timeout_s=DRAIN_TIMEOUT_S, say=say)
