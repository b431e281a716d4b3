"""Simulated machines: containers on the head that hold an engine and an SSH server, so that one laptop shows a cluster.

They live on a network of their own, with fixed addresses, and keep their engine's state in a volume, so they come back
with the outer engine, and are the same members of the swarm when they do.
"""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from docker.errors import APIError
from docker.models.containers import Container
from docker.types import EndpointConfig, IPAMConfig, IPAMPool, Mount

from cfiddle_cluster import engine
from cfiddle_cluster.config import CLUSTER, SIMULATED_HEAD_ADDR, SIMULATED_NETWORK, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine, simulated_worker
from cfiddle_cluster.state import State
from cfiddle_cluster.wait import wait_until

NETWORK = "cfiddle-machines"
BRIDGE = "cfiddle-mach"
"""An interface's name has at most 15 characters."""
START_TIMEOUT_S = 120
AUTHORIZED_KEYS = "/etc/ssh/authorized_keys"

# include/uapi/linux/capability.h, in the order of their numbers. The three newest are left out: older engines do not
# know them, and a simulated machine needs none of them.
_CAPABILITIES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ"
).split()
_LABELS = {"cfiddle.cluster": CLUSTER}


def existing() -> list[str]:
    """Return the names of the simulated machines, c1 first; also of those that do not run."""
    return sorted((str(found.labels["cfiddle.machine"]) for found in _containers()), key=number)


def workers(state: State) -> list[Machine]:
    """Return the simulated machines that there are."""
    return [_machine(state, name) for name in existing()]


def ensure_machines(
    config: Config, state: State, names: Sequence[str], image: str, report: Callable[[str], None] = print
) -> list[Machine]:
    """Have machines of these names, running and reachable. One that is there goes on as it is: jobs may run on it.

    Args:
        config: the administrator's settings.
        state: where the SSH key is.
        names: c1, c2, …
        image: the reference of the image cfiddle-machine.
        report: is told who goes on with an earlier image.

    Raises:
        ClusterError: the network's addresses are taken, or a machine does not come up.
    """
    _ensure_network()
    containers = {str(found.labels["cfiddle.machine"]): found for found in _containers()}
    outdated: list[str] = []
    cpus = cpu_sets(len(names), sorted(os.sched_getaffinity(0)))
    for name, cpu_set in zip(names, cpus, strict=True):
        container = containers.get(name)
        if container is not None and not _has_homes(config, container):
            # Made with another HOME_ROOT. What the machine holds is in its volume and stays.
            container.remove(force=True)
            container = None
        if container is None:
            container = _create(config, state, name, image)
        elif container.attrs["Config"]["Image"] != image:
            outdated.append(name)
        if (container.attrs["HostConfig"]["CpusetCpus"] or "") != cpu_set:
            container.update(cpuset_cpus=cpu_set)
        if container.status != "running":
            container.start()
    for name in names:
        wait_until(
            partial(_is_healthy, name),
            timeout_s=START_TIMEOUT_S,
            what=f"the simulated machine {name} to come up",
            remedy=f"docker logs {_container_name(name)} shows what it says",
        )
    if outdated:
        report(f"{', '.join(outdated)}: of an earlier image; ./invoke down, then ./invoke up, makes them anew")
    _write_known_hosts(state)
    return [_machine(state, name) for name in names]


def remove_machine(name: str) -> None:
    """Take one machine away with all that it holds; nothing happens if there is none."""
    for container in _containers():
        if container.labels["cfiddle.machine"] == name:
            container.remove(force=True)
    for volume in engine.client().volumes.list(filters={"label": f"cfiddle.machine={name}"}):
        volume.remove()


def remove_all(*, purge: bool) -> None:
    """Take all machines and their network away; what their engines hold, images above all, stays unless purged."""
    client = engine.client()
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(_release, _containers()))
    for network in client.networks.list(names=[f"^{NETWORK}$"]):
        network.remove()
    if purge:
        for volume in client.volumes.list(filters={"label": "cfiddle.machine"}):
            volume.remove()


def _release(container: Container) -> None:
    if container.status == "running":
        # An engine that remembers a swarm which is no more waits 20 s for it when it starts.
        container.exec_run(["timeout", "20", "docker", "swarm", "leave", "--force"])
    container.remove(force=True)


def cpu_sets(machines: int, cpus: list[int]) -> list[str]:
    """Share CPUs out between machines, as Docker writes CPU sets.

    One CPU, the first, is left to the head when that leaves one for each machine. With fewer CPUs than that all
    machines share all of them, written as the empty set.

    Args:
        machines: how many machines.
        cpus: the numbers of the CPUs that there are.
    """
    free = cpus[1:]
    if len(free) < machines:
        return [""] * machines
    share = len(free) // machines
    return [",".join(map(str, free[n * share : (n + 1) * share])) for n in range(machines)]


