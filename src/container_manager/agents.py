"""The workers' agents, asked over the network: all at once, or one. `agent.letters` says how one speaks to them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from agent import letters
from agent.letters import LetterError
from agent.munge import MungeError
from container_manager import interrupts
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
        self.address = address
        self.node = str(greeting.get("node"))
        self.is_open = True
        self._nonce = greeting.get("nonce")

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
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
        self.is_open = False
        self._connection.settimeout(None)
        return self._connection

    def close(self) -> None:
        self.is_open = False
        self._connection.close()


class Agents:
    """The agents of all machines; connections to them are made as they are needed, and kept."""

    def __init__(self) -> None:
        self._found: dict[str, str] | None = None
        self._free: dict[str, list[_Agent]] = {}
        self._lock = threading.Lock()

    @property
    def machines(self) -> list[str]:
        """The machines whose agents answer."""
        return sorted(self._addresses())

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
            raise _no_answer(machine, error) from error

    def run(self, machine: str, **fields: Any) -> Stream:
        """Run a command in a container and return its streams; errors as of `ask`."""
        try:
            agent = self._taken(machine)
            with _as_gone(agent):
                agent.ask({"type": "exec", **fields})
        except _Gone as error:
            raise _no_answer(machine, error) from error
        return Stream(agent.release(), machine)

    def _ask(self, machine: str, request: Mapping[str, Any]) -> dict[str, Any]:
        agent = self._taken(machine)
        try:
            with _as_gone(agent):
                return agent.ask(request)
        finally:
            if agent.is_open:
                with self._lock:
                    self._free.setdefault(machine, []).append(agent)

    def _taken(self, machine: str) -> _Agent:
        """Return a connection that nobody else uses meanwhile."""
        addresses = self._addresses()
        with self._lock:
            if self._free.get(machine):
                return self._free[machine].pop()
        agent = _connected(addresses[machine]) if machine in addresses else None
        if agent is None:
            raise _Gone("its agent is not there")
        return agent

    def _addresses(self) -> dict[str, str]:
        with self._lock:
            if self._found is None:
                found = [agent for agent in together(_connected, _addresses_of(SERVICE)) if agent]
                self._free = {agent.node: [agent] for agent in found}
                self._found = {agent.node: agent.address for agent in found}
            return self._found


def _no_answer(machine: str, error: _Gone) -> ContainerError:
    return ContainerError(f"{machine} does not answer: {error}", "sinfo shows how the machines are")


@contextlib.contextmanager
def _as_gone(agent: _Agent) -> Iterator[None]:
    """Let whatever goes wrong with a connection close it, and be one error."""
    try:
        yield
    except AgentRefused:
        raise
    except MungeError as error:
        agent.close()
        raise ContainerError(f"{error}", "is munged running here?") from error
    except (OSError, EOFError, LetterError) as error:
        agent.close()
        raise _Gone(str(error)) from error
    except BaseException:
        agent.close()
        raise


def together(
    function: Callable[[Item], Result], items: Iterable[Item], *, giving_up: Callable[[], None] = lambda: None
) -> list[Result]:
    """Return what a function returns for each of these, called at once; the first error is raised.

    No call is interrupted half way. When this ends, by an error or Ctrl-C too, none of them goes on.

    Args:
        function: called in threads; must have a deadline, or be ended by `giving_up`.
        items: its arguments.
        giving_up: called when one has failed or Ctrl-C has come, before the others are waited for.
    """
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        with interrupts.put_off():
            futures = [pool.submit(function, item) for item in items]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in filter(Future.done, futures):
            future.result()
        return [future.result() for future in futures]
    except BaseException:
        with interrupts.put_off():
            giving_up()
        raise
    finally:
        with interrupts.put_off():
            pool.shutdown(cancel_futures=True)


def _addresses_of(name: str) -> list[str]:
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
