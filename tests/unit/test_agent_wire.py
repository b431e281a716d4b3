"""Packets and requests: what comes through, what is refused, and that nothing stays open."""

import array
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import call, wire
from agent.request import call_request

GOOD = {"v": 2, "type": "call", "id": "0123456789abcdef" * 2, "job": 7, "profile": "default"}

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.settimeout(5)
    yield ends
    for end in ends:
        end.close()


def _open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_message_and_descriptors_arrive_together(pair: Pair) -> None:
    read, write = os.pipe()
    wire.send(pair[0], {"type": "call"}, [write])
    message, [received] = wire.receive(pair[1], descriptors=3)
    assert message == {"type": "call"}
    os.write(received, b"through")
    assert os.read(read, 10) == b"through"
    assert not os.get_inheritable(received)
    wire.close([read, write, received])


@pytest.mark.parametrize("count", [1, 2, 4, 100])
def test_more_descriptors_than_expected_are_refused_and_closed(pair: Pair, count: int) -> None:
    before = _open_files()
    pair[0].sendmsg([b"{}"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * count))])
    with pytest.raises(wire.Refused, match="descriptors"):
        wire.receive(pair[1], descriptors=0)
    pair[0].sendmsg([b"{}"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * (count + 3)))])
    with pytest.raises(wire.Refused, match="descriptors"):
        wire.receive(pair[1], descriptors=3)
    assert _open_files() == before


def test_descriptors_of_a_bad_packet_are_closed(pair: Pair) -> None:
    before = _open_files()
    pair[0].sendmsg([b"no JSON"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1]))])
    with pytest.raises(wire.Refused, match="JSON"):
        wire.receive(pair[1], descriptors=3)
    assert _open_files() == before


def test_a_closed_connection_is_the_end(pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(EOFError):
        wire.receive(pair[1])


def test_a_packet_too_large_is_refused(pair: Pair) -> None:
    pair[0].send(b" " * (wire.MAX_PACKET + 1))
    with pytest.raises(wire.Refused, match="more than 65536 bytes"):
        wire.receive(pair[1])
    with pytest.raises(ValueError, match="at most"):
        wire.send(pair[0], {"text": "x" * wire.MAX_PACKET})


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_refused(data: bytes) -> None:
    with contextlib.suppress(wire.Refused):
        assert isinstance(wire.decode(data), dict)


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', '{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', "[" * 60000])
def test_what_is_not_strictly_json_is_refused(text: str) -> None:
    with pytest.raises(wire.Refused):
        wire.decode(text.encode())


def test_good_request_is_taken_as_it_is() -> None:
    request = call_request({**GOOD, "seconds": 1.5, "memory_mb": 100})
    assert request == (GOOD["id"], 7, "default", 1.5, 100)
    assert call_request({**GOOD, "seconds": None, "memory_mb": None}) == (GOOD["id"], 7, "default", None, None)
    assert call_request(GOOD).seconds is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
)


@given(st.sampled_from(["id", "job", "profile", "seconds", "memory_mb"]), json_values)
def test_any_value_is_of_its_kind_or_refused_in_printable_words(name: str, value: Any) -> None:
    refusals: list[wire.Refused] = []
    request = None
    try:
        request = call_request({**GOOD, name: value})
    except wire.Refused as refusal:
        refusals.append(refusal)
    for refusal in refusals:
        assert refusal.code == "field"
        assert str(refusal).isascii()
        assert str(refusal).isprintable()
        assert len(str(refusal)) < 200
    if request:
        assert type(request.job) is int
        assert request.profile.isascii()
        assert not set(request.profile) & set("/.\0\n =")
        assert len(request.id) == 32
        assert request.seconds is None or request.seconds > 0
        assert request.memory_mb is None or request.memory_mb > 0


@pytest.mark.parametrize("name", ["image", "mounts", "command", "uid", "privileged", "Type", ""])
def test_unknown_field_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(wire.Refused, match="known: id, job, memory_mb, profile, seconds, type, v"):
        call_request({**GOOD, name: 1})


@pytest.mark.parametrize("name", ["id", "job", "profile"])
def test_missing_field_is_named(name: str) -> None:
    with pytest.raises(wire.Refused, match=f"field {name} is missing"):
        call_request({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize("version", [0, 1, 3, "2", 2.0, True, None, [2]])
def test_another_version_is_refused_with_those_known(version: object) -> None:
    with pytest.raises(wire.Refused, match="known: 2") as refused:
        wire.check_version({**GOOD, "v": version})
    assert refused.value.code == "version"


def test_client_passes_on_what_the_agent_says(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(os.fspath(tmp_path / "agent.sock"))
    listener.listen()
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    options = {
        "profile": "default",
        "seconds": None,
        "memory_mb": None,
        "socket_path": os.fspath(tmp_path / "agent.sock"),
    }

    def ask() -> call.Call:
        return call.Call(job=7, channel=theirs, stdout=write, stderr=write, **options)  # type: ignore[arg-type]

    asked = ask()
    agent, _ = listener.accept()
    message, descriptors = wire.receive(agent, descriptors=3)
    assert message == {**GOOD, "id": asked.id, "seconds": None, "memory_mb": None}
    wire.close(descriptors)
    wire.send(agent, {"type": "started", "container": "c"})
    ended = {"type": "ended", "reason": "exited", "exit_status": 0, "detail": "", "usage": {}, "node": {}}
    wire.send(agent, ended)
    started = asked.take()
    assert isinstance(started, dict)
    assert started["container"] == "c"
    last = asked.take()
    assert isinstance(last, call.Ended)
    assert last.reason == "exited"
    asked.close()

    asked = ask()
    agent, _ = listener.accept()
    agent.recv(65536)
    wire.send(agent, {"type": "refused", "code": "job", "message": "no"})
    with pytest.raises(call.Refused, match="no"):
        asked.take()

    asked = ask()
    agent, _ = listener.accept()
    wire.receive(agent, descriptors=3)
    agent.close()
    with pytest.raises(ConnectionError, match="went away"):
        asked.take()
    wire.close([read, write])
    for end in (ours, theirs, listener):
        end.close()


def test_client_loads_little() -> None:
    source = os.fspath(Path(wire.__file__).parents[1])
    program = f"""
import sys
sys.path.insert(0, {source!r})
import agent.call
import json
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert not {"typing", "dataclasses", "pickle", "subprocess", "yaml", "pathlib"} & set(json.loads(done.stdout))
