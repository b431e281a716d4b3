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
import time
from typing import Any

from agent import duty, letters
from agent.container_request import argv_of, field, known, name_of, size_of
from agent.containers import Containers
from agent.engine import Command, EngineError
from agent.letters import LetterError
from agent.munge import MungeError
from agent.quiet import Quiet
from agent.wire import Refused, shown

_STRANGERS = 128
"""So many may be there who have not said yet who they are; the next one takes the place of the oldest."""
_CONNECTIONS_PER_USER = 128
"""A command asks an agent at most half as many things at once."""
_PATIENCE_S = 10.0
_IDLE_S = 300.0
_MOST_WAIT_S = 60.0
_IDLE_FOR_THE_ENGINE = ("outcome", "types")
_PIECE = 65536
_PAUSE_S = 0.1

log = logging.getLogger("agent")


class Door:
    """Listens on the network that the users' node and the workers share."""

    def __init__(self, containers: Containers, quiet: Quiet, *, address: str, port: int = letters.PORT) -> None:
        self._containers = containers
        self._quiet = quiet
        self._node = os.uname().nodename
        self._guests: dict[socket.socket, int | None] = {}  # the oldest first; with their uids as far as they are known
        self._lock = threading.Lock()
        self._listener = socket.create_server((address, port), backlog=256)

    def open(self) -> None:
        """Begin to let people in, each in a thread of its own."""
        duty.begin(self._run, "door")

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
                self._make_room()
                with self._lock:
                    self._guests[connection] = None
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            except (OSError, RuntimeError) as error:  # no descriptor or no thread is to be had just now
                log.warning("nobody can be let in: %s", error)
                time.sleep(_PAUSE_S)

    def _make_room(self) -> None:
        """Turn the oldest strangers away where there are too many: who waits for nobody cannot keep others out."""
        with self._lock:
            strangers = [guest for guest, uid in self._guests.items() if uid is None]
            for stranger in strangers[: max(0, len(strangers) - _STRANGERS + 1)]:
                del self._guests[stranger]
                with contextlib.suppress(OSError):
                    stranger.shutdown(socket.SHUT_RDWR)

    def _recognise(self, connection: socket.socket, uid: int) -> None:
        """Remember who somebody is; Refused if too many are there who are the same."""
        with self._lock:
            if self._guests.get(connection) is None:
                if list(self._guests.values()).count(uid) >= _CONNECTIONS_PER_USER:
                    raise Refused("busy", f"{_CONNECTIONS_PER_USER} connections of user {uid} are open here")
                self._guests[connection] = uid

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(_PATIENCE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _notice_loss(connection)
            nonce = letters.nonce()
            greeting = {"v": letters.VERSION, "node": self._node, "time": time.time(), "nonce": nonce}
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
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # ends what still reads from it in another thread
            connection.close()
            with self._lock:
                self._guests.pop(connection, None)

    def _answer(self, connection: socket.socket, nonce: str) -> str:
        """Answer one request; return the nonce of the next one, "" if there can be none on this connection."""
        request, uid = letters.unseal(letters.receive(connection))
        if request.get("nonce") != nonce or request.get("node") != self._node:
            raise LetterError(f"user {uid} sent a request that was not made for this connection")
        reply = request.get("reply")
        if not isinstance(reply, str):
            raise LetterError(f"user {uid} sent a request that does not say what its answer is to be known by")
        upcoming = letters.nonce()
        command: Command | None = None
        try:
            if request.get("v") != letters.VERSION:
                raise Refused(
                    "version", f"version {shown(request.get('v'))} is not spoken here; known: {letters.VERSION}"
                )
            self._recognise(connection, uid)
            request = known(request)
            if request["type"] not in _IDLE_FOR_THE_ENGINE:
                self._quiet.give_way(uid)
            answer, command = self._do(uid, request)
        except (Refused, EngineError) as error:
            code = error.code if isinstance(error, Refused) else "engine"
            answer = {"type": "refused", "code": code, "message": str(error)}
        answer |= {"reply": reply, "node": self._node, "nonce": upcoming}
        if command is None:
            letters.send(connection, letters.seal(answer, reader=uid))
            return upcoming
        with contextlib.closing(command):
            has_ended = False
            try:
                letters.send(connection, letters.seal(answer, reader=uid))
                has_ended = self._relay(connection, command)
            finally:
                if not has_ended:
                    self._containers.end_command(uid, str(request["name"]), nonce)
        return ""

    def _do(self, uid: int, request: dict[str, Any]) -> tuple[dict[str, Any], Command | None]:
        containers, kind = self._containers, request["type"]
        if kind == "list":
            return {"type": "containers", "containers": containers.listed(uid)}, None
        if kind == "images":
            return {"type": "images", "images": containers.images(uid)}, None
        if kind == "amiss":
            if uid != 0:
                raise Refused("rights", "that is the administrator's to ask")
            return {"type": "amiss", **containers.amiss()}, None
        if kind == "types":
            return {"type": "types", "types": containers.types()}, None
        if kind == "gpus":
            return {"type": "gpus", "report": containers.gpu_report()}, None
        if kind == "outcome":
            wait_s = min(float(field(request, "wait_s", float)), _MOST_WAIT_S)
            found = containers.outcome(uid, field(request, "job", int), timeout_s=wait_s)
            return {"type": "outcome", "id": found}, None
        if kind == "fetch":
            containers.fetch(uid, field(request, "image", str))
            return {"type": "fetched"}, None
        if kind == "forget":
            containers.forget(uid, field(request, "image", str))
            return {"type": "forgotten"}, None
        name = name_of(request, administrator=uid == 0)
        if kind == "inspect":
            return {"type": "container", "container": containers.inspected(uid, name)}, None
        if kind == "create":
            user, image = field(request, "user", str), field(request, "image", str)
            return {"type": "created", "id": containers.create(uid, user=user, name=name, image=image)}, None
        if kind == "commit":
            containers.commit(uid, name, field(request, "image", str))
            return {"type": "committed"}, None
        if kind == "stop":
            containers.stop(uid, name)
            return {"type": "stopped"}, None
        if kind == "delete":
            containers.delete(uid, name)
            return {"type": "deleted"}, None
        if kind == "exec":
            argv, terminal = argv_of(request), field(request, "terminal", bool)
            mark = str(request["nonce"])
            return {"type": "runs"}, containers.execute(
                uid, name, argv, terminal=terminal, size=size_of(request), mark=mark
            )
        raise AssertionError(f"{kind} is served")

    def _relay(self, connection: socket.socket, command: Command) -> bool:
        """Pass bytes to and fro until the command ends; return False if the caller went away before."""
        connection.settimeout(None)
        gone = threading.Event()
        passing = threading.Thread(target=self._pass_on, args=(connection, command, gone), daemon=True)
        passing.start()
        try:
            while data := _output(command):
                letters.send_piece(connection, letters.OUTPUT, data)
            if gone.is_set():
                return False
            letters.send_piece(connection, letters.EXIT, letters.encoded({"status": command.status()}))
            # What the caller still sends is taken: a connection that is closed before could lose what was said last.
            connection.shutdown(socket.SHUT_WR)
            passing.join(_PATIENCE_S)
        except OSError:
            return False
        return True

    def _pass_on(self, connection: socket.socket, command: Command, gone: threading.Event) -> None:
        """Pass on what comes for a command, until the caller is gone: then its output is not waited for either."""
        try:
            while True:
                kind, content = letters.receive_piece(connection)
                if kind == letters.INPUT:
                    with contextlib.suppress(OSError):  # it has ended, and reads no more
                        command.stream.sendall(content)
                elif kind == letters.INPUT_ENDS:
                    with contextlib.suppress(OSError):
                        command.stream.shutdown(socket.SHUT_WR)
                elif kind == letters.SIZE:
                    _resize(command, letters.parse(content))
                else:
                    raise LetterError("an unknown piece came")
        except (EOFError, OSError, LetterError, Refused, EngineError):
            gone.set()
            with contextlib.suppress(OSError):
                command.stream.shutdown(socket.SHUT_RDWR)


def _resize(command: Command, size: dict[str, Any]) -> None:
    with contextlib.suppress(EngineError):  # the command may have ended; its end is still to be told
        command.resize(rows=field(size, "rows", int), columns=field(size, "columns", int))


def _output(command: Command) -> bytes:
    """Return what a command writes next; nothing where it has ended, be it with input left that it did not read."""
    try:
        return command.stream.recv(_PIECE)
    except ConnectionError:
        return b""


def _notice_loss(connection: socket.socket) -> None:
    """Have a connection end within two minutes whose other side has gone without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
