"""The part of the policy that says what users' containers may be made of, and what they may have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from agent import container_options, gpus
from agent.checked import PolicyError, mapping, whole
from agent.container_options import Options

_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9./:@_-]{0,511}")

_RANGES = {
    "per_user": (1, 4096),
    "disk_mb": (1, 2**30),
    "cpus": (1, 4096),
    "memory_mb": (16, 2**24),
    "processes": (16, 2**15),
}
_OPTIONAL = {"images_per_user", "images_mb", "types", "buffer", "start_port_num", "additional_options"}
_LEAST_GB = 1 / 64
_MOST_GPUS = 64
_FIRST_PORT = 25000
_IMAGES_PER_USER, _IMAGES_MB = 16, 8192


class Type(NamedTuple):
    """What a container may be created with.

    Attributes:
        gpus: the models of its GPUs, as the administrator writes them.
    """

    name: str
    cpus: int
    memory_mb: int
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Buffer:
    """What no job gets on each machine."""

    cpus: int = 0
    memory_mb: int = 0


@dataclass(frozen=True)
class ContainerPolicy:
    """What users' containers may be and have.

    Attributes:
        images: what users call the images, and what the engines know these by.
        per_user, disk_mb: how many containers of a user a machine may hold, and what they may have written together.
        cpus, memory_mb: of the job of a container that names nothing else.
        processes: and threads in a container.
        images_per_user, images_mb: how many a user may have committed, and what these may add to a machine's disk.
        types: what there is to choose from; where the administrator names none, what containers have otherwise.
        buffer: kept free by Slurm.
        first_port: the lowest port that a container's may be published at.
        options: what every container gets besides.
    """

    images: Mapping[str, str]
    per_user: int
    disk_mb: int
    cpus: int
    memory_mb: int
    processes: int
    images_per_user: int = _IMAGES_PER_USER
    images_mb: int = _IMAGES_MB
    types: tuple[Type, ...] = ()
    buffer: Buffer = field(default=Buffer())
    first_port: int = _FIRST_PORT
    options: Options = field(default=Options())


def parse(value: object, images: Mapping[str, str]) -> ContainerPolicy:
    """Return what the section `containers` says.

    Args:
        images: what the names of the cluster's own images stand for.

    Raises:
        PolicyError: something in it is wrong.
    """
    entry = mapping(value, "containers", required={"images", *_RANGES}, optional=_OPTIONAL)
    named = entry["images"]
    if not isinstance(named, list) or not named:
        raise PolicyError("containers.images must be a list of at least one image")
    for image in named:
        if not isinstance(image, str) or not _IMAGE.fullmatch(image):
            raise PolicyError(f"containers.images: {image!r} is not an image's reference")
    numbers = {name: whole(entry[name], f"containers.{name}", *_RANGES[name]) for name in _RANGES}
    types = entry.get("types", {f"{numbers['cpus']} CPUS": [numbers["cpus"], numbers["memory_mb"] / 1024, ""]})
    if not isinstance(types, dict) or not types:
        raise PolicyError("containers.types must name at least one type")
    return ContainerPolicy(
        images={image: images.get(image, image) for image in named},
        **numbers,
        images_per_user=whole(entry.get("images_per_user", _IMAGES_PER_USER), "containers.images_per_user", 0, 4096),
        images_mb=whole(entry.get("images_mb", _IMAGES_MB), "containers.images_mb", 1, 2**30),
        types=tuple(_type(name, wanted) for name, wanted in types.items()),
        buffer=_buffer(entry.get("buffer", {"cpu": 0, "mem": 0})),
        first_port=whole(entry.get("start_port_num", _FIRST_PORT), "containers.start_port_num", 1024, 65535),
        options=container_options.parse(entry.get("additional_options", []), "containers.additional_options"),
    )


def _type(name: object, value: object) -> Type:
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 100:
        raise PolicyError(f"containers.types: {name!r} is no name of a type")
    where = f"containers.types: {name!r}"
    if not isinstance(value, list) or len(value) != 3:
        raise PolicyError(f'{where} is not [CPUs, GB, "GPU model,GPU model"]')
    cpus, memory_gb, models = value
    if not isinstance(models, str):
        raise PolicyError(f"{where}: {models!r} is no list of GPU models as in 'TITAN Xp,TITAN Xp'")
    wanted = tuple(model.strip() for model in models.split(",")) if models.strip() else ()
    if len(wanted) > _MOST_GPUS or not all(gpus.kind(model) for model in wanted):
        raise PolicyError(f"{where}: {models!r} is no list of GPU models as in 'TITAN Xp,TITAN Xp'")
    memory_mb = int(_gigabytes(memory_gb, where, _LEAST_GB) * 1024)
    return Type(name, whole(cpus, f"{where}: CPUs", 1, 4096), memory_mb, wanted)


def _buffer(value: object) -> Buffer:
    entry = mapping(value, "containers.buffer", required={"cpu", "mem"})
    cpus = whole(entry["cpu"], "containers.buffer.cpu", 0, 4096)
    return Buffer(cpus, int(_gigabytes(entry["mem"], "containers.buffer.mem", 0) * 1024))


def _gigabytes(value: object, where: str, least: float) -> float:
    if type(value) not in (int, float) or not least <= float(str(value)) <= 2**14:
        raise PolicyError(f"{where}: {value!r} is no number of gigabytes")
    return float(str(value))
