"""Letters and the door that they come to: what is refused, from whom, and that nobody keeps others out."""

import contextlib
import gc
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agent import door, letters, munge
from agent.door import Door
from agent.engine import EngineError
from agent.letters import LetterError
from agent.munge import MungeError
from agent.wire import Refused

ME, OTHER = 2001, 2002
NODE = os.uname().nodename
PATIENCE_S = 5.0


class Credentials:
    """In MUNGE's place: says who encoded, and for whom; decodes each once."""

    def __init__(self) -> None:
        self.uid = ME
        self.decoded: set[bytes] = set()

    def encode(self, payload: bytes, *, reader: int | None = None) -> bytes:
        # The door's threads are root, the test's own is a user.
        uid = self.uid if threading.current_thread() is threading.main_thread() else 0
        return json.dumps([payload.decode(), uid, reader, os.urandom(4).hex()]).encode()

    def decode(self, credential: bytes) -> tuple[bytes, int]:
        if credential in self.decoded:
            raise MungeError("MUNGE: Replayed credential")
        self.decoded.add(credential)
        try:
            payload, uid, reader, _ = json.loads(credential)
        except ValueError as error:
            raise MungeError("MUNGE: Invalid credential") from error
        if reader not in (None, self.uid):
            raise MungeError("MUNGE: Unauthorized credential decode")
        return payload.encode(), uid


class Command:
    """A command in a container, whose other end the test has."""

    def __init__(self) -> None:
        self.stream, self.end = socket.socketpair()
        self.end.settimeout(PATIENCE_S)
        self.sizes: list[tuple[int, int]] = []

    def resize(self, *, rows: int, columns: int) -> None:
        self.sizes.append((rows, columns))

    def status(self) -> int:
        return 7

    def close(self) -> None:
        self.stream.close()


class Asked:
    """In the place of the containers: keeps what is asked, and answers or fails as it is told."""

    def __init__(self) -> None:
        self.calls: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.fails: Exception | None = None
        self.on: Callable[[], object] = lambda: None
        self.command = Command()

    def _note(self, *call: Any) -> None:
        self.calls.put(call)
        self.on()
        if self.fails:
            raise self.fails

    def listed(self, uid: int) -> list[dict[str, Any]]:
        self._note("list", uid)
        return [{"name": "a"}]

    def types(self) -> list[dict[str, Any]]:
        self._note("types")
        return []

    def create(self, uid: int, *, user: str, name: str, image: str) -> str:
        self._note("create", uid, user, name, image)
        return "1" * 64

    def stop(self, uid: int, name: str) -> None:
        self._note("stop", uid, name)

    def outcome(self, uid: int, job: int, *, timeout_s: float) -> str | None:
        self._note("outcome", uid, job, timeout_s)
        return None

    def execute(self, uid: int, name: str, argv: list[str], *, terminal: bool, size: object, mark: str) -> Command:
        self._note("exec", uid, name, argv, terminal, mark)
        return self.command

    def end_command(self, uid: int, name: str, mark: str) -> None:
        self._note("end", uid, name, mark)


class Quiet:
    """In the place of what has users wait: keeps who is to."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.give_way = self.asked.append


class Guest:
    """Somebody at the door."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.connection = socket.create_connection(address, timeout=PATIENCE_S)
        self.greeting = letters.parse(letters.receive(self.connection))
        self.nonce = self.greeting["nonce"]

    def send(self, **request: Any) -> bytes:
        sealed = letters.seal({"v": letters.VERSION, "node": NODE, "nonce": self.nonce, "reply": "r"} | request)
        letters.send(self.connection, sealed)
        return sealed

    def answer(self) -> dict[str, Any]:
        answer, uid = letters.unseal(letters.receive(self.connection))
        assert uid == 0
        self.nonce = answer["nonce"]
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.answer()

    def is_turned_away(self) -> bool:
        try:
            return self.connection.recv(1) == b""
        except ConnectionError:
            return True


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> Credentials:
    found = Credentials()
    monkeypatch.setattr(munge, "encode", found.encode)
    monkeypatch.setattr(munge, "decode", found.decode)
    return found


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def quiet() -> Quiet:
    return Quiet()


