"""The service that tells users their jobs' places: whose jobs, how often Slurm is asked, and what is hung up on."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from live import ROOT, wait_until
from stand_ins import loaded

MODULE = ROOT / "images/user/files/usr/local/lib/cfiddle/queue_place.py"
ADA, EVE = 2001, 2002
JOBS = """\
7|2001|1795636568|Resources
8|2002|1795636568|Priority
10|2002|N/A|Priority
10|2002|N/A|Priority
9|2001|1795636920|Priority
12|2001|N/A|JobHeldUser
13|2001|N/A|ReqNodeNotAvail, UnavailableNodes:c1|c2
"""


@pytest.fixture
def service() -> ModuleType:
    return loaded(MODULE)


@pytest.fixture
def slurm(service: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a stand-in in the place of squeue; return the file with what it says. `asked` has a line for each run."""
    said = tmp_path / "said"
    said.write_text(JOBS)
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$SLURM_TIME_FORMAT" "$@" >>{tmp_path}/asked\ncat {said}\n')
    squeue.chmod(0o755)
    monkeypatch.setattr(service, "SQUEUE", [str(squeue), *service.SQUEUE[1:]])
    return said


@pytest.fixture
def path(service: ModuleType, slurm: Path, tmp_path: Path) -> Path:
    """Serve; return the socket."""
    path = tmp_path / "socket"
    threading.Thread(target=service.Server(path, service.Queue()).run, daemon=True).start()
    return path


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10)
        connection.connect(os.fspath(path))
        yield connection


def ask(path: Path, packet: bytes) -> bytes:
    with connected(path) as connection:
        try:
            connection.send(packet)
            return connection.recv(65536)
        except (BrokenPipeError, ConnectionResetError):
            return b""


def test_a_user_is_told_the_places_of_their_own_jobs(service: ModuleType, slurm: Path) -> None:
    queue = service.Queue()
    assert queue.answer(ADA, [7, 9, 12, 13]) == {
        "of": 5,
        "jobs": {
            "7": {"place": 1, "reason": "Resources", "start": 1795636568},
            "9": {"place": 5, "reason": "Priority", "start": 1795636920},
            "12": {"place": None, "reason": "JobHeldUser", "start": None},
            "13": {"place": None, "reason": "ReqNodeNotAvail, UnavailableNodes:c1|c2", "start": None},
        },
    }


def test_a_user_is_told_nothing_of_the_jobs_of_others(service: ModuleType, slurm: Path) -> None:
    assert service.Queue().answer(EVE, list(range(100))).get("jobs").keys() == {"8", "10"}
    assert service.Queue().answer(0, list(range(100))) == {"of": 5, "jobs": {}}


def test_an_array_stands_where_its_first_task_does(service: ModuleType, slurm: Path) -> None:
    assert service.Queue().answer(EVE, [10])["jobs"]["10"]["place"] == 3


def test_slurm_is_asked_only_when_somebody_asks_and_at_most_once_a_second(
    service: ModuleType, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(service.time, "monotonic", lambda: now)
    queue, asked = service.Queue(), tmp_path / "asked"
    assert not asked.exists()
    for seconds, times in ((0, 1), (0.5, 1), (0.4, 1), (0.2, 2)):
        now += seconds
        queue.answer(ADA, [7])
        assert len(asked.read_text().splitlines()) == times
    assert asked.read_text().startswith("%s --noheader --all --array --states=PENDING --sort=-Q,i ")


def test_a_job_that_waits_no_longer_is_not_told_of(
    service: ModuleType, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "FRESH_S", 0)
    queue = service.Queue()
    assert queue.answer(ADA, [7])["jobs"]
    slurm.write_text("")
    assert queue.answer(ADA, [7]) == {"of": 0, "jobs": {}}


def test_where_slurm_says_nothing_nothing_is_told_and_the_log_says_why(
    service: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(service, "SQUEUE", ["false"])
    assert service.Queue().answer(ADA, [7]) == {"of": 0, "jobs": {}}
    assert "exit status 1" in capsys.readouterr().err
    monkeypatch.setattr(service, "SQUEUE", ["sleep", "60"])
    monkeypatch.setattr(service, "SQUEUE_S", 0.1)
    assert service.Queue().answer(ADA, [7]) == {"of": 0, "jobs": {}}
    assert "timed out" in capsys.readouterr().err


def test_the_kernel_says_who_asks(path: Path, slurm: Path) -> None:
    slurm.write_text(f"7|{os.getuid()}|N/A|Priority\n8|{os.getuid() + 1}|N/A|Priority\n")
    told = json.loads(ask(path, b'{"jobs": [7, 8]}'))
    assert told == {"of": 2, "jobs": {"7": {"place": 1, "reason": "Priority", "start": None}}}


WRONG: list[Any] = [
    b"",
    b"{",
    b"\xff\xfe\x00",
    b"[7]",
    b"{}",
    b'{"jobs": 7}',
    b'{"jobs": {"7": 1}}',
    b'{"jobs": ["7"]}',
    b'{"jobs": [true]}',
    b'{"jobs": [7.0]}',
    b'{"jobs": [NaN]}',
    b'{"jobs": [7], "uid": 2001}',
    b'{"jobs": [' + b"1" * 4400 + b"]}",
    b"[" * 4096,
    b'{"jobs": [' + b",".join([b"7"] * 101) + b"]}",
    b'{"jobs": [7]}' + b" " * 4096,
    b"x" * 100_000,
]


@pytest.mark.parametrize("packet", WRONG, ids=[str(packet[:20]) for packet in WRONG])
def test_whoever_asks_wrongly_is_hung_up_on_and_nobody_else_notices(path: Path, packet: bytes) -> None:
    assert ask(path, packet) == b""
    assert json.loads(ask(path, b'{"jobs": []}'))["of"] == 5


def test_numbers_that_no_job_has_are_answered(path: Path) -> None:
    assert json.loads(ask(path, b'{"jobs": [-1, 0, 99999999999999999999]}'))["jobs"] == {}


def test_a_user_has_eight_connections_and_none_that_says_nothing(
    service: ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "PATIENCE_S", 1.0)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(path)) for _ in range(8)]
        assert ask(path, b'{"jobs": []}') == b"", "the ninth"
        began = time.monotonic()
        for connection in silent:
            assert connection.recv(10) == b""
        assert time.monotonic() - began < 5
        assert wait_until(lambda: ask(path, b'{"jobs": []}'), timeout_s=5, what="room for a new connection")


def test_all_users_together_have_a_bounded_number_of_connections(
    service: ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_CONNECTIONS", 2)
    with connected(path), connected(path):
        assert ask(path, b'{"jobs": []}') == b""
