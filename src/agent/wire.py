"""Packets between the agent, who asks it, and a sandbox: one JSON object each, with open descriptors beside it.

The sockets are SOCK_SEQPACKET: a packet comes whole or not at all, so there is no length to believe. Only the standard
library is used, and little of it: the client's side is loaded before every call.
"""

from __future__ import annotations

# Of `socket` only the part in C: the rest loads `selectors` and `enum`.
import _socket as socket
import posix as os
import sys

from agent import compact

TYPE_CHECKING = False  # the module `typing` takes longer to load than all of this
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

VERSION = 2
VERSIONS = (2,)
SOCKET = "/run/cfiddle-agent/agent.sock"
MAX_PACKET = 64 * 1024
_INT_BYTES = 4
DESCRIPTORS = ("channel", "stdout", "stderr")


class Refused(Exception):
    """A request is refused; `code` is for programs, the text for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def send(connection: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send one packet."""
    data = compact.encode(message)
    if len(data) > MAX_PACKET:
        raise ValueError(f"a packet of {len(data)} bytes (at most {MAX_PACKET})")
    rights = b"".join(descriptor.to_bytes(_INT_BYTES, sys.byteorder) for descriptor in descriptors)
    connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else [])


def receive(connection: socket.socket, *, descriptors: int = 0) -> tuple[dict[str, Any], list[int]]:
    """Return the next packet and the descriptors that came with it, which the caller then owns.

    Args:
        descriptors: how many may come; more are closed and refused.

    Raises:
        EOFError: the other side closed the connection.
        Refused: it is no packet of this protocol.
    """
    space = socket.CMSG_SPACE(descriptors * _INT_BYTES) if descriptors else 0
    data, ancillary, flags, _ = connection.recvmsg(MAX_PACKET, space, socket.MSG_CMSG_CLOEXEC)
    received: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(content) - len(content) % _INT_BYTES
            found = (content[start : start + _INT_BYTES] for start in range(0, whole, _INT_BYTES))
            received += [int.from_bytes(descriptor, sys.byteorder) for descriptor in found]
    try:
        if not data and not received:
            raise EOFError("the other side closed the connection")
        if flags & socket.MSG_CTRUNC or len(received) > descriptors:
            raise Refused("malformed", f"more than {descriptors} descriptors came with a packet")
        if flags & socket.MSG_TRUNC:
            raise Refused("malformed", f"a packet has more than {MAX_PACKET} bytes")
        return decode(data), received
    except BaseException:
        close(received)
        raise


def decode(data: bytes) -> dict[str, Any]:
    """Return the JSON object in a packet; refuse everything else, and an object that says something twice."""
    try:
        value = _decode(data)
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


_decode = compact.decoder(object_pairs_hook=_object, parse_constant=_no_constant)


def close(descriptors: Iterable[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        try:  # noqa: SIM105  (`contextlib` would be loaded before every call)
            os.close(descriptor)
        except OSError:
            pass


def check_version(message: dict[str, Any]) -> None:
    """Refuse a message of a version that is not spoken here, and say which are."""
    version = message.get("v")
    if type(version) is not int or version not in VERSIONS:
        known = ", ".join(map(str, VERSIONS))
        raise Refused("version", f"version {shown(version)} is not spoken here; known: {known}")


def shown(value: object) -> str:
    """Return a stranger's value as it may stand in a message: ASCII without control characters, and short."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
