"""What a user may ask of the agent about containers: the fields of a request, each checked before anything is done."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from agent import ports
from agent.wire import Refused, shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_ENGINE_NAME = re.compile(r"u[0-9]{1,10}\.[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_MOST_CELLS = 2**15
_MOST_WORDS = 2**14
_EVERY_FIELD = {"v", "type", "node", "nonce", "reply"}
_FIELDS: dict[str, set[str]] = {
    "amiss": set(),
    "commit": {"name", "image"},
    "create": {"name", "user", "image"},
    "delete": {"name"},
    "exec": {"name", "argv", "terminal", "rows", "columns"},
    "fetch": {"image"},
    "forget": {"image"},
    "gpus": set(),
    "images": set(),
    "inspect": {"name"},
    "list": set(),
    "outcome": {"job", "wait_s"},
    "stop": {"name"},
    "types": set(),
}
_HOLD_FIELDS = {"v", "type", "job", "user", "name", "image", "ports", "again"}

Value = TypeVar("Value")


def known(message: dict[str, Any]) -> dict[str, Any]:
    """Return what a request over the network says that means something: the rest takes memory while it is served."""
    kind = message.get("type")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise Refused("field", f"type is none of {', '.join(_FIELDS)}")
    return {name: value for name, value in message.items() if name in _EVERY_FIELD | _FIELDS[kind]}


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


def argv_of(request: dict[str, Any]) -> list[str]:
    """Return the words of a command in a request."""
    argv = field(request, "argv", list)
    if not argv or not all(isinstance(word, str) and "\0" not in word for word in argv):
        raise Refused("field", "argv is not a list of words")
    if len(argv) > _MOST_WORDS:
        raise Refused("field", f"argv has {len(argv)} words, more than {_MOST_WORDS}")
    return argv


def size_of(request: dict[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of a terminal in a request; None where it says nothing of them."""
    if "rows" not in request:
        return None
    rows, columns = field(request, "rows", int), field(request, "columns", int)
    if not (0 < rows < _MOST_CELLS and 0 < columns < _MOST_CELLS):
        raise Refused("field", f"{rows} rows and {columns} columns are no size of a terminal")
    return rows, columns


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
