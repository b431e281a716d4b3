"""The look at the nodes' clocks: which are off, and what Slurm is told of them."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from agent.door import Door
from cfiddle_cluster import doctor
from live import ROOT
from stand_ins import loaded

MODULE = ROOT / "images/cluster/files/usr/local/lib/cfiddle/node_clocks.py"
AHEAD = "its clock is 600 s ahead of the head's"
HERE = "127.0.0.1"


@pytest.fixture
def clocks() -> ModuleType:
    return loaded(MODULE)


@pytest.fixture
def agent(clocks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an agent listen here."""
    with socket.create_server((HERE, 0)) as probe:
        port = probe.getsockname()[1]
    Door(None, None, address=HERE, port=port).open()  # type: ignore[arg-type]
    monkeypatch.setattr(clocks.letters, "PORT", port)


@pytest.fixture
def told(clocks: ModuleType, agent: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put stand-ins in the place of Slurm's commands; return the file of what Slurm is told. `reason` is the node's."""
    told, reason = tmp_path / "told", tmp_path / "reason"
    told.touch()
    reason.write_text("none")
    for name, does in {
        "sinfo": f'echo "{socket.gethostname()}|{HERE}|$(cat {reason})"',
        "scontrol": f'printf "%s;" "$@" >>{told}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(clocks, "agents", lambda: {HERE})
    return told


def pretend(clocks: ModuleType, monkeypatch: pytest.MonkeyPatch, ahead_s: float) -> None:
    """Have this machine's clock be ahead of the agent's."""

    class Time:
        @staticmethod
        def time() -> float:
            return time.time() + ahead_s

    monkeypatch.setattr(clocks, "time", Time)


@pytest.mark.parametrize(
    ("offset_s", "error_s", "fault"),
    [
        (600.0, 0.1, AHEAD),
        (-3600.2, 0.1, "its clock is 3600 s behind the head's"),
        (60.5, 0.1, "its clock is 60 s ahead of the head's"),
        (60.0, 0.0, ""),
        (-59.0, 0.0, ""),
        (64.0, 5.0, ""),  # a slow answer proves nothing
    ],
)
def test_a_clock_is_off_that_differs_by_more_than_a_minute(
    clocks: ModuleType, offset_s: float, error_s: float, fault: str
) -> None:
    assert clocks.Clock("c1", offset_s, error_s).fault == fault


def test_doctor_names_the_same_clocks(clocks: ModuleType) -> None:
    assert clocks.MOST_S == doctor.CLOCK_MEND_S


@pytest.mark.parametrize(
    ("offset_s", "reason", "settings"),
    [
        (600.0, "none", ["state=drain", f"reason={AHEAD}"]),
        (600.0, "Not responding", ["state=drain", f"reason={AHEAD}"]),
        (600.0, "its clock is 90 s behind the head's", ["state=drain", f"reason={AHEAD}"]),
        (600.0, AHEAD, None),
        (600.0, "a broken fan", None),
        (600.0, "health check: /tmp is full", None),
        (0.1, AHEAD, ["state=resume"]),
        (0.1, "none", None),
        (0.1, "Not responding", None),
        (0.1, "a broken fan", None),
    ],
)
def test_only_what_this_check_drained_is_resumed_and_no_reason_of_others_is_overwritten(
    clocks: ModuleType, offset_s: float, reason: str, settings: list[str] | None
) -> None:
    told = clocks.changes([clocks.Clock("c1", offset_s, 0.01)], {"c1": reason, "c2": AHEAD}, back=())
    assert told == ({"c1": settings} if settings else {})


def test_a_machine_that_is_no_node_is_let_alone(clocks: ModuleType) -> None:
    assert clocks.changes([clocks.Clock("c3", 600.0, 0.01)], {"c1": "none"}, back=()) == {}


def test_an_agent_tells_its_time(clocks: ModuleType, agent: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(clocks, monkeypatch, -600.0)
    clock = clocks.read(HERE)
    assert clock.node == socket.gethostname()
    assert abs(clock.offset_s - 600.0) <= clock.error_s + 0.001


def test_an_agent_that_does_not_answer_is_said_in_the_log(
    clocks: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server((HERE, 0)) as dumb:
        monkeypatch.setattr(clocks.letters, "PORT", dumb.getsockname()[1])
        monkeypatch.setattr(clocks, "ASK_S", 0.1)
        assert clocks.read(HERE) is None
    assert f"{HERE} does not tell its time: TimeoutError" in capsys.readouterr().err


def test_a_node_is_drained_while_its_clock_is_off(
    clocks: ModuleType, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = socket.gethostname()
    clocks.main()
    assert told.read_text() == ""
    pretend(clocks, monkeypatch, -600.0)
    clocks.main()
    assert told.read_text() == f"update;nodename={node};state=drain;reason={AHEAD};"
    told.write_text("")
    (told.parent / "reason").write_text(AHEAD)
    clocks.main()
    assert told.read_text() == ""
    pretend(clocks, monkeypatch, 0.0)
    clocks.main()
    assert told.read_text() == f"update;nodename={node};state=resume;"


@pytest.mark.parametrize(("ahead_s", "settings"), [(0.0, "state=resume;"), (-600.0, f"state=drain;reason={AHEAD};")])
def test_a_node_that_slurm_gave_up_is_resumed_once_its_slurmd_listens_and_its_clock_is_right(
    clocks: ModuleType, told: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float, settings: str
) -> None:
    pretend(clocks, monkeypatch, ahead_s)
    (told.parent / "reason").write_text(clocks.SILENT)
    with socket.create_server((HERE, 0)) as slurmd:
        monkeypatch.setattr(clocks, "SLURMD_PORT", slurmd.getsockname()[1])
        clocks.main()
    assert told.read_text() == f"update;nodename={socket.gethostname()};{settings}"


def test_a_node_whose_slurmd_is_away_stays_given_up(
    clocks: ModuleType, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server((HERE, 0)) as probe:
        monkeypatch.setattr(clocks, "SLURMD_PORT", probe.getsockname()[1])
    (told.parent / "reason").write_text(clocks.SILENT)
    clocks.main()
    assert told.read_text() == ""


def test_where_slurm_says_nothing_nothing_is_told_and_the_failure_is_said(clocks: ModuleType, told: Path) -> None:
    (told.parent / "sinfo").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(clocks.subprocess.CalledProcessError, match="sinfo"):
        clocks.main()
    assert told.read_text() == ""