@pytest.fixture
def come(credentials: Credentials, asked: Asked, quiet: Quiet) -> Iterator[Callable[[], Guest]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = probe.getsockname()
    Door(asked, quiet, address=address[0], port=address[1]).open()  # type: ignore[arg-type]
    guests: list[Guest] = []

    def come() -> Guest:
        guests.append(Guest(address))
        return guests[-1]

    yield come
    for guest in guests:
        guest.connection.close()


# --- letters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair()
    for end in ends:
        end.settimeout(PATIENCE_S)
    yield ends
    for end in ends:
        end.close()


def test_letters_and_pieces_arrive_as_they_were_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    letters.send(pair[0], b"")
    letters.send(pair[0], b"one\0\xff")
    letters.send_piece(pair[0], letters.OUTPUT, b"two")
    letters.send_piece(pair[0], letters.INPUT_ENDS)
    assert [letters.receive(pair[1]), letters.receive(pair[1])] == [b"", b"one\0\xff"]
    assert letters.receive_piece(pair[1]) == (letters.OUTPUT, b"two")
    assert letters.receive_piece(pair[1]) == (letters.INPUT_ENDS, b"")


def test_letter_that_is_too_long_is_neither_sent_nor_waited_for(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(LetterError, match="1048577 bytes"):
        letters.send(pair[0], bytes(letters.MAX_LETTER + 1))
    pair[0].sendall((2**32 - 1).to_bytes(4))
    with pytest.raises(LetterError, match="4294967295 bytes"):
        letters.receive(pair[1])


def test_half_a_letter_is_none(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall((10).to_bytes(4) + b"half")
    pair[0].close()
    with pytest.raises(EOFError):
        letters.receive(pair[1])


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"1", b"{", b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 100000, b"1" * 5000]
)
def test_what_is_no_json_object_is_no_letter(content: bytes) -> None:
    with pytest.raises(LetterError, match="no JSON object"):
        letters.parse(content)


def test_a_nonce_is_like_no_other() -> None:
    assert len({letters.nonce() for _ in range(1000)}) == 1000


# --- who asks what ---------------------------------------------------------------------------------------------------


def test_requests_are_done_for_whoever_sealed_them(
    come: Callable[[], Guest], credentials: Credentials, asked: Asked
) -> None:
    guest = come()
    assert guest.greeting["node"] == NODE
    answer = guest.ask(type="list", uid=0, user="root")
    assert (answer["type"], answer["reply"], answer["node"]) == ("containers", "r", NODE)
    assert guest.ask(type="create", user="u", name="a", image="i")["id"] == "1" * 64
    credentials.uid = 0
    assert guest.ask(type="stop", name="u2001.a")["type"] == "stopped"
    assert [asked.calls.get(timeout=5) for _ in range(3)] == [
        ("list", ME),
        ("create", ME, "u", "a", "i"),
        ("stop", 0, "u2001.a"),
    ]


def test_answer_is_for_nobody_else(come: Callable[[], Guest], credentials: Credentials) -> None:
    guest = come()
    guest.send(type="list")
    credentials.uid = OTHER
    with pytest.raises(LetterError, match="Unauthorized"):
        guest.answer()


@pytest.mark.parametrize("made_for", [{"nonce": "0" * 32}, {"node": "another"}, {"nonce": None}, {"node": None}])
def test_request_that_was_made_for_another_connection_or_node_is_not_done(
    come: Callable[[], Guest], asked: Asked, made_for: dict[str, Any]
) -> None:
    guest = come()
    guest.send(type="list", **made_for)
    assert guest.is_turned_away()
    assert asked.calls.empty()


def test_no_request_is_done_twice(come: Callable[[], Guest], asked: Asked) -> None:
    guest, later = come(), come()
    request = guest.send(type="stop", name="a")
    assert guest.answer()["type"] == "stopped"
    for connection in (guest.connection, later.connection):
        letters.send(connection, request)
    assert guest.is_turned_away()
    assert later.is_turned_away()
    assert asked.calls.qsize() == 1


def test_old_nonce_is_good_no_longer(come: Callable[[], Guest], asked: Asked) -> None:
    guest = come()
    first = guest.nonce
    guest.ask(type="list")
    guest.send(type="stop", name="a", nonce=first)
    assert guest.is_turned_away()
    assert asked.calls.qsize() == 1


@pytest.mark.parametrize("content", [b"", b"MUNGE:nonsense", b'{"type": "list"}', bytes(letters.MAX_LETTER)])
def test_what_is_no_credential_ends_the_connection(come: Callable[[], Guest], content: bytes) -> None:
    guest = come()
    letters.send(guest.connection, content)
    assert guest.is_turned_away()


def test_length_that_no_letter_has_ends_the_connection(come: Callable[[], Guest]) -> None:
    guest = come()
    guest.connection.sendall(b"\xff" * 4)
    assert guest.is_turned_away()


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"type": "list", "v": 2}, "version"),
        ({"type": "list", "v": None}, "version"),
        ({"type": "run", "name": "a"}, "field"),
        ({"name": "a"}, "field"),
        ({"type": ["stop"], "name": "a"}, "field"),
        ({"type": "stop"}, "field"),
        ({"type": "stop", "name": 1}, "field"),
        *(
            ({"type": "stop", "name": name}, "name")
            for name in ("", "-rf", "../x", "a/b", "a b", "a\n", "a\0", "a" * 64, "ä", "u2002.a/", "²")
        ),
        ({"type": "create", "name": "a", "user": "u"}, "field"),
        ({"type": "outcome", "job": "1", "wait_s": 1.0}, "field"),
        ({"type": "outcome", "job": True, "wait_s": 1.0}, "field"),
        ({"type": "outcome", "job": 1, "wait_s": 1}, "field"),
        *(
            ({"type": "exec", "name": "a", "terminal": False, "argv": argv}, "field")
            for argv in ([], "sh", ["sh", 1], ["sh", "a\0b"], ["sh"] * 16385, None)
        ),
        ({"type": "exec", "name": "a", "argv": ["sh"]}, "field"),
    ],
)
def test_request_that_is_none_is_refused_and_the_next_is_done(
    come: Callable[[], Guest], asked: Asked, request_: dict[str, Any], code: str
) -> None:
    guest = come()
    answer = guest.ask(**request_)
    assert (answer["type"], answer["code"]) == ("refused", code)
    assert asked.calls.empty()
    assert guest.ask(type="list")["type"] == "containers"


