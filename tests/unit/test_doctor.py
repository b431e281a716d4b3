"""The doctor: what it makes of facts, each fault with its mend, and its exit status."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfiddle_cluster import doctor
from cfiddle_cluster.config import Config, from_settings
from cfiddle_cluster.doctor import MEND, NOTE, OK, Finding
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.facts import Facts, Silent
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.state import State

INFO = {
    "ServerVersion": "26.1.5",
    "Driver": "overlay2",
    "Images": 9,
    "SecurityOptions": ["name=seccomp,profile=default"],
}
VALUES = {
    "kernel": "6.1.0",
    "cgroup": "2",
    "controllers": "cpuset cpu io memory pids",
    "namespaces": "yes",
    "overlay": "yes",
    "link-veth": "yes",
    "link-vxlan": "yes",
    "link-bridge": "yes",
    "disk-docker": "50000",
    "disk-home": "50000",
    "disk-state": "50000",
    "MemTotal": "8000",
    "MemAvailable": "6000",
    "SwapTotal": "0",
    "nfs-server": "yes",
    "nfs-client": "yes",
    "apt-get": "yes",
    "paranoid": "2",
    "governor": "performance",
}
SETTINGS = {
    "HEAD_ADDR": "10.0.0.1",
    "LOCAL_WORKERS": "2",
    "LOCAL_WORKER_CPUS": "0",
    "LOCAL_WORKER_MEMORY_MB": "0",
    "HOME_ROOT": "/srv/homes",
    "JUPYTER_PORT": "8888",
    "REGISTRY_PORT": "5000",
}


def _machine(name: str, role: str, *, simulated: bool = False) -> Machine:
    number = {"head": 1, "c1": 11, "c2": 12}.get(name, 99)
    return Machine(name=name, addr=f"10.0.0.{number}", roles=frozenset({role}), simulated=simulated)


def _fact(name: str = "c1", role: str = "worker", *, simulated: bool = False, **changes: Any) -> Facts:
    values = VALUES | {"name": name} | changes.pop("values", {})
    known: dict[str, Any] = {"pmu": ["cpu"], "engine": INFO, "is_engine_installed": True} | changes
    values = {key: value for key, value in values.items() if value is not None}
    return Facts(machine=_machine(name, role, simulated=simulated), values=values, **known)


Examine = Callable[..., list[Finding]]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return from_settings(tmp_path, SETTINGS)


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch, config: Config, tmp_path: Path) -> Examine:
    """Return what lets the doctor look at made-up answers of machines, and returns its findings."""

    def look(*answers: Facts | Silent, config: Config = config) -> list[Finding]:
        monkeypatch.setattr(doctor.facts, "gather", lambda *_args, **_options: list(answers))
        monkeypatch.setattr(doctor.engine, "is_running", lambda: False)
        monkeypatch.setattr(doctor.machines, "head", lambda _config: _machine("head", "head"))
        monkeypatch.setattr(doctor, "_ports_of_the_cluster", lambda: {8888})
        monkeypatch.setattr(doctor.shutil, "which", lambda command: f"/usr/bin/{command}")
        monkeypatch.setattr(doctor, "STRAY_AFTER_S", 0.1)
        return doctor.examine(config, State(tmp_path / "state"))

    return look


def _said(findings: list[Finding], level: str) -> list[str]:
    return [found.what for found in findings if found.level == level]


def test_good_machines_have_nothing_to_mend(examine: Examine) -> None:
    found = examine(_fact("head", "head"), _fact("c1"), _fact("c2"))
    assert _said(found, MEND) == []
    assert _said(found, NOTE) == []
    assert {finding.machine for finding in found} == {"head", "c1", "c2"}
    assert [finding.machine for finding in found] == sorted((f.machine for f in found), key=["head", "c1", "c2"].index)


def test_nothing_is_left_behind_by_looking(examine: Examine, tmp_path: Path) -> None:
    examine(_fact("head", "head"))
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"engine": INFO | {"LiveRestoreEnabled": True}}, "live-restore"),
        ({"engine": INFO | {"SecurityOptions": ["name=userns"]}}, "userns-remap"),
        ({"engine": INFO | {"SecurityOptions": ["name=rootless"]}}, "rootless"),
        ({"engine": None, "is_engine_installed": False, "values": {"apt-get": None}}, "no Docker Engine, no apt-get"),
        ({"values": {"overlay": "no"}}, "lacks overlay file systems"),
        ({"values": {"link-vxlan": "no", "link-veth": "no"}}, "lacks veth pairs, VXLAN"),
        ({"values": {"namespaces": "no"}}, "lacks namespaces"),
        ({"values": {"controllers": "cpu io"}}, "without cpuset, memory, pids"),
        ({"values": {"disk-docker": "100"}}, "100 MB of disk left for images"),
        ({"values": {"MemAvailable": "100"}}, "100 MB of 8000 MB of memory left"),
        ({"listeners": {("tcp", 7946): "consul"}}, "port 7946/tcp, which Swarm needs, is held by consul"),
        ({"listeners": {("udp", 4789): "vpn"}}, "port 4789/udp, which Swarm needs, is held by vpn"),
    ],
)
def test_fault_of_a_worker_is_found_with_its_mend(examine: Examine, changes: dict[str, Any], what: str) -> None:
    found = examine(_fact("head", "head"), _fact("c1", **changes))
    (fault,) = [finding for finding in found if finding.level == MEND]
    assert what in fault.what
    assert fault.machine == "c1"
    assert fault.mend


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"listeners": {("tcp", 2377): "consul"}}, "port 2377/tcp, which Swarm needs, is held by consul"),
        ({"listeners": {("tcp", 5000): "flask"}}, "port 5000 (REGISTRY_PORT) is held by flask"),
        ({"listeners": {("tcp", 5000): "docker-proxy"}}, "is held by another container"),
        ({"values": {"disk-home": "10"}}, "10 MB of disk left for homes"),
        ({"values": {"disk-state": "10"}}, "10 MB of disk left for the state"),
        ({"engine": None, "values": {"disk-docker": "5000"}}, "5000 MB of disk left for images"),
    ],
)
def test_fault_of_the_head_is_found_with_its_mend(examine: Examine, changes: dict[str, Any], what: str) -> None:
    found = examine(_fact("head", "head", **changes), _fact("c1"))
    (fault,) = [finding for finding in found if finding.level == MEND]
    assert what in fault.what
    assert fault.machine == "head"
    assert fault.mend


def test_port_that_the_cluster_itself_has_is_no_fault(examine: Examine) -> None:
    listeners = {("tcp", 8888): "docker-proxy", ("tcp", 2377): "dockerd", ("udp", 4789): "kernel"}
    found = examine(_fact("head", "head", listeners=listeners))
    assert _said(found, MEND) == []
    assert "port 8888 (JUPYTER_PORT) is the cluster's own" in _said(found, OK)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"engine": None, "is_engine_installed": False}, "no Docker Engine yet"),
        ({"engine": None}, "Docker Engine does not run yet"),
        ({"pmu": []}, "no hardware counters"),
        ({"values": {"paranoid": "4"}}, "kernel.perf_event_paranoid is 4"),
        (
            {"values": {"governor": "powersave", "no-turbo": "0"}},
            "measurements vary more with governor powersave, boost on",
        ),
        ({"values": {"smt": "1", "SwapTotal": "100"}}, "SMT on, 100 MB of swap"),
        ({"values": {"boost": "1"}}, "boost on"),
        ({"values": {"link-vxlan": "unknown"}}, "no telling yet whether it has VXLAN"),
    ],
)
def test_what_is_good_to_know_does_not_fail(examine: Examine, changes: dict[str, Any], what: str) -> None:
    found = examine(_fact("head", "head"), _fact("c1", **changes))
    assert _said(found, MEND) == []
    (note,) = _said(found, NOTE)
    assert what in note


def test_names_that_clash_are_refused(examine: Examine) -> None:
    twin = dataclasses.replace(_fact("c1"), machine=dataclasses.replace(_machine("c1", "worker"), addr="10.0.0.7"))
    (fault,) = _said(examine(_fact("head", "head"), _fact("c1"), twin), MEND)
    assert "10.0.0.11 and 10.0.0.7 are both named c1" in fault


@pytest.mark.parametrize("name", ["under_score", "-x", "slurmctld", "localhost", "ä", ""])
def test_name_that_no_node_can_have_is_refused(examine: Examine, name: str) -> None:
    assert _said(examine(_fact("head", "head"), _fact(name)), MEND)


@pytest.mark.parametrize(
    ("offset_s", "error_s", "level"),
    [(0.4, 0.1, OK), (5.0, 0.5, NOTE), (-600.0, 0.5, MEND), (600.0, 599.0, OK)],
)
def test_clock_that_differs(examine: Examine, offset_s: float, error_s: float, level: str) -> None:
    found = examine(_fact("head", "head"), _fact("c1", offset_s=offset_s, offset_error_s=error_s))
    told = [finding for finding in found if "clock" in finding.what]
    assert [finding.level for finding in told] == [level]
    if level != OK:
        assert ("behind" if offset_s < 0 else "ahead") in told[0].what


def test_clock_of_a_simulated_machine_is_the_head_s(examine: Examine) -> None:
    found = examine(_fact("head", "head"), _fact("c1", simulated=True, offset_s=700))
    assert not [finding for finding in found if "clock" in finding.what]


def test_silent_machine_is_told_of_in_one_line(examine: Examine) -> None:
    error = ClusterError(
        "10.0.0.11 shows another host key:\n@@@@@\n@ WARNING @\nHost key verification failed.", "do this"
    )
    found = examine(_fact("head", "head"), Silent(_machine("c1", "worker"), error))
    (fault,) = [finding for finding in found if finding.level == MEND]
    assert fault.what == "does not answer: 10.0.0.11 shows another host key: Host key verification failed."
    assert fault.mend == "do this"


def test_nfs_that_the_kernel_does_not_have(examine: Examine, tmp_path: Path) -> None:
    config = from_settings(tmp_path, SETTINGS | {"WORKER_ADDRS": "10.0.0.11"})
    lacks = {"nfs-server": None, "nfs-client": None}
    found = examine(_fact("head", "head", values=lacks), _fact("c1", values=lacks), config=config)
    faults = [
        (finding.machine, finding.what.partition(",")[0].partition(" (")[0])
        for finding in found
        if finding.level == MEND
    ]
    assert faults == [
        ("head", "its kernel cannot serve NFS"),
        ("head", "its kernel cannot mount NFS"),
        ("c1", "its kernel cannot mount NFS"),
    ]
    found = examine(_fact("head", "head"), _fact("c1"), config=config)
    assert "NFS can be served and mounted" in _said(found, OK)


def test_nfs_server_elsewhere_must_be_reached(examine: Examine, tmp_path: Path) -> None:
    config = from_settings(tmp_path, SETTINGS | {"WORKER_ADDRS": "10.0.0.11", "HOME_SERVER": "10.0.0.9"})
    facts = [
        _fact("head", "head", values={"nfs-server": None}, reached={"10.0.0.9:2049": True}),
        _fact("c1", reached={"10.0.0.9:2049": False}),
    ]
    (fault,) = _said(examine(*facts, config=config), MEND)
    assert fault == "cannot reach the NFS server at 10.0.0.9:2049"


def test_registry_is_to_be_reached_and_trusted(examine: Examine, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "ca.crt").write_text("authority\n")
    address = "10.0.0.1:5000"
    digest = hashlib.sha256(b"authority\n").hexdigest()
    found = examine(
        _fact("head", "head", reached={address: True}, trusted={address: digest}),
        _fact("c1", reached={address: True}, trusted={address: "another"}),
        _fact("c2", reached={address: False}, trusted={address: digest}),
    )
    assert [(finding.machine, finding.what) for finding in found if finding.level == MEND] == [
        ("c1", f"its engine does not trust the registry at {address}"),
        ("c2", f"cannot reach the registry at {address}"),
    ]


def test_sandbox_without_a_job_is_a_stray(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_jobs", lambda: {"7"})
    monkeypatch.setattr(doctor, "_sandboxes", lambda _machine: {"a" * 64, "b" * 64})
    found = examine(_fact("head", "head"), _fact("c1", sandboxes={"a" * 64: "7", "b" * 64: "8"}))
    (fault,) = [finding for finding in found if finding.level == MEND]
    assert (fault.machine, fault.mend) == ("c1", f"there: docker rm --force {'b' * 12}")


def test_sandbox_that_is_just_being_removed_is_none(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_jobs", lambda: set())
    monkeypatch.setattr(doctor, "_sandboxes", lambda _machine: set())
    assert _said(examine(_fact("c1", sandboxes={"a" * 64: "7"})), MEND) == []


def test_images_with_another_python_are_found(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    releases = {"agent": "trixie, 3.13.5", "user": "trixie, 3.13.5", "cluster": "trixie, 3.12.1"}
    monkeypatch.setattr(doctor.machines, "head", lambda _config: _machine("head", "head"))
    monkeypatch.setattr(doctor.images, "built", lambda _config: {name: f"cfiddle-{name}:1" for name in releases})
    monkeypatch.setattr(doctor, "_image_id", lambda reference: f"id of {reference}")
    monkeypatch.setattr(doctor.images, "releases", lambda unknown: {name: releases[name] for name in unknown})
    (fault,) = doctor._pythons(config, State(tmp_path / "state"), is_running=True)
    assert fault.level == MEND
    assert "cfiddle-cluster has trixie, 3.12.1; the others have trixie, 3.13.5" in fault.what
    releases["cluster"] = "trixie, 3.13.5"
    (fine,) = doctor._pythons(config, State(tmp_path / "state"), is_running=True)
    assert (fine.level, fine.what) == (OK, "3 images with trixie, 3.13.5")


def test_exit_status_and_json(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding(OK, "head", "fine"), Finding(MEND, "c1", "broken", "mend it")]
    monkeypatch.setattr(doctor.packages, "ensure_root", lambda: None)
    monkeypatch.setattr(doctor, "examine", lambda _config, _state: findings)
    assert doctor.main(config, State(tmp_path), as_json=True) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["must_be_mended"] == 1
    assert printed["findings"][1] == {"level": "mend", "machine": "c1", "what": "broken", "mend": "mend it"}
    assert doctor.main(config, State(tmp_path)) == 1
    assert capsys.readouterr().out == "ok    head  fine\nmend  c1    broken\n            → mend it\n\n1 to be mended\n"
    findings.pop()
    assert doctor.main(config, State(tmp_path)) == 0
    assert capsys.readouterr().out.endswith("nothing to mend\n")


def test_what_is_so_on_many_machines_is_said_once_and_narrowly() -> None:
    findings = [
        Finding(NOTE, f"c{n}", "measurements vary more with " + "x " * 60, "do " + "this " * 30) for n in range(9)
    ]
    lines = doctor.text(findings).splitlines()
    assert lines[0].startswith("note  c0 … c8  measurements")
    assert max(map(len, lines)) <= 80
    assert sum("measurements" in line for line in lines) == 1
