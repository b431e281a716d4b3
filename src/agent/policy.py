"""The administrator's policy: which profiles there are, and what a sandbox of each may have.

All of the file is checked before the first call: what is unknown, missing or out of range is named, and the agent does
not start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from agent import container_policy
from agent.checked import CLOSED_SOURCES, Loader, PolicyError, mapping, overlap, path_outside, whole
from agent.container_policy import ContainerPolicy

__all__ = [
    "OWN_IMAGES",
    "SANDBOX",
    "Limits",
    "Mount",
    "Policy",
    "PolicyError",
    "Profile",
    "load",
    "own_images",
    "parse",
]

VERSION = 1
MAX_SIZE = 64 * 1024
JOBS_CPUS = "job"
SANDBOX = "cfiddle-sandbox"
OWN_IMAGES = {SANDBOX: "sandbox", "cfiddle-compiler": "compiler", "my_task_image": "task"}
"""What a policy calls the cluster's own images, whatever they are tagged, and which of images/ these are."""

_PROFILE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9./:@_-]{0,511}")
_CPULIST = re.compile(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*")


@dataclass(frozen=True)
class Limits:
    """What a sandbox may use."""

    seconds: float
    memory_mb: int
    processes: int
    cpus: str
    open_files: int
    file_mb: int
    tmpfs_mb: int
    tmpfs_files: int
    output_mb: int

    def cpus_in(self, job_cpus: str) -> str:
        """Return the CPUs of a sandbox in a job that has these; "" for all."""
        return job_cpus if self.cpus == JOBS_CPUS else self.cpus

    def lowered(self, seconds: float | None, memory_mb: int | None) -> Limits:
        """Return these limits, lower where the request asks for less; never higher."""
        return replace(
            self,
            seconds=self.seconds if seconds is None else min(seconds, self.seconds),
            memory_mb=self.memory_mb if memory_mb is None else min(memory_mb, self.memory_mb),
        )


@dataclass(frozen=True)
class Mount:
    """A directory or file of the machine's that a sandbox may read."""

    source: str
    target: str


@dataclass(frozen=True)
class Profile:
    """One kind of sandbox.

    Attributes:
        pool: how many wait for calls.
        counters: whether hardware counters may be asked for.
    """

    name: str
    image: str
    command: tuple[str, ...]
    limits: Limits
    pool: int = 0
    counters: bool = False
    mounts: tuple[Mount, ...] = ()


@dataclass(frozen=True)
class Policy:
    """All of the file; without `containers` there are no containers of users'."""

    calls_at_once: int
    calls_per_user: int
    profiles: Mapping[str, Profile]
    containers: ContainerPolicy | None = None


# The least and the most that each limit may be. A sandbox with cfiddle imported has 90 MB.
_RANGES = {
    "memory_mb": (128, 2**24),
    "processes": (16, 2**15),
    "open_files": (64, 2**20),
    "file_mb": (1, 2**20),
    "tmpfs_mb": (1, 2**20),
    "tmpfs_files": (100, 10**8),
    "output_mb": (1, 1024),
}
MIN_MEMORY_MB = _RANGES["memory_mb"][0]
_MAX_POOL = 256

# Where a sandbox has something of its own already.
_TAKEN_TARGETS = ("/proc", "/sys", "/dev", "/run", "/tmp")


def own_images(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what each of OWN_IMAGES stands for, as the stack tells the agent in its environment."""
    return {name: environment.get(f"{image.upper()}_IMAGE", name) for name, image in OWN_IMAGES.items()}


def load(path: Path, *, images: Mapping[str, str]) -> Policy:
    """Read and check the policy.

    Args:
        images: what each of OWN_IMAGES stands for (`own_images`); SANDBOX is the one of profiles that name none.

    Raises:
        PolicyError: it cannot be read, or something in it is wrong.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise PolicyError(f"{path}: {error.strerror}") from error
    try:
        return parse(content, images=images)
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from error


def parse(content: bytes, *, images: Mapping[str, str]) -> Policy:
    """Return the policy that a file's content says; arguments and errors are those of `load`."""
    if len(content) > MAX_SIZE:
        raise PolicyError(f"more than {MAX_SIZE} bytes")
    try:
        document = yaml.load(content, Loader)
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        raise PolicyError(f"not YAML, or not plain values: {error}") from error
    top = mapping(document, "the file", required={"version", "calls", "profiles"}, optional={"containers"})
    if top["version"] is not VERSION:
        raise PolicyError(f"version is {top['version']!r}; this agent knows version {VERSION}")
    calls = mapping(top["calls"], "calls", required={"at_once", "per_user"})
    profiles = top["profiles"]
    if not isinstance(profiles, dict) or not profiles:
        raise PolicyError("profiles must name at least one profile")
    containers = top.get("containers")
    return Policy(
        calls_at_once=whole(calls["at_once"], "calls.at_once", 1, 4096),
        calls_per_user=whole(calls["per_user"], "calls.per_user", 1, 4096),
        profiles={name: _profile(name, value, images) for name, value in profiles.items()},
        containers=None if containers is None else container_policy.parse(containers, images),
    )


def _profile(name: object, value: object, images: Mapping[str, str]) -> Profile:
    if not isinstance(name, str) or not _PROFILE_NAME.fullmatch(name):
        raise PolicyError(f"profile {name!r}: a name has up to 32 of a-z, 0-9, - and _")
    where = f"profiles.{name}"
    optional = {"image", "pool", "counters", "mounts", "network"}
    entry = mapping(value, where, required={"command", "limits"}, optional=optional)
    image = entry.get("image", SANDBOX)
    if not isinstance(image, str) or not _IMAGE.fullmatch(image):
        raise PolicyError(f"{where}.image is {image!r}, not an image's reference")
    command = entry["command"]
    if not isinstance(command, list) or not command or not all(isinstance(word, str) and word for word in command):
        raise PolicyError(f"{where}.command must be a list of words")
    counters = entry.get("counters", False)
    if type(counters) is not bool:
        raise PolicyError(f"{where}.counters is {counters!r}, neither true nor false")
    if entry.get("network", "none") != "none":
        raise PolicyError(f"{where}.network is {entry['network']!r}; a sandbox has none")
    return Profile(
        name,
        images.get(image, image),
        tuple(command),
        _limits(entry["limits"], f"{where}.limits"),
        pool=whole(entry.get("pool", 0), f"{where}.pool", 0, _MAX_POOL),
        counters=counters,
        mounts=_mounts(entry.get("mounts", []), f"{where}.mounts"),
    )


def _mounts(value: object, where: str) -> tuple[Mount, ...]:
    if not isinstance(value, list):
        raise PolicyError(f"{where} must be a list")
    mounts: list[Mount] = []
    for number, item in enumerate(value):
        entry = mapping(item, f"{where}[{number}]", required={"source", "target"})
        source = path_outside(entry["source"], f"{where}[{number}].source", CLOSED_SOURCES)
        target = path_outside(entry["target"], f"{where}[{number}].target", _TAKEN_TARGETS)
        if any(overlap(target, mount.target) for mount in mounts):
            raise PolicyError(f"{where}[{number}].target {target!r} is another mount's, or in it")
        mounts.append(Mount(source, target))
    return tuple(mounts)


def _limits(value: object, where: str) -> Limits:
    entry = mapping(value, where, required={field.name for field in fields(Limits)})
    seconds = entry.pop("seconds")
    if type(seconds) not in (int, float) or not 0 < seconds <= 10**7:
        raise PolicyError(f"{where}.seconds is {seconds!r}, not a number above 0")
    cpus = entry.pop("cpus")
    cpus = str(cpus) if type(cpus) is int else cpus
    if not isinstance(cpus, str) or not (cpus == JOBS_CPUS or _CPULIST.fullmatch(cpus)):
        raise PolicyError(f"{where}.cpus is {cpus!r}, neither a list as in 0-3,8 nor {JOBS_CPUS}")
    numbers = {name: whole(entry[name], f"{where}.{name}", *_RANGES[name]) for name in entry}
    return Limits(seconds=seconds, cpus=cpus, **numbers)