@pytest.mark.parametrize("reply", [None, 1, ["r"], {}])
def test_request_whose_answer_cannot_be_known_is_not_done(come: Callable[[], Guest], asked: Asked, reply: Any) -> None:
    guest = come()
    guest.send(type="list", reply=reply)
    assert guest.is_turned_away()
    assert asked.calls.empty()


def test_what_a_request_says_besides_takes_no_memory_while_it_is_served(
    come: Callable[[], Guest], asked: Asked
) -> None:
    served, seen = threading.Event(), threading.Event()
    asked.on = lambda: (served.set(), seen.wait(PATIENCE_S))
    guest = come()
    guest.send(type="outcome", job=7, wait_s=60.0, argv=_junk(), uid=_junk())
    assert served.wait(PATIENCE_S)
    assert not _junk_in_memory()
    seen.set()
    assert guest.answer()["type"] == "outcome"


def _junk() -> list[Any]:
    return [["junk", []], ["junk", []]]


def _junk_in_memory() -> int:
    there = [found for found in gc.get_objects() if type(found) is list and len(found) == 2]
    return sum(type(first) is str and first == "junk" for first, _ in there)


def test_who_asks_for_what_the_engine_does_gives_way_to_a_measurement(come: Callable[[], Guest], quiet: Quiet) -> None:
    guest = come()
    for request in ({"type": "types"}, {"type": "outcome", "job": 7, "wait_s": 0.0}, {"type": "run"}):
        guest.ask(**request)
    assert quiet.asked == []
    for request in ({"type": "list"}, {"type": "stop", "name": "a"}, {"type": "create", "name": "a"}):
        guest.ask(**request)
    assert quiet.asked == [ME] * 3


