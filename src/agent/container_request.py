"""What a user may ask of the agent about containers: the fields of a request, each checked before anything is done."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from agent import ports
from agent.wire import Refused, shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_ENGINE_NAME = re.compile(r"u[0-9]{1,10}\.[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_HOLD_FIELDS = {"v", "type", "job", "user", "name", "image", "ports", "again"}

Value = TypeVar("Value")


def field(request: dict[str, Any], name: str, kind: type[Value]) -> Value:
    """Return a field of a request; Refused if it is missing or of another kind."""
    value = request.get(name)
    if type(value) is not kind:
        raise Refused("field", f"{name} is {shown(value)}, not of type {kind.__name__}")
    return value


def name_of(request: dict[str, Any], *, administrator: bool) -> str:
    """Return the container's name in a request: its owner's, an administrator's as the engine knows it."""
    name = field(request, "name", str)
    if not (_ENGINE_NAME if administrator else _NAME).fullmatch(name):
        raise Refused("name", f"{shown(name)} is no container's name")
    return name


def hold_request(message: dict[str, Any]) -> dict[str, Any]:
    """Return the request of a job's step for a container (`agent.containers.Containers.hold`)."""
    unknown = sorted(set(message) - _HOLD_FIELDS)
    if unknown:
        raise Refused("field", f"unknown field {shown(unknown[0])}; known: {', '.join(sorted(_HOLD_FIELDS))}")
    job = field(message, "job", int)
    if not 0 < job < 2**32:
        raise Refused("field", f"job is {shown(job)}, not a job's number")
    for name in ("user", "image"):
        field(message, name, str)
    field(message, "again", bool)
    if not 0 <= field(message, "ports", int) <= ports.MOST:
        raise Refused("field", f"ports is {shown(message['ports'])}, not a number from 0 to {ports.MOST}")
    name_of(message, administrator=False)
    return message
