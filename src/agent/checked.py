"""Values of the administrator's policy, each checked: what is unknown, missing or out of range is named."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Any

import yaml

# What no container may see, nor anything that it lies in: the kernel's files, sockets (the engine's among them), and
# what the engine and the agent keep.
CLOSED_SOURCES = ("/proc", "/sys", "/dev", "/run", "/var/run", "/var/lib/docker", "/var/lib/containerd")


class PolicyError(Exception):
    """The policy is wrong; the message says where."""


class Loader(yaml.SafeLoader):
    """YAML's plain values only, and each key once (one that a merge brings may be said anew)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        values = [self.construct_object(key) for key in keys]
        for number, value in enumerate(values):
            if value in values[:number]:
                raise PolicyError(f"{value!r} stands twice, again in line {keys[number].start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def mapping(
    value: object, where: str, *, required: set[str], optional: frozenset[str] | set[str] = frozenset()
) -> dict[str, Any]:
    """Return a mapping that has all that is required, and nothing that is not known."""
    if not isinstance(value, dict):
        raise PolicyError(f"{where} must be a mapping")
    known = required | optional
    for key in value:
        if key not in known:
            raise PolicyError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")
    for key in sorted(required):
        if key not in value:
            raise PolicyError(f"{where}: {key} is missing")
    return dict(value)


def whole(value: object, where: str, least: int, most: int) -> int:
    """Return a whole number in a range."""
    if type(value) is not int or not least <= value <= most:
        raise PolicyError(f"{where} is {value!r}, not a whole number from {least} to {most}")
    return value


def path_outside(value: object, where: str, closed: tuple[str, ...]) -> str:
    """Return an absolute path, written plainly, that neither lies in one of those that are closed nor holds one."""
    if not isinstance(value, str) or not value.isprintable() or not value.startswith("/"):
        raise PolicyError(f"{where} is {value!r}, not an absolute path")
    # Two slashes at the start are left alone by normpath.
    if value != os.path.normpath(value) or value.startswith("//"):
        raise PolicyError(f"{where} is {value!r}; written plainly it is {os.path.normpath(value).replace('//', '/')!r}")
    for path in closed:
        if overlap(value, path):
            raise PolicyError(f"{where} is {value!r}: what is in {path} cannot be mounted, nor over it")
    return value


def overlap(one: str, other: str) -> bool:
    """Return whether one of two paths lies in the other, or they are the same."""
    first, second = (path.rstrip("/") + "/" for path in (one, other))
    return first.startswith(second) or second.startswith(first)