def test_root_names_containers_as_the_engine_does(come: Callable[[], Guest], credentials: Credentials) -> None:
    credentials.uid = 0
    guest = come()
    assert guest.ask(type="stop", name="a")["code"] == "name"
    assert guest.ask(type="stop", name="slurm-stack_agent")["code"] == "name"


@pytest.mark.parametrize(
    ("error", "code"), [(Refused("share", "no more"), "share"), (EngineError(500, "it is full"), "engine")]
)
def test_what_goes_wrong_is_said(come: Callable[[], Guest], asked: Asked, error: Exception, code: str) -> None:
    asked.fails = error
    guest = come()
    answer = guest.ask(type="list")
    assert (answer["code"], answer["message"]) == (code, str(error))
    asked.fails = None
    assert guest.ask(type="list")["type"] == "containers"


@pytest.mark.parametrize(("wanted", "given"), [(0.5, 0.5), (1e9, 60.0)])
def test_nobody_waits_longer_than_a_minute(
    come: Callable[[], Guest], asked: Asked, wanted: float, given: float
) -> None:
    assert come().ask(type="outcome", job=7, wait_s=wanted)["id"] is None
    assert asked.calls.get(timeout=5) == ("outcome", ME, 7, given)


# --- commands --------------------------------------------------------------------------------------------------------


def _run(guest: Guest) -> str:
    nonce = str(guest.nonce)
    assert guest.ask(type="exec", name="a", argv=["sh"], terminal=True)["type"] == "runs"
    return nonce


def test_streams_of_a_command_are_passed_on(come: Callable[[], Guest], asked: Asked) -> None:
    guest = come()
    mark = _run(guest)
    assert asked.calls.get(timeout=5) == ("exec", ME, "a", ["sh"], True, mark)
    letters.send_piece(guest.connection, letters.SIZE, letters.encoded({"rows": 24, "columns": 80}))
    letters.send_piece(guest.connection, letters.INPUT, b"input")
    assert asked.command.end.recv(100) == b"input"
    assert asked.command.sizes == [(24, 80)]
    letters.send_piece(guest.connection, letters.INPUT_ENDS)
    assert asked.command.end.recv(100) == b""
    asked.command.end.sendall(b"output")
    assert letters.receive_piece(guest.connection) == (letters.OUTPUT, b"output")
    asked.command.end.close()
    assert letters.receive_piece(guest.connection) == (letters.EXIT, b'{"status": 7}')
    assert guest.is_turned_away()
    assert asked.calls.empty()


def test_what_is_said_besides_a_terminal_s_size_takes_no_memory(come: Callable[[], Guest], asked: Asked) -> None:
    guest = come()
    _run(guest)
    content = letters.encoded({"rows": 24, "columns": 80, "more": _junk()})
    letters.send_piece(guest.connection, letters.SIZE, content)
    letters.send_piece(guest.connection, letters.INPUT, b"input")
    assert asked.command.end.recv(100) == b"input"
    assert asked.command.sizes == [(24, 80)]
    assert not _junk_in_memory()


