"""Logs: which services there are, and that no secret gets out."""

import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cfiddle_cluster import logs
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import State

KNOWN = {"slurmctld": "slurm-stack_slurmctld", "registry": "cfiddle-registry"}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    argvs: list[list[str]] = []
    monkeypatch.setattr(logs, "_services", lambda: KNOWN)
    monkeypatch.setattr(logs.subprocess, "run", lambda argv, **_: argvs.append(argv))
    return argvs


def test_log_of_one_service_is_complete_and_of_all_is_short(called: list[list[str]]) -> None:
    logs.show("slurmctld")
    assert [argv[-1] for argv in called] == ["slurm-stack_slurmctld"]
    assert "--tail" not in called[0]
    called.clear()
    logs.show()
    assert [argv[-1] for argv in called] == list(KNOWN.values())
    assert all("--tail" in argv for argv in called)


def test_unknown_service_is_answered_with_those_there_are(
    called: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match="slurmctld, registry"):
        logs.show("nothing")
    monkeypatch.setattr(logs, "_services", dict)
    with pytest.raises(ClusterError, match="no services run"):
        logs.show()
    assert called == []


def test_export_is_for_its_owner_alone_and_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State(tmp_path / "state")
    state.path("secrets").mkdir(parents=True)
    state.write("secrets/jupyter-token", "0123456789abcdef\n")
    state.write("dockerd.log", "the engine said 0123456789abcdef\n")

    def fail(*_: Any, **__: Any) -> str:
        raise ClusterError("slurmctld does not run")

    monkeypatch.setattr(logs, "_services", lambda: KNOWN)
    monkeypatch.setattr(logs, "_output", lambda argv: f"{argv[-1]}: token=0123456789abcdef\n")
    monkeypatch.setattr(logs.slurm, "slurm", fail)
    monkeypatch.setattr(logs.status, "collect", lambda _config, _state: {"well": True})
    target = tmp_path / "a" / "logs"
    config: Any = SimpleNamespace()
    logs.export(config, state, target)
    files = {path.name: path.read_text() for path in target.iterdir()}
    assert files["slurmctld.log"] == "slurm-stack_slurmctld: token=(jupyter-token)\n"
    assert files["dockerd.log"] == "the engine said (jupyter-token)\n"
    assert "slurmctld does not run" in files["slurm-queue.txt"]
    assert '"well": true' in files["status.json"]
    assert not any("0123456789abcdef" in text for text in files.values())
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in target.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="cannot be written"):
        logs.export(config, state, tmp_path / "file")


def test_value_that_is_too_short_to_be_a_secret_is_left(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.path("secrets").mkdir()
    state.write("secrets/empty", "")
    assert logs._redaction(state)("text") == "text"
    assert logs._redaction(State(tmp_path / "nowhere"))("text") == "text"


def test_log_that_does_not_end_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(argv: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(argv, options["timeout"])

    monkeypatch.setattr(logs, "_services", lambda: {"slurmd": "slurm-stack_slurmd"})
    monkeypatch.setattr(logs.subprocess, "run", run)
    with pytest.raises(ClusterError, match="has not come to the end of the log of slurmd"):
        logs.show("slurmd")
