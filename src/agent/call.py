"""Ask this machine's agent to run one call in a sandbox: what a job step does, as the user who owns the job.

Nothing here has a right that the user lacks. Only the standard library is used.
"""

from __future__ import annotations

import _socket as socket
import posix as os

from agent import wire
from agent.wire import SOCKET, Refused

TYPE_CHECKING = False  # the module `typing` takes longer to load than all of this
if TYPE_CHECKING:
    from typing import Any

__all__ = ["SOCKET", "Call", "Ended", "Hold", "Refused", "hold", "ping"]

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
        request = {"id": self.id, "job": job, "profile": profile, "seconds": seconds, "memory_mb": memory_mb}
        self._connection = _ask("call", request, socket_path, (channel.fileno(), stdout, stderr))
        self._connection.settimeout(None)

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


class Hold:
    """A job that measures by its calls alone; to close it is to say that this is so no longer."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.setblocking(False)

    @property
    def lost(self) -> bool:
        """Whether the agent has ended it: it was restarted, or the job is over."""
        try:
            self._connection.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        """Give it up."""
        self._connection.close()


def hold(*, job: int, socket_path: str = SOCKET) -> Hold:
    """Tell the agent that a job of the user's measures by its calls alone, so that it may work between them.

    Raises:
        Refused: the user has no such job on this machine, or it is held already.
        OSError: there is no agent to speak to.
    """
    connection = _ask("lease", {"job": job}, socket_path)
    try:
        answer, _ = wire.receive(connection)
        if answer.get("type") == "refused":
            raise Refused(str(answer["code"]), str(answer["message"]))
        return Hold(connection)
    except BaseException as error:
        connection.close()
        if isinstance(error, EOFError):
            raise ConnectionError("the agent went away") from error
        raise


def ping(socket_path: str = SOCKET) -> None:
    """Return if this machine's agent answers.

    Raises:
        OSError: it does not.
    """
    connection = _ask("ping", {}, socket_path)
    try:
        wire.receive(connection)
    except EOFError as error:
        raise ConnectionError("the agent went away") from error
    finally:
        connection.close()


def _ask(kind: str, request: dict[str, Any], path: str, descriptors: tuple[int, ...] = ()) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_CONNECT_S)
        connection.connect(path)
        wire.send(connection, {"v": wire.VERSION, "type": kind, **request}, descriptors)
    except BaseException:
        connection.close()
        raise
    return connection
