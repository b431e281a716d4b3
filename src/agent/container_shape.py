"""The shape of users' containers: what the engine is asked for, and what a container's labels tell of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from agent.checked import overlap
from agent.container_options import Options
from agent.container_policy import ContainerPolicy
from agent.gpus import Gpu
from agent.grants import Grant

LABEL = "cfiddle.container"
UID_LABEL, NAME_LABEL = "cfiddle.uid", "cfiddle.name"
USER_LABEL, IMAGE_LABEL, _PORTS_LABEL = "cfiddle.user", "cfiddle.image", "cfiddle.ports"
_CPUS_LABEL, _MEMORY_LABEL = "cfiddle.cpus", "cfiddle.memory-mb"
_GPUS_LABEL, _MODELS_LABEL = "cfiddle.gpus", "cfiddle.gpu-models"


class Owner(NamedTuple):
    """Whose a container is: uid and gid, and the name of the home directory."""

    uid: int
    gid: int
    user: str


class Wanted(NamedTuple):
    """A container that is to be.

    Attributes:
        image: what its owner calls the image.
        reference: what the engine knows it by.
        ports: the same outside and inside.
        gpus: those of the machine that it gets.
    """

    owner: Owner
    name: str
    image: str
    reference: str
    ports: Sequence[int] = ()
    gpus: Sequence[Gpu] = ()


def engine_name(uid: int, name: str) -> str:
    """Return what the engine calls a user's container."""
    return f"u{uid}.{name}"


def configuration(
    wanted: Wanted, *, policy: ContainerPolicy, grant: Grant | None, home: Mapping[str, str], network: str
) -> dict[str, Any]:
    """Return what the engine is asked for: all of it is the policy's, the job's or fixed here.

    Args:
        wanted: the container.
        policy: of all.
        grant: of the job that it shall run in; None where it is only created.
        home: options of a volume that is the owner's home directory.
        network: the users' network.
    """
    owner, options = wanted.owner, policy.options
    digest = hashlib.sha256(json.dumps(sorted(home.items())).encode()).hexdigest()[:8]
    volume = {
        "Type": "volume",
        "Source": f"cfiddle-home-{owner.user}-{digest}",  # a volume keeps the options that it was made with
        "VolumeOptions": {
            "NoCopy": True,
            "Labels": {"cfiddle.cluster": "cfiddle"},
            "DriverConfig": {"Name": "local", "Options": dict(home)},
        },
    }
    homes = list(dict.fromkeys((f"/home/{owner.user}", "/home/me")))
    ulimits = [{"Name": limit.name, "Soft": limit.soft, "Hard": limit.hard} for limit in options.ulimits]
    cpus, memory_mb = (grant.cpu_count, grant.memory_mb) if grant else (policy.cpus, policy.memory_mb)
    return {
        "Image": wanted.reference,
        "User": f"{owner.uid}:{owner.gid}",
        "Hostname": wanted.name[:63].rstrip("-._"),
        # What it runs is most often a shell, which ends where there is nothing to read.
        "Tty": True,
        "OpenStdin": True,
        "Env": [
            *options.environment,
            *(f"HOME={homes[0]}", f"USER={owner.user}", f"LOGNAME={owner.user}"),
        ],
        "ExposedPorts": {f"{port}/tcp": {} for port in wanted.ports},
        "Labels": {
            "cfiddle.cluster": "cfiddle",
            LABEL: "1",
            UID_LABEL: str(owner.uid),
            NAME_LABEL: wanted.name,
            USER_LABEL: owner.user,
            IMAGE_LABEL: wanted.image,
            _PORTS_LABEL: ",".join(map(str, wanted.ports)),
            _CPUS_LABEL: str(cpus),
            _MEMORY_LABEL: str(memory_mb),
            _GPUS_LABEL: ",".join(gpu.uuid for gpu in wanted.gpus),
            _MODELS_LABEL: ",".join(gpu.model for gpu in wanted.gpus),
        },
        "HostConfig": {
            "CapAdd": [],
            "CapDrop": ["ALL"],
            "DeviceRequests": gpu_request([gpu.uuid for gpu in wanted.gpus]),
            "IpcMode": "private",
            "LogConfig": {"Type": "none"},
            "Mounts": [*({**volume, "Target": target} for target in homes), *_volumes(options, homes)],
            "NetworkMode": network,
            "OomScoreAdj": 500,  # a container goes before what keeps the machine going
            "PidsLimit": policy.processes,
            "PortBindings": {f"{port}/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(port)}] for port in wanted.ports},
            "Privileged": False,
            "RestartPolicy": {"Name": "no"},
            "SecurityOpt": ["no-new-privileges"],
            "ShmSize": options.shm_bytes,
            "Sysctls": {"net.ipv4.ip_unprivileged_port_start": "1024"},  # as docker-compose.yml has it, and says why
            "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}, *ulimits],
            **(limits(grant) if grant else {}),
        },
    }


def limits(grant: Grant) -> dict[str, Any]:
    """Return what a container may use: what its job has."""
    memory = grant.memory_mb * 2**20
    found = {"Memory": memory, "MemorySwap": memory} if memory else {}
    return found | ({"NanoCpus": grant.cpu_count * 10**9} if grant.cpu_count else {})


def gpu_request(uuids: Sequence[str]) -> list[dict[str, Any]]:
    """Return what the engine is asked for so that a container has these GPUs and nvidia-smi.

    NVIDIA's container toolkit, which must be on the machine, understands it.
    """
    capabilities = [["gpu", "compute", "utility"]]
    return [{"Driver": "nvidia", "DeviceIDs": list(uuids), "Capabilities": capabilities}] if uuids else []


def told(container: Mapping[str, Any], *, created: str, job: int | None) -> dict[str, Any]:
    """Return what the agent tells of a container that the engine lists.

    Args:
        container: the engine's entry.
        created: the engine's ISO time.
        job: that it runs in, if it does.
    """
    labels = container["Labels"]
    return {
        "id": str(container["Id"]),
        "name": labels[NAME_LABEL],
        "uid": int(labels[UID_LABEL]),
        "user": labels.get(USER_LABEL, ""),
        "image": labels.get(IMAGE_LABEL, container["Image"]),
        "image_id": container["ImageID"],
        "status": container["State"],
        "created": created,
        "cpus": int(labels.get(_CPUS_LABEL, 0)),
        "memory_mb": int(labels.get(_MEMORY_LABEL, 0)),
        "ports": ports(container),
        "gpus": _listed(container, _MODELS_LABEL),
        "job": job,
    }


def ports(container: Mapping[str, Any]) -> list[int]:
    """Return the ports that were given to a container, whether it runs or not; its labels say."""
    return [int(port) for port in _listed(container, _PORTS_LABEL)]


def gpus(container: Mapping[str, Any]) -> list[str]:
    """Return the uuids of a container's GPUs; its labels say."""
    return _listed(container, _GPUS_LABEL)


def _listed(container: Mapping[str, Any], label: str) -> list[str]:
    text = container["Labels"].get(label, "")
    return text.split(",") if text else []


def _volumes(options: Options, homes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the administrator's volumes; where a user's home is, that stays."""
    return [
        {
            "Type": "bind",
            "Source": volume.source,
            "Target": volume.target,
            "ReadOnly": volume.read_only,
            "BindOptions": {"NonRecursive": True},
        }
        for volume in options.volumes
        if not any(overlap(volume.target, home) for home in homes)
    ]