def test_exit_status_comes_through_where_more_input_comes_than_is_read(come: Callable[[], Guest], asked: Asked) -> None:
    guest = come()
    _run(guest)
    asked.calls.get(timeout=5)
    letters.send_piece(guest.connection, letters.INPUT, b"unread")
    asked.command.end.sendall(b"output")
    assert asked.command.end.recv(1) == b"u"
    asked.command.end.close()
    letters.send_piece(guest.connection, letters.INPUT, bytes(100_000))
    assert letters.receive_piece(guest.connection) == (letters.OUTPUT, b"output")
    assert letters.receive_piece(guest.connection) == (letters.EXIT, b'{"status": 7}')
    assert asked.calls.empty()


def test_caller_who_stays_after_the_end_leaves_nothing_running(
    monkeypatch: pytest.MonkeyPatch, come: Callable[[], Guest], asked: Asked
) -> None:
    monkeypatch.setattr(door, "_PATIENCE_S", 0.1)
    before = threading.active_count()
    guest = come()
    _run(guest)
    asked.command.end.close()
    assert letters.receive_piece(guest.connection)[0] == letters.EXIT
    deadline = time.monotonic() + PATIENCE_S
    while threading.active_count() > before:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


def test_command_ends_with_its_caller(come: Callable[[], Guest], asked: Asked) -> None:
    guest = come()
    mark = _run(guest)
    asked.calls.get(timeout=5)
    guest.connection.close()
    assert asked.calls.get(timeout=5) == ("end", ME, "a", mark)
    assert asked.command.end.recv(1) == b""


@pytest.mark.parametrize("piece", [(b"?", b""), (letters.SIZE, b"{}"), (letters.SIZE, b'{"rows": "1", "columns": 2}')])
def test_command_ends_where_its_caller_says_what_nobody_understands(
    come: Callable[[], Guest], asked: Asked, piece: tuple[bytes, bytes]
) -> None:
    guest = come()
    mark = _run(guest)
    asked.calls.get(timeout=5)
    letters.send_piece(guest.connection, *piece)
    assert asked.calls.get(timeout=5) == ("end", ME, "a", mark)


# --- floods ----------------------------------------------------------------------------------------------------------


def test_strangers_keep_nobody_out(come: Callable[[], Guest]) -> None:
    early = come()
    assert early.ask(type="list")["type"] == "containers"
    strangers = [come() for _ in range(600)]
    for stranger in strangers[::7]:
        with contextlib.suppress(OSError):  # it may be turned away by now
            stranger.connection.sendall((1000).to_bytes(4) + b"half")
    assert come().ask(type="list")["type"] == "containers"
    assert early.ask(type="list")["type"] == "containers", "who is known is not turned away"
    assert all(stranger.is_turned_away() for stranger in strangers[: -door._STRANGERS])


def test_as_many_strangers_as_there_is_room_for_can_wait(come: Callable[[], Guest]) -> None:
    strangers = [come() for _ in range(door._STRANGERS)]
    assert {stranger.ask(type="list")["type"] for stranger in strangers[: door._STRANGERS // 2]} == {"containers"}


def test_one_user_keeps_no_other_out(come: Callable[[], Guest], credentials: Credentials) -> None:
    mine = [come() for _ in range(door._CONNECTIONS_PER_USER)]
    assert {guest.ask(type="list")["type"] for guest in mine} == {"containers"}
    one_more = come()
    assert one_more.ask(type="list")["code"] == "busy"
    credentials.uid = OTHER
    assert come().ask(type="list")["type"] == "containers"
    credentials.uid = ME
    mine.pop().connection.close()
    deadline = time.monotonic() + PATIENCE_S
    while one_more.ask(type="list")["type"] != "containers":
        assert time.monotonic() < deadline, "a place that was given up is free"


def test_stranger_who_says_nothing_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch, come: Callable[[], Guest]
) -> None:
    monkeypatch.setattr(door, "_PATIENCE_S", 0.1)
    guest = come()
    guest.connection.sendall(b"\0\0")
    assert guest.is_turned_away()
