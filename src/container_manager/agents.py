"""The workers' agents, asked over the network: all at once, or one. `agent.letters` says how one speaks to them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from agent import letters
from agent.letters import LetterError
from agent.munge import MungeError
from container_manager.errors import ContainerError

SERVICE = "agent"
"""Under this name the cluster's DNS has the addresses of all of them."""

_CONNECT_S = 2.0
_ANSWER_S = 90.0
_TRANSFER_S = 1800.0
_TRANSFERS = ("commit", "fetch")
_AT_ONCE = 64
_STDOUT = 1
_HEADING = 8  # of a piece of output: stream (1), nothing (3), length (4), as the engine's API has it

Item = TypeVar("Item")
Result = TypeVar("Result")


class AgentRefused(ContainerError):
    """An agent refuses what it was asked; `code` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Gone(Exception):
    """A machine does not answer."""


class Stream:
    """The streams of a command in a container."""

    def __init__(self, connection: socket.socket, machine: str) -> None:
        self._connection = connection
        self._machine = machine
        self._sending = threading.Lock()

    def send(self, kind: bytes, content: bytes = b"") -> None:
        """Send a piece (`agent.letters`) to the command; may be called from any thread."""
        with self._sending, contextlib.suppress(OSError):
            letters.send_piece(self._connection, kind, content)

    def pieces(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield what comes, up to the command's exit; a ContainerError if the machine goes away before."""
        kind = b""
        while kind != letters.EXIT:
            try:
                kind, content = letters.receive_piece(self._connection)
            except (OSError, EOFError, LetterError) as error:
                raise ContainerError(f"{self._machine} went away while the command ran: {error}") from error
            yield kind, content

    def relay(self, output: Callable[[int, bytes], None], *, terminal: bool = False) -> int | None:
        """Pass on a command's output until it ends; return its exit status, None if its container ended meanwhile.

        Args:
            output: gets 1 or 2, for standard output or error, and bytes.
            terminal: whether it has one: then all is standard output.
        """
        unfinished = b""
        for kind, content in self.pieces():
            if kind == letters.EXIT:
                status = letters.parse(content).get("status")
                return None if status is None else int(status)
            if terminal:
                output(_STDOUT, content)
            else:
                unfinished = _pass_on(unfinished + content, output)
        raise AssertionError("a stream ends with an exit")

    def close(self) -> None:
        """Be gone; the agent ends the command then, if it still runs."""
        self._connection.close()


class _Agent:
    """One connection to one agent; requests on it follow each other."""

    def __init__(self, address: str) -> None:
        self._connection = socket.create_connection((address, letters.PORT), timeout=_CONNECT_S)
        try:
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            greeting = letters.parse(letters.receive(self._connection))
        except BaseException:
            self._connection.close()
            raise
        self.node = str(greeting.get("node"))
        self._nonce = greeting.get("nonce")
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            reply = letters.nonce()
            known = {"v": letters.VERSION, "node": self.node, "nonce": self._nonce, "reply": reply}
            self._connection.settimeout(_TRANSFER_S if request["type"] in _TRANSFERS else _ANSWER_S)
            letters.send(self._connection, letters.seal({**request, **known}))
            answer, uid = letters.unseal(letters.receive(self._connection))
            # Only root on the node that was asked can have made this answer to this question.
            if uid != 0 or answer.get("reply") != reply or answer.get("node") != self.node:
                raise LetterError("the answer is not from this node's agent")
            self._nonce = answer["nonce"]
        if answer["type"] == "refused":
            raise AgentRefused(str(answer["code"]), str(answer["message"]))
        return answer

    def release(self) -> socket.socket:
        self._connection.settimeout(None)
        return self._connection

    def close(self) -> None:
        self._connection.close()


class Agents:
    """The agents of all machines; connections to them are made once and kept."""

    def __init__(self) -> None:
        self._connected: dict[str, _Agent] | None = None
        self._lock = threading.Lock()

    @property
    def machines(self) -> list[str]:
        """The machines whose agents answer."""
        return sorted(self._agents())

    def ask_all(self, kind: str, **fields: Any) -> dict[str, dict[str, Any]]:
        """Ask all at once; return the answers of those that answer, by machine.

        Raises:
            AgentRefused: one refuses.
            ContainerError: MUNGE does not work here.
        """

        def ask(machine: str) -> dict[str, Any] | None:
            with contextlib.suppress(_Gone):
                return self._ask(machine, {"type": kind, **fields})
            return None

        machines = self.machines
        answers = dict(zip(machines, together(ask, machines), strict=True))
        return {machine: answer for machine, answer in answers.items() if answer is not None}

    def ask(self, machine: str, kind: str, **fields: Any) -> dict[str, Any]:
        """Ask one; errors as of `ask_all`, and a ContainerError if it does not answer."""
        try:
            return self._ask(machine, {"type": kind, **fields})
        except _Gone as error:
            raise ContainerError(f"{machine} does not answer: {error}", "sinfo shows how the machines are") from error

    def run(self, machine: str, **fields: Any) -> Stream:
        """Run a command in a container and return its streams; errors as of `ask`."""
        self.ask(machine, "exec", **fields)
        with self._lock:
            agent = self._agents().pop(machine)
        return Stream(agent.release(), machine)

    def close(self) -> None:
        """Close all connections."""
        for agent in (self._connected or {}).values():
            agent.close()
        self._connected = None

    def _ask(self, machine: str, request: Mapping[str, Any]) -> dict[str, Any]:
        agent = self._agents().get(machine) or self._again(machine)
        try:
            return agent.ask(request)
        except MungeError as error:
            raise ContainerError(f"{error}", "is munged running here?") from error
        except (OSError, EOFError, LetterError) as error:
            agent.close()
            self._agents().pop(machine, None)
            raise _Gone(str(error)) from error

    def _agents(self) -> dict[str, _Agent]:
        if self._connected is None:
            found = together(_connected, _addresses(SERVICE))
            self._connected = {agent.node: agent for agent in found if agent}
        return self._connected

    def _again(self, machine: str) -> _Agent:
        """Connect once more to a machine whose connection is used up."""
        for agent in filter(None, together(_connected, _addresses(SERVICE))):
            if agent.node == machine:
                self._agents()[machine] = agent
            else:
                agent.close()
        try:
            return self._agents()[machine]
        except KeyError:
            raise _Gone("its agent is not there") from None


def together(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return what a function returns for each of these, called at once; the first error is raised."""
    items = list(items)
    if len(items) < 2:
        return [function(item) for item in items]
    pool = ThreadPoolExecutor(min(_AT_ONCE, len(items)))
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _addresses(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, letters.PORT, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise ContainerError(f"no machine's agent can be found: {error}", "sinfo shows how the machines are") from error
    return sorted({str(address[0]) for *_, address in found})


def _connected(address: str) -> _Agent | None:
    try:
        return _Agent(address)
    except (OSError, EOFError, LetterError):
        return None


def _pass_on(content: bytes, output: Callable[[int, bytes], None]) -> bytes:
    """Pass on the whole pieces of the engine's; return what is left of one that has not come yet."""
    while len(content) >= _HEADING:
        end = _HEADING + int.from_bytes(content[4:_HEADING])
        if len(content) < end:
            break
        output(content[0], content[_HEADING:end])
        content = content[end:]
    return content
