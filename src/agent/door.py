"""The agent's door to the network: a user's commands ask for what is done with containers outside of jobs.

Who asks is known by MUNGE (`agent.letters`). What runs is in a job, and is asked for on the machine itself
(`agent.server`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from typing import Any

from agent import letters
from agent.container_request import field, name_of
from agent.containers import Containers
from agent.engine import Command, EngineError
from agent.letters import LetterError
from agent.munge import MungeError
from agent.wire import Refused

_CONNECTIONS = 512
_PATIENCE_S = 10.0
_IDLE_S = 300.0
_MOST_WAIT_S = 60.0
_PIECE = 65536

log = logging.getLogger("agent")


class Door:
    """Listens on the network that the users' node and the workers share."""

    def __init__(self, containers: Containers, *, address: str, port: int = letters.PORT) -> None:
        self._containers = containers
        self._node = os.uname().nodename
        self._room = threading.Semaphore(_CONNECTIONS)
        self._listener = socket.create_server((address, port), backlog=256)

    def open(self) -> None:
        """Begin to let people in, each in a thread of its own."""
        threading.Thread(target=self._run, name="door", daemon=True).start()

    def _run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if not self._room.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(_PATIENCE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nonce = letters.nonce()
            greeting = {"v": letters.VERSION, "node": self._node, "nonce": nonce}
            letters.send(connection, letters.encoded(greeting))
            while nonce:
                nonce = self._answer(connection, nonce)
                connection.settimeout(_IDLE_S)
        except (EOFError, OSError):
            pass  # nobody is there any more
        except (LetterError, MungeError) as error:
            log.info("a stranger is turned away: %s", error)
        except Exception:
            log.exception("a request over the network failed")
        finally:
            connection.close()
            self._room.release()

    def _answer(self, connection: socket.socket, nonce: str) -> str:
        """Answer one request; return the nonce of the next one, "" if there can be none on this connection."""
        request, uid = letters.unseal(letters.receive(connection))
        if request.get("nonce") != nonce or request.get("node") != self._node:
            raise LetterError(f"user {uid} sent a request that was not made for this connection")
        upcoming = letters.nonce()
        command: Command | None = None
        try:
            if request.get("v") != letters.VERSION:
                raise Refused("version", f"version {request.get('v')!r} is not spoken here; known: {letters.VERSION}")
            answer, command = self._do(uid, request)
        except (Refused, EngineError) as error:
            code = error.code if isinstance(error, Refused) else "engine"
            answer = {"type": "refused", "code": code, "message": str(error)}
        answer |= {"reply": request.get("reply"), "node": self._node, "nonce": upcoming}
        letters.send(connection, letters.seal(answer, reader=uid))
        if command is None:
            return upcoming
        name = str(request["name"])
        with contextlib.closing(command):
            if not self._relay(connection, command):
                self._containers.end_command(uid, name, nonce)
        return ""

    def _do(self, uid: int, request: dict[str, Any]) -> tuple[dict[str, Any], Command | None]:
        containers, kind = self._containers, request.get("type")
        if kind == "list":
            return {"type": "containers", "containers": containers.listed(uid)}, None
        if kind == "images":
            return {"type": "images", "images": containers.images()}, None
        if kind == "outcome":
            wait_s = min(float(field(request, "wait_s", float)), _MOST_WAIT_S)
            found = containers.outcome(uid, field(request, "job", int), timeout_s=wait_s)
            return {"type": "outcome", "id": found}, None
        name = name_of(request, administrator=uid == 0)
        if kind == "inspect":
            return {"type": "container", "container": containers.inspected(uid, name)}, None
        if kind == "create":
            user, image = field(request, "user", str), field(request, "image", str)
            return {"type": "created", "id": containers.create(uid, user=user, name=name, image=image)}, None
        if kind == "stop":
            containers.stop(uid, name)
            return {"type": "stopped"}, None
        if kind == "delete":
            containers.delete(uid, name)
            return {"type": "deleted"}, None
        if kind == "exec":
            argv, terminal = field(request, "argv", list), field(request, "terminal", bool)
            if not argv or not all(isinstance(word, str) and "\0" not in word for word in argv):
                raise Refused("field", "argv is not a list of words")
            mark = str(request["nonce"])
            return {"type": "runs"}, containers.execute(uid, name, argv, terminal=terminal, mark=mark)
        raise Refused("field", "type is none of create, delete, exec, images, inspect, list, outcome, stop")

    def _relay(self, connection: socket.socket, command: Command) -> bool:
        """Pass bytes to and fro until the command ends; return False if the caller went away before."""
        connection.settimeout(None)
        gone = threading.Event()
        threading.Thread(target=self._pass_on, args=(connection, command, gone), daemon=True).start()
        try:
            while data := command.stream.recv(_PIECE):
                letters.send_piece(connection, letters.OUTPUT, data)
            if gone.is_set():
                return False
            letters.send_piece(connection, letters.EXIT, letters.encoded({"status": command.status()}))
        except OSError:
            return False
        return True

    def _pass_on(self, connection: socket.socket, command: Command, gone: threading.Event) -> None:
        """Pass on what comes for a command, until the caller is gone: then its output is not waited for either."""
        try:
            while True:
                kind, content = letters.receive_piece(connection)
                if kind == letters.INPUT:
                    command.stream.sendall(content)
                elif kind == letters.INPUT_ENDS:
                    command.stream.shutdown(socket.SHUT_WR)
                elif kind == letters.SIZE:
                    size = letters.parse(content)
                    command.resize(rows=field(size, "rows", int), columns=field(size, "columns", int))
                else:
                    raise LetterError("an unknown piece came")
        except (EOFError, OSError, LetterError, Refused, EngineError):
            gone.set()
            with contextlib.suppress(OSError):
                command.stream.shutdown(socket.SHUT_RDWR)
