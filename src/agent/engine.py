"""The worker's engine, over its Unix socket: the few requests that sandboxes and users' containers need."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

SOCKET = "/var/run/docker.sock"
_TIMEOUT_S = 60.0
_LONG_S = 1800.0


class EngineError(Exception):
    """The engine cannot be reached, or says no; `status` is HTTP's, 0 where there was no answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float | None = _TIMEOUT_S) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the engine's socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Engine:
    """A client whose methods may be called from any thread: each request has a connection of its own."""

    def __init__(self, path: str = SOCKET) -> None:
        self._path = path

    def info(self) -> dict[str, Any]:
        """Return what the engine says of itself."""
        return dict(self._request("GET", "/info"))

    def image(self, reference: str) -> dict[str, Any]:
        """Return what is known of an image; an EngineError of status 404 if it is not here."""
        return dict(self._request("GET", f"/images/{quote(reference, safe='/:@')}/json"))

    def create(self, name: str, configuration: dict[str, Any]) -> str:
        """Create a container and return its id."""
        return str(self._request("POST", f"/containers/create?{urlencode({'name': name})}", configuration)["Id"])

    def start(self, container: str) -> None:
        """Start a created container."""
        self._request("POST", f"/containers/{container}/start")

    def update(self, container: str, limits: dict[str, Any]) -> None:
        """Put other limits of memory and CPUs in force in a container that runs."""
        self._request("POST", f"/containers/{container}/update", limits)

    def inspect(self, container: str) -> dict[str, Any]:
        """Return a container's state and configuration."""
        return dict(self._request("GET", f"/containers/{container}/json"))

    def wait(self, container: str) -> int:
        """Wait for a container's end and return its first process's status."""
        return int(self._request("POST", f"/containers/{container}/wait")["StatusCode"])

    def logs(self, container: str) -> bytes:
        """Return what a container with a terminal has written."""
        return self._answer("GET", f"/containers/{container}/logs?stdout=1&stderr=1", headers={}, timeout_s=_TIMEOUT_S)

    def ending(self, container: str) -> Ending:
        """Return something that tells of the end of a container that runs."""
        connection = _Connection(self._path, timeout_s=None)
        try:
            # The engine answers at once, says the rest when the container ends, and closes: that is heard in any case.
            path = f"/containers/{container}/wait?condition=not-running"
            connection.request("POST", path, headers={"Connection": "close"})
            return Ending(connection.getresponse())
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise EngineError(0, f"the engine does not answer: {error}") from error

    def stop(self, container: str, *, grace_s: int) -> None:
        """Tell a container's first process to end, and kill all of it after some seconds; wait for that."""
        self._request("POST", f"/containers/{container}/stop?t={grace_s}", accept=(304, 404))

    def kill(self, container: str) -> None:
        """Kill all processes of a container; one that does not run is as it should be."""
        self._request("POST", f"/containers/{container}/kill", accept=(404, 409))

    def remove(self, container: str) -> None:
        """Kill and remove a container; one that is gone, or going, is as it should be."""
        self._request("DELETE", f"/containers/{container}?force=1&v=1", accept=(404, 409))

    def containers(self, label: str) -> list[str]:
        """Return the ids of all containers with a label, running or not."""
        return [str(container["Id"]) for container in self.listed(label)]

    def listed(self, *labels: str, sizes: bool = False) -> list[dict[str, Any]]:
        """Return what is known of all containers with these labels, running or not, the newest first.

        Args:
            sizes: whether the bytes are counted that each has written, as `SizeRw`.
        """
        query = urlencode({"all": 1, "size": int(sizes), "filters": json.dumps({"label": labels})})
        return list(self._request("GET", f"/containers/json?{query}"))

    def execute(self, container: str, configuration: dict[str, Any]) -> Command:
        """Run a command in a container that runs."""
        identifier = str(self._request("POST", f"/containers/{container}/exec", configuration)["Id"])
        terminal = bool(configuration.get("Tty"))
        connection = _Connection(self._path, timeout_s=_TIMEOUT_S)
        try:
            headers = {"Content-Type": "application/json", "Connection": "Upgrade", "Upgrade": "tcp"}
            body = json.dumps({"Detach": False, "Tty": terminal})
            connection.request("POST", f"/exec/{identifier}/start", body, headers)
            if _head(connection.sock).split()[1] not in (b"101", b"200"):
                raise EngineError(0, f"the command cannot be run: {_message(connection.sock.recv(4096))}")
            connection.sock.settimeout(None)
            return Command(self, identifier, connection.sock)
        except OSError as error:
            connection.close()
            raise EngineError(0, f"the engine does not answer: {error}") from error
        except BaseException:
            connection.close()
            raise

    def exec_status(self, identifier: str) -> int | None:
        """Return the exit status of a command that was run; None while it runs."""
        status = self._request("GET", f"/exec/{identifier}/json")["ExitCode"]
        return None if status is None else int(status)

    def exec_resize(self, identifier: str, *, rows: int, columns: int) -> None:
        """Tell a command's terminal its size."""
        self._request("POST", f"/exec/{identifier}/resize?h={rows}&w={columns}")

    def volume(self, name: str) -> dict[str, Any]:
        """Return what is known of a volume."""
        return dict(self._request("GET", f"/volumes/{quote(name, safe='')}"))

    def network(self, name: str) -> dict[str, Any]:
        """Return what is known of a network; an EngineError of status 404 if it is not here."""
        return dict(self._request("GET", f"/networks/{name}"))

    def create_network(self, configuration: dict[str, Any]) -> None:
        """Create a network."""
        self._request("POST", "/networks/create", configuration)

    def images(self) -> list[dict[str, Any]]:
        """Return what is known of all images."""
        return list(self._request("GET", "/images/json"))

    def commit(self, container: str, repository: str, tag: str, changes: Mapping[str, Any]) -> str:
        """Make an image of a container and return its id."""
        query = urlencode({"container": container, "repo": repository, "tag": tag, "pause": 1})
        return str(self._request("POST", f"/commit?{query}", dict(changes), timeout_s=_LONG_S)["Id"])

    def push(self, repository: str, tag: str, account: Mapping[str, str]) -> None:
        """Push an image to its registry."""
        path = f"/images/{quote(repository, safe='/:')}/push?{urlencode({'tag': tag})}"
        self._transfer(path, account)

    def pull(self, repository: str, tag: str, account: Mapping[str, str]) -> None:
        """Pull an image from its registry."""
        self._transfer(f"/images/create?{urlencode({'fromImage': repository, 'tag': tag})}", account)

    def remove_image(self, reference: str) -> None:
        """Take a name from an image, and remove it if that was its last; one that is gone is as it should be."""
        self._request("DELETE", f"/images/{quote(reference, safe='/:@')}", accept=(404,))

    def _transfer(self, path: str, account: Mapping[str, str]) -> None:
        # What goes wrong comes as a line in an answer that began well.
        headers = {"X-Registry-Auth": base64.urlsafe_b64encode(json.dumps(dict(account)).encode()).decode()}
        for line in self._answer("POST", path, headers=headers, timeout_s=_LONG_S).splitlines():
            if b'"error"' in line:
                raise EngineError(0, str(json.loads(line)["error"]))

    def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        accept: tuple[int, ...] = (),
        timeout_s: float = _TIMEOUT_S,
    ) -> Any:
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"} if content else {}
        answer = self._answer(method, path, content, headers=headers, accept=accept, timeout_s=timeout_s)
        return json.loads(answer) if answer else None

    def _answer(
        self,
        method: str,
        path: str,
        content: str | None = None,
        *,
        headers: Mapping[str, str],
        accept: tuple[int, ...] = (),
        timeout_s: float,
    ) -> bytes:
        connection = _Connection(self._path, timeout_s)
        try:
            connection.request(method, path, content, dict(headers))
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(0, f"the engine does not answer: {error}") from error
        finally:
            connection.close()
        if response.status >= 300 and response.status not in accept:
            raise EngineError(response.status, _message(answer) or f"the engine answers {response.status}")
        return answer if response.status < 300 else b""


