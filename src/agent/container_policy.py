"""The part of the policy that says what users' containers may be made of, and what they may have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from agent.checked import PolicyError, mapping, whole

_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9./:@_-]{0,511}")

_RANGES = {
    "per_user": (1, 4096),
    "disk_mb": (1, 2**30),
    "cpus": (1, 4096),
    "memory_mb": (16, 2**24),
    "processes": (16, 2**15),
}


@dataclass(frozen=True)
class ContainerPolicy:
    """What users' containers may be and have.

    Attributes:
        images: what users call the images, and what the engines know these by.
        per_user, disk_mb: how many containers of a user a machine may hold, and what they may have written together.
        cpus, memory_mb: of the job of a container that names nothing else.
        processes: and threads in a container.
    """

    images: Mapping[str, str]
    per_user: int
    disk_mb: int
    cpus: int
    memory_mb: int
    processes: int


def parse(value: object, images: Mapping[str, str]) -> ContainerPolicy:
    """Return what the section `containers` says.

    Args:
        images: what the names of the cluster's own images stand for.

    Raises:
        PolicyError: something in it is wrong.
    """
    entry = mapping(value, "containers", required={"images", *_RANGES})
    named = entry.pop("images")
    if not isinstance(named, list) or not named:
        raise PolicyError("containers.images must be a list of at least one image")
    for image in named:
        if not isinstance(image, str) or not _IMAGE.fullmatch(image):
            raise PolicyError(f"containers.images: {image!r} is not an image's reference")
    numbers = {name: whole(entry[name], f"containers.{name}", *_RANGES[name]) for name in entry}
    return ContainerPolicy(images={image: images.get(image, image) for image in named}, **numbers)
