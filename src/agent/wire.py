"""Packets between the agent, who asks it, and a sandbox: one JSON object each, with open descriptors beside it.

The sockets are SOCK_SEQPACKET: a packet comes whole or not at all, so there is no length to believe. Only the standard
library is used, and little of it: the client's side is loaded before every call.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

VERSION = 1
VERSIONS = (1,)
SOCKET = "/run/cfiddle-agent/agent.sock"
MAX_PACKET = 64 * 1024
DESCRIPTORS = ("channel", "stdout", "stderr")

_HEX = frozenset("0123456789abcdef")
_PROFILE = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
_CALL_FIELDS = frozenset({"v", "type", "id", "job", "profile", "seconds", "memory_mb"})
_REQUIRED = ("id", "job", "profile")
_MAX_SECONDS = 10**7
_MAX_MEMORY_MB = 2**30


class Refused(Exception):
    """A request is refused; `code` is for programs, the text for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CallRequest(NamedTuple):
    """A valid request for one call; None for a limit means the profile's own."""

    id: str
    job: int
    profile: str
    seconds: float | None
    memory_mb: int | None


def send(connection: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send one packet."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_PACKET:
        raise ValueError(f"a packet of {len(data)} bytes (at most {MAX_PACKET})")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    connection.sendmsg([data], rights)


def receive(connection: socket.socket, *, descriptors: int = 0) -> tuple[dict[str, Any], list[int]]:
    """Return the next packet and the descriptors that came with it, which the caller then owns.

    Args:
        descriptors: how many may come; more are closed and refused.

    Raises:
        EOFError: the other side closed the connection.
        Refused: it is no packet of this protocol.
    """
    size = array.array("i").itemsize
    space = socket.CMSG_SPACE(descriptors * size) if descriptors else 0
    data, ancillary, flags, _ = connection.recvmsg(MAX_PACKET, space, socket.MSG_CMSG_CLOEXEC)
    received = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(content[: len(content) - len(content) % size])
    try:
        if not data and not received:
            raise EOFError("the other side closed the connection")
        if flags & socket.MSG_CTRUNC or len(received) > descriptors:
            raise Refused("malformed", f"more than {descriptors} descriptors came with a packet")
        if flags & socket.MSG_TRUNC:
            raise Refused("malformed", f"a packet has more than {MAX_PACKET} bytes")
        return decode(data), received.tolist()
    except BaseException:
        close(received)
        raise


def decode(data: bytes) -> dict[str, Any]:
    """Return the JSON object in a packet; refuse everything else, and an object that says something twice."""
    try:
        value = json.loads(data, object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused("malformed", f"a packet is not a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise Refused("malformed", "a packet is not a JSON object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field stands in it twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def close(descriptors: Iterable[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def check_version(message: dict[str, Any]) -> None:
    """Refuse a message of a version that is not spoken here, and say which are."""
    version = message.get("v")
    if type(version) is not int or version not in VERSIONS:
        known = ", ".join(map(str, VERSIONS))
        raise Refused("version", f"version {_shown(version)} is not spoken here; known: {known}")


def call_request(message: dict[str, Any]) -> CallRequest:
    """Return the request in a message of type `call` whose version was checked.

    Raises:
        Refused: a field is unknown, missing, or has a value that it cannot have.
    """
    unknown = sorted(set(message) - _CALL_FIELDS)
    if unknown:
        known = ", ".join(sorted(_CALL_FIELDS))
        raise Refused("field", f"unknown field {_shown(unknown[0])} in version {VERSION}; known: {known}")
    missing = [name for name in _REQUIRED if name not in message]
    if missing:
        raise Refused("field", f"field {missing[0]} is missing")
    identifier, job, profile = (message[name] for name in _REQUIRED)
    seconds, memory_mb = message.get("seconds"), message.get("memory_mb")
    if not (isinstance(identifier, str) and len(identifier) == 32 and set(identifier) <= _HEX):
        raise Refused("field", f"id is {_shown(identifier)}, not 32 hexadecimal digits")
    if type(job) is not int or not 0 < job < 2**32:
        raise Refused("field", f"job is {_shown(job)}, not a job's number")
    if not (isinstance(profile, str) and 0 < len(profile) <= 32 and set(profile) <= _PROFILE and profile[0].isalnum()):
        raise Refused("field", f"profile is {_shown(profile)}; a profile's name has up to 32 of a-z, 0-9, - and _")
    if seconds is not None and (type(seconds) not in (int, float) or not 0 < seconds <= _MAX_SECONDS):
        raise Refused("field", f"seconds is {_shown(seconds)}, not a number above 0")
    if memory_mb is not None and (type(memory_mb) is not int or not 0 < memory_mb <= _MAX_MEMORY_MB):
        raise Refused("field", f"memory_mb is {_shown(memory_mb)}, not a whole number above 0")
    return CallRequest(identifier, job, profile, seconds, memory_mb)


def _shown(value: object) -> str:
    """Return a stranger's value as it may stand in a message: ASCII without control characters, and short."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
