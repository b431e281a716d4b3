"""Ask this machine's agent to run one call in a sandbox: what a job step does, as the user who owns the job.

Nothing here has a right that the user lacks. Only the standard library is used.
"""

from __future__ import annotations

import os
import socket

from agent import wire
from agent.wire import SOCKET, Refused

TYPE_CHECKING = False  # the module `typing` takes longer to load than all of this
if TYPE_CHECKING:
    from typing import Any

__all__ = ["SOCKET", "Call", "Ended", "Refused", "hold"]

_CONNECT_S = 1.0


class Ended:
    """How a call ended, in the agent's words.

    Attributes:
        reason: "exited", "time", "memory", "processes", "cancelled" or "error".
        exit_status: of the call's process, negative for the signal that killed it; None where the agent destroyed it.
        detail: more about the reason, or "".
        usage: wall_s, user_s, system_s, peak_memory_mb; None where it cannot be known.
        node: the machine's fingerprint.
    """

    def __init__(self, message: dict[str, Any]) -> None:
        self.reason: str = message["reason"]
        self.exit_status: int | None = message["exit_status"]
        self.detail: str = message["detail"]
        self.usage: dict[str, float | None] = message["usage"]
        self.node: dict[str, Any] = message["node"]


class Call:
    """One call that the agent was asked for; to close it is to cancel it."""

    def __init__(
        self,
        *,
        job: int,
        profile: str,
        seconds: float | None,
        memory_mb: int | None,
        channel: socket.socket,
        stdout: int,
        stderr: int,
        socket_path: str = SOCKET,
    ) -> None:
        """Send the request with its descriptors, which stay the caller's to close.

        Args:
            job: the number of a job that the user has on this machine.
            profile: one of the policy's.
            seconds, memory_mb: limits lower than the profile's; None for the profile's.
            channel: a connected Unix stream socket, over which the call's process is spoken to.
            stdout, stderr: pipes or Unix stream sockets for what it writes.

        Raises:
            OSError: there is no agent to speak to.
        """
        self.id = os.urandom(16).hex()
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._connection.settimeout(_CONNECT_S)
            self._connection.connect(socket_path)
            request = {"id": self.id, "job": job, "profile": profile, "seconds": seconds, "memory_mb": memory_mb}
            message = {"v": wire.VERSION, "type": "call", **request}
            wire.send(self._connection, message, (channel.fileno(), stdout, stderr))
            self._connection.settimeout(None)
        except BaseException:
            self._connection.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor that is readable when the agent has something to say."""
        return self._connection.fileno()

    def take(self) -> dict[str, Any] | Ended:
        """Return what the agent says next: how the call ended, or before that a message, of which "started" is one.

        Raises:
            Refused: the agent refuses the call.
            ConnectionError: the agent is gone, and the sandbox with it.
        """
        try:
            message, _ = wire.receive(self._connection)
        except EOFError as error:
            raise ConnectionError("the agent went away during the call") from error
        if message.get("type") == "refused":
            raise Refused(str(message["code"]), str(message["message"]))
        return Ended(message) if message.get("type") == "ended" else message

    def close(self) -> None:
        """Give the call up: the agent destroys the sandbox at once."""
        self._connection.close()


def hold(*, job: int, socket_path: str = SOCKET) -> socket.socket:
    """Tell the agent that the machine is quiet between the calls of a job, until the returned socket is closed.

    Raises:
        Refused: the user has no such job here.
        OSError: there is no agent to speak to.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_CONNECT_S)
        connection.connect(socket_path)
        wire.send(connection, {"v": wire.VERSION, "type": "lease", "job": job})
        message, _ = wire.receive(connection)
    except EOFError as error:
        connection.close()
        raise ConnectionError("the agent went away") from error
    except BaseException:
        connection.close()
        raise
    if message.get("type") == "refused":
        connection.close()
        raise Refused(str(message["code"]), str(message["message"]))
    return connection