class Ending:
    """Tells of the end of a container."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response

    def fileno(self) -> int:
        """Return the descriptor that is readable once the container has ended."""
        return self._response.fileno()

    def status(self) -> int:
        """Wait for the end and return the status of the container's first process."""
        try:
            return int(json.loads(self._response.read())["StatusCode"])
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            raise EngineError(0, f"the engine does not say how the container ended: {error}") from error

    def close(self) -> None:
        """Ask no longer."""
        self._response.close()


class Command:
    """A command that runs in a container.

    Attributes:
        stream: its streams: with a terminal plain bytes, else output in the engine's own pieces of 8 bytes of heading
            and what it tells the length of.
    """

    def __init__(self, engine: Engine, identifier: str, stream: socket.socket) -> None:
        self.stream = stream
        self._engine = engine
        self._identifier = identifier

    def resize(self, *, rows: int, columns: int) -> None:
        """Tell its terminal its size."""
        self._engine.exec_resize(self._identifier, rows=rows, columns=columns)

    def status(self) -> int | None:
        """Return its exit status; None while it runs."""
        return self._engine.exec_status(self._identifier)

    def close(self) -> None:
        """Listen no longer; the command goes on."""
        self.stream.close()


def _head(stream: socket.socket) -> bytes:
    """Read the head of an answer and not a byte more: what follows is a command's output."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = stream.recv(1)
        if not byte:
            raise ConnectionError("it closed the connection")
        head += byte
    return head


def _message(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["message"])
    except (ValueError, KeyError, TypeError):
        return answer.decode(errors="replace").strip()