def capabilities(status: str) -> list[str]:
    """Return the names of the capabilities in this process's bounding set.

    Args:
        status: the content of /proc/self/status.
    """
    found = re.search(r"^CapBnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
    bounding = int(found[1], 16) if found else 0
    return [name for number, name in enumerate(_CAPABILITIES) if bounding >> number & 1]


def number(name: str) -> int:
    """Return the number in a machine's name: 3 for c3."""
    return int(name[1:])


def _container_name(name: str) -> str:
    return f"cfiddle-machine-{name}"


def _address(name: str) -> str:
    return str(IPv4Address(int(SIMULATED_NETWORK.network_address) + 10 + number(name)))


def _machine(state: State, name: str) -> Machine:
    return simulated_worker(state, name, _address(name))


def _containers() -> list[Container]:
    return list(engine.client().containers.list(all=True, ignore_removed=True, filters={"label": "cfiddle.machine"}))


def _has_homes(config: Config, container: Container) -> bool:
    return config.home_storage != "bind" or any(
        mount["Destination"] == str(config.home_root) for mount in container.attrs["Mounts"]
    )


def _create(config: Config, state: State, name: str, image: str) -> Container:
    client = engine.client()
    labels = {**_LABELS, "cfiddle.machine": name}
    volume = _container_name(name)
    client.volumes.create(volume, labels=labels)
    public_key = state.path("ssh/id_ed25519.pub")
    authorized = state.path("ssh/authorized_keys")
    if not authorized.exists():
        state.write("ssh/authorized_keys", public_key.read_text())
    mounts = [
        Mount("/var/lib/docker", volume, type="volume"),
        Mount(AUTHORIZED_KEYS, str(authorized), type="bind", read_only=True),
    ]
    if config.home_storage == "bind":
        mounts.append(Mount(str(config.home_root), str(config.home_root), type="bind"))
    settings: dict[str, Any] = {
        "name": _container_name(name),
        "hostname": name,
        "labels": labels,
        "cap_add": capabilities(Path("/proc/self/status").read_text()),
        "security_opt": ["seccomp=unconfined", "apparmor=unconfined"],
        "device_cgroup_rules": ["a *:* rwm"],
        "cgroupns": "private",
        "mounts": mounts,
        "restart_policy": {"Name": "unless-stopped"},
        "log_config": {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "2"}},
    }
    address = {NETWORK: EndpointConfig(client.api._version, ipv4_address=_address(name))}
    return client.containers.create(image, network=NETWORK, networking_config=address, **settings)


def _ensure_network() -> None:
    client = engine.client()
    if client.networks.list(names=[f"^{NETWORK}$"]):
        return
    pool = IPAMPool(subnet=str(SIMULATED_NETWORK), gateway=SIMULATED_HEAD_ADDR)
    try:
        client.networks.create(
            NETWORK,
            driver="bridge",
            ipam=IPAMConfig(pool_configs=[pool]),
            options={"com.docker.network.bridge.name": BRIDGE},
            labels=_LABELS,
        )
    except APIError as error:
        raise ClusterError(
            f"the network of the simulated machines, {SIMULATED_NETWORK}, cannot be made: {error.explanation}",
            "docker network ls and ip address show who has these addresses",
        ) from error


def _is_healthy(name: str) -> bool:
    container = engine.client().containers.get(_container_name(name))
    if container.status in ("exited", "dead"):
        tail = container.logs(tail=10).decode(errors="replace").strip()
        raise ClusterError(
            f"the simulated machine {name} ended:\n{tail}", f"docker rm --force {container.name}; ./invoke up"
        )
    return bool(container.attrs["State"].get("Health", {}).get("Status") == "healthy")


def _write_known_hosts(state: State) -> None:
    """Learn the machines' host keys from the engine that runs them, not over the network."""
    path = state.path("ssh/known_hosts")
    lines = path.read_text().splitlines() if path.exists() else []
    network = str(SIMULATED_NETWORK.network_address).rpartition(".")[0] + "."
    lines = [line for line in lines if not line.startswith(network)]
    for container in _containers():
        if container.status != "running":
            continue
        code, output = container.exec_run(["cat", "/etc/ssh/ssh_host_ed25519_key.pub"])
        if code:
            raise ClusterError(
                f"{container.name} has no SSH host key: {output.decode(errors='replace')}", "./invoke up"
            )
        kind, key = output.decode().split()[:2]
        lines.append(f"{_address(container.labels['cfiddle.machine'])} {kind} {key}")
    state.write("ssh/known_hosts", "".join(f"{line}\n" for line in lines))
