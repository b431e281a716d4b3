"""The agent's socket: no descriptor that comes stays open, and where there are none for a while nobody is shut out."""

import errno
import os
import queue
import resource
import signal
import socket
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent import __main__ as program
from agent import server, wire
from agent.server import Server
from live import wait_until


class Accepted:
    """In the place of the listener: gives or raises what is put into it."""

    def __init__(self) -> None:
        self.coming: queue.Queue[socket.socket | Exception] = queue.Queue()

    def accept(self) -> tuple[socket.socket, None]:
        found = self.coming.get()
        if isinstance(found, Exception):
            raise found
        return found, None


@pytest.fixture
def accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Accepted]:
    """Return what a server that runs accepts; at the end it is told to end."""
    monkeypatch.setattr(server, "Pool", lambda *_: None)
    monkeypatch.setattr(server, "_PAUSE_S", 0.0)
    stands_in: Any = SimpleNamespace(profiles={"default": None})
    serving = Server(
        tmp_path / "agent.sock",
        policy=stands_in,
        grants=stands_in,
        quiet=stands_in,
        sandboxes=stands_in,
        containers=None,
    )
    serving._listener.close()
    found = Accepted()
    serving._listener = found  # type: ignore[assignment]

    def run() -> None:
        with pytest.raises(EOFError):
            serving.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield found
    found.coming.put(EOFError())
    thread.join(10)


def _is_answered(accepted: Accepted) -> bool:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine:
        mine.settimeout(10)
        accepted.coming.put(theirs)
        try:
            wire.send(mine, {"v": wire.VERSION, "type": "ping"})
            return bool(wire.receive(mine)[0]["type"] == "pong")
        except (EOFError, OSError):
            return False


def test_who_comes_when_descriptors_are_there_again_is_let_in(accepted: Accepted) -> None:
    for _ in range(3):
        accepted.coming.put(OSError(errno.EMFILE, "Too many open files"))
    assert _is_answered(accepted)


def test_whom_no_thread_can_serve_is_turned_away_and_not_counted(
    accepted: Accepted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(server, "_CONNECTIONS_PER_USER", 1)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fails)
        assert not _is_answered(accepted)
    wait_until(lambda: _is_answered(accepted), timeout_s=5, what="there is room for the next")


def test_agent_has_as_many_descriptors_as_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: given.append(limit))
    with pytest.raises(SystemExit, match="error: "):
        program.serve(Namespace(policy=tmp_path / "none"))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert given == [(resource.RLIMIT_NOFILE, (most, most))]


def test_socket_that_python_cannot_take_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "as getsockname says of a socket of AF_ALG")

    ends = socket.socketpair()
    descriptors = [end.fileno() for end in (*ends, ends[0])]
    server.check_descriptors(descriptors)
    before = set(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(server.socket, "socket", fails)
        with pytest.raises(wire.Refused, match="channel is not a connected Unix stream socket"):
            server.check_descriptors(descriptors)
    assert set(os.listdir("/proc/self/fd")) == before
    for end in ends:
        end.close()


def test_descriptors_that_are_looked_at_stay_open() -> None:
    (read, write), (mine, theirs) = os.pipe(), socket.socketpair()
    server.check_descriptors([mine.fileno(), write, write])
    for channel in (read, os.open("/dev/null", os.O_RDONLY)):
        with pytest.raises(wire.Refused):
            server.check_descriptors([channel, write, write])
        os.close(channel)
    mine.sendall(b"open")
    assert theirs.recv(4) == b"open"
    os.close(write)
    mine.close()
    theirs.close()
