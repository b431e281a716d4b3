"""The worker's engine, over its Unix socket: the few requests that sandboxes need."""

import http.client
import json
import socket
from typing import Any
from urllib.parse import quote, urlencode

SOCKET = "/var/run/docker.sock"
_TIMEOUT_S = 60.0


class EngineError(Exception):
    """The engine cannot be reached, or says no; `status` is HTTP's, 0 where there was no answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
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

    def kill(self, container: str) -> None:
        """Kill all processes of a container; one that does not run is as it should be."""
        self._request("POST", f"/containers/{container}/kill", accept=(404, 409))

    def remove(self, container: str) -> None:
        """Kill and remove a container; one that is gone, or going, is as it should be."""
        self._request("DELETE", f"/containers/{container}?force=1&v=1", accept=(404, 409))

    def containers(self, label: str) -> list[str]:
        """Return the ids of all containers with a label, running or not."""
        filters = json.dumps({"label": [label]})
        found = self._request("GET", f"/containers/json?{urlencode({'all': 1, 'filters': filters})}")
        return [str(container["Id"]) for container in found]

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, accept: tuple[int, ...] = ()
    ) -> Any:
        connection = _Connection(self._path)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"} if content else {})
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(0, f"the engine does not answer: {error}") from error
        finally:
            connection.close()
        if response.status >= 400 and response.status not in accept:
            raise EngineError(response.status, _message(answer) or f"the engine answers {response.status}")
        return json.loads(answer) if answer and response.status < 400 else None


def _message(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["message"])
    except (ValueError, KeyError, TypeError):
        return answer.decode(errors="replace").strip()
