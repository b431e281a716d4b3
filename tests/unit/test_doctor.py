"""What the doctor makes of facts: what is well, what is good to know, what must be mended and how."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cfiddle_cluster import doctor, homes
from cfiddle_cluster.config import Config
from cfiddle_cluster.doctor import MEND, NOTE, OK, Finding
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.facts import Facts
from cfiddle_cluster.firewall import Wall
from cfiddle_cluster.machines import Machine, Silent
from cfiddle_cluster.state import State
from samples import config, machine

REGISTRY = "10.0.0.1:5000"
INFO = {
    "ServerVersion": "26.1.5",
    "Driver": "overlay2",
    "SecurityOptions": ["name=seccomp,profile=default"],
    "Images": 9,
}
VALUES = {
    "kernel": "6.1.0",
    "cgroup": "2",
    "controllers": "cpuset cpu io memory pids",
    "MemTotal": "16000",
    "MemAvailable": "8000",
    "SwapTotal": "0",
    "disk-docker": "50000",
    "disk-home": "50000",
    "disk-state": "50000",
    "namespaces": "yes",
    "overlay": "yes",
    "link-veth": "yes",
    "link-vxlan": "yes",
    "link-bridge": "yes",
    "apt-get": "yes",
}
CPU = "/sys/devices/system/cpu"
PARANOID = "/proc/sys/kernel/perf_event_paranoid"
SETTINGS = {
    f"{CPU}/cpu0/cpufreq/scaling_governor": "performance",
    f"{CPU}/cpufreq/boost": "0",
    f"{CPU}/smt/control": "notsupported",
    PARANOID: "2",
}


def well(of: Machine, **changes: Any) -> Facts:
    """Return the facts of a machine that nothing is wrong with, with some changed; `values` are added to its own."""
    values = {**VALUES, "name": of.name, **changes.pop("values", {})}
    found = Facts(machine=of, values=values, engine=INFO, is_engine_installed=True, pmu=["cpu"], settings=SETTINGS)
    return replace(found, **changes)


HEAD, C1, C2 = machine("head", "head"), machine("c1"), machine("c2")


class Patient:
    """A cluster as the doctor meets it."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config: Config = config(tmp_path, WORKER_ADDRS="10.0.0.2 10.0.0.3", HOME_STORAGE="nfs", HOME_SERVER="nas")
        self.state = State(tmp_path / "state")
        self.state.directory.mkdir()
        self.answers: list[Facts | Silent] = [well(found, values={"nfs-client": "yes"}) for found in (HEAD, C1, C2)]
        self.ports_of_the_cluster: set[int] = set()
        self.is_running = True
        self.jobs: set[str] = set()
        self.working: set[str] = set()
        self.sandboxes_later: dict[str, set[str]] = {}
        self.walls: list[Wall | Silent] = []
        self.is_walled = True
        monkeypatch.setattr(doctor.packages, "ensure_root", lambda: None)
        monkeypatch.setattr(doctor.machines, "short_hostname", lambda: "head")
        monkeypatch.setattr(doctor.engine, "is_running", lambda: self.is_running)
        monkeypatch.setattr(doctor.simulated, "existing", lambda: ["c1", "c2"])
        monkeypatch.setattr(doctor.facts, "gather", lambda _machines, **_wanted: self.answers)
        monkeypatch.setattr(doctor, "_ports_of_the_cluster", lambda: self.ports_of_the_cluster)
        monkeypatch.setattr(doctor, "_has_registry", lambda: False)
        monkeypatch.setattr(doctor.firewall, "is_set", lambda _state: self.is_walled)
        monkeypatch.setattr(doctor.firewall, "survey", lambda *_args: self.walls)
        monkeypatch.setattr(doctor, "_pythons", lambda *_args, **_kwargs: [])
        monkeypatch.setattr(doctor, "_working_nodes", lambda: self.working)
        monkeypatch.setattr(doctor, "_jobs", lambda: self.jobs)
        monkeypatch.setattr(doctor, "_sandboxes", lambda found: self.sandboxes_later.get(found.name, set()))
        monkeypatch.setattr(doctor, "STRAY_AFTER_S", 0.0)

    def change(self, name: str, **changes: Any) -> None:
        """Change facts of one machine."""
        for place, answer in enumerate(self.answers):
            if answer.machine.name == name and isinstance(answer, Facts):
                values = {**answer.values, **changes.pop("values", {})}
                self.answers[place] = replace(answer, values=values, **changes)

    def findings(self, level: str) -> list[Finding]:
        return [found for found in doctor.examine(self.config, self.state) if found.level == level]

    def only(self, level: str) -> Finding:
        found = self.findings(level)
        assert len(found) == 1, found
        return found[0]


@pytest.fixture
def patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Patient:
    return Patient(tmp_path, monkeypatch)


def test_nothing_is_found_where_nothing_is_wrong(patient: Patient, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(patient.config, patient.state) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "nothing to mend"
    assert all(line.startswith(("ok ", " ")) for line in lines[:-2])


@pytest.mark.parametrize(
    ("who", "changes", "what", "mend"),
    [
        ("c1", {"engine": INFO | {"LiveRestoreEnabled": True}}, "live-restore", "daemon.json"),
        ("head", {"engine": INFO | {"SecurityOptions": ["name=userns"]}}, "userns-remap", "daemon.json"),
        ("c2", {"engine": INFO | {"SecurityOptions": ["name=rootless", "name=cgroupns"]}}, "rootless", "for root"),
        (
            "c1",
            {"engine": None, "is_engine_installed": False, "values": {"apt-get": ""}},
            "no Docker Engine",
            "by hand",
        ),
        ("c1", {"values": {"overlay": "no", "link-vxlan": "no"}}, "lacks overlay file systems, VXLAN", "kernel"),
        ("c1", {"values": {"controllers": "cpu cpuset pids"}}, "cgroup v2 without memory", "cgroup_enable=memory"),
        (
            "head",
            {"listeners": {("tcp", 2377): "nginx"}},
            "port 2377/tcp, which Swarm needs, is held by nginx",
            "end nginx",
        ),
        ("c1", {"listeners": {("udp", 4789): "vpnd"}}, "port 4789/udp", "end vpnd"),
        (
            "head",
            {"listeners": {("tcp", 8888): "python3"}},
            "(JUPYTER_PORT) is held by python3",
            "JUPYTER_PORT in config.sh",
        ),
        (
            "head",
            {"listeners": {("tcp", 5000): "docker-proxy"}},
            "(REGISTRY_PORT) is held by another container",
            "config.sh",
        ),
        ("head", {"values": {"disk-home": "900"}}, "900 MB of disk left for homes", "make room"),
        ("c2", {"values": {"disk-docker": "12"}}, "12 MB of disk left for images", "docker system df"),
        ("c2", {"values": {"MemAvailable": "100"}}, "100 MB of 16000 MB of memory left", "end what takes it"),
        ("c2", {"values": {"nfs-client": ""}}, "cannot mount NFS", "kernel that has NFS"),
        ("c2", {"reached": {"nas:2049": False}}, "cannot reach the NFS server at nas:2049", "open that port"),
        ("c1", {"offset_s": 500.0, "offset_error_s": 0.1}, "its clock is 500.0 s ahead of the head's", "keep time"),
        ("c1", {"values": {"name": "c2"}}, "addr-c1 and addr-c2 are both named c2", "hostnamectl hostname"),
        ("c1", {"values": {"name": "c_1"}}, "'c_1' cannot be a node's name", "hostnamectl hostname"),
        ("c1", {"values": {"name": "mysql"}}, "mysql is the name of one of the cluster's services", "hostnamectl"),
    ],
)
def test_what_would_not_work_must_be_mended(
    patient: Patient, who: str, changes: dict[str, Any], what: str, mend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    patient.change(who, **changes)
    found = patient.only(MEND)
    assert found.machine == changes.get("values", {}).get("name", who)
    assert what in found.what
    assert mend in found.mend
    assert doctor.main(patient.config, patient.state) == 1
    assert "1 to be mended" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"engine": None, "is_engine_installed": False}, "no Docker Engine yet"),
        ({"engine": None}, "Docker Engine does not run yet"),
        ({"values": {"link-veth": "unknown"}}, "no telling yet whether it has veth pairs"),
        ({"pmu": []}, "no hardware counters"),
        ({"settings": {**SETTINGS, PARANOID: "4"}}, "closed to users: kernel.perf_event_paranoid is 4"),
        ({"settings": {f"{CPU}/smt/control": "off"}}, "the kernel was built without perf events"),
        (
            {
                "settings": {
                    **SETTINGS,
                    f"{CPU}/cpu0/cpufreq/scaling_governor": "powersave",
                    f"{CPU}/cpu1/cpufreq/scaling_governor": "powersave",
                    f"{CPU}/cpufreq/boost": "1",
                }
            },
            "vary more with governor powersave, boost on",
        ),
        (
            {
                "settings": {
                    **SETTINGS,
                    f"{CPU}/intel_pstate/no_turbo": "0",
                    f"{CPU}/smt/control": "on",
                    "swap:/dev/sda": "on",
                },
                "values": {"swap-used": "12"},
            },
            "boost on, swap on, SMT on, 12 MB of swap in use",
        ),
        ({"foreign": ["web", "db"]}, "containers that are not the cluster's run beside measurements: web, db"),
        ({"foreign": list("abcdefg")}, "a, b, c, d, e …"),
        ({"values": {"steal": "25"}}, "2.5 % of its CPU time went to other virtual machines"),
        ({"values": {"throttled": "3"}}, "slowed down 3 times for heat"),
        (
            {"busy": [("firefox", 80), ("make", 12)]},
            "busy while no job runs, in percent of one CPU: firefox 80 %, make 12 %",
        ),
        ({"offset_s": -5.0, "offset_error_s": 0.5}, "its clock is 5.0 s behind"),
    ],
)
def test_what_is_good_to_know_need_not_be_mended(patient: Patient, changes: dict[str, Any], what: str) -> None:
    patient.change("c1", **changes)
    found = patient.only(NOTE)
    assert found.machine == "c1"
    assert what in found.what
    assert patient.findings(MEND) == []


@pytest.mark.parametrize(
    ("who", "changes"),
    [
        ("head", {"listeners": {("tcp", 2377): "dockerd", ("tcp", 7946): "dockerd", ("udp", 4789): "kernel"}}),
        ("head", {"listeners": {("tcp", 4789): "nginx"}}),  # not the protocol that Swarm uses
        ("c1", {"listeners": {("tcp", 2377): "nginx", ("tcp", 8888): "python3"}}),  # the head's ports
        ("c1", {"settings": {**SETTINGS, f"{CPU}/intel_pstate/no_turbo": "1", f"{CPU}/smt/control": "forceoff"}}),
        ("c1", {"settings": {**SETTINGS, PARANOID: "-1"}}),
        ("c1", {"values": {"steal": "9", "throttled": "0"}}),
        ("c1", {"engine": INFO | {"ClientInfo": {"Version": "26.1.5", "Plugins": []}}}),  # nothing is built there
        ("head", {"engine": INFO | {"ClientInfo": {"Version": "26.1.5", "Plugins": [{"Name": "buildx"}]}}}),
        ("head", {"engine": INFO | {"ClientInfo": {"Debug": False, "Plugins": None}}}),  # the client of 20.10
        ("c1", {"offset_s": 30.0, "offset_error_s": 29.0}),  # a slow answer proves nothing
        # nothing is measured there
        ("head", {"pmu": [], "settings": {f"{CPU}/smt/control": "on"}, "foreign": ["web"], "busy": [("firefox", 80)]}),
    ],
)
def test_what_is_well_is_let_alone(patient: Patient, who: str, changes: dict[str, Any]) -> None:
    patient.change(who, **changes)
    assert patient.findings(MEND) + patient.findings(NOTE) == []


def test_a_worker_that_runs_a_job_may_be_busy(patient: Patient) -> None:
    patient.change("c1", busy=[("function", 100)])
    patient.working = {"c2"}
    assert len(patient.findings(NOTE)) == 1
    patient.working = {"c1"}
    assert patient.findings(NOTE) == []


def test_simulated_workers_measure_on_the_head_s_hardware(patient: Patient, tmp_path: Path) -> None:
    patient.config = config(tmp_path)
    settings = {**SETTINGS, f"{CPU}/smt/control": "on"}
    patient.answers = [well(found, settings=settings, busy=[("x", 50)], foreign=["web"]) for found in (HEAD, C1, C2)]
    found = patient.findings(NOTE)
    assert [finding.machine for finding in found] == ["head"] * 3
    assert any("real workers" in finding.mend for finding in found)
    patient.working = {"c2"}
    assert len(patient.findings(NOTE)) == 2


def test_what_tune_may_not_set_is_told_with_where_to_allow_it(patient: Patient) -> None:
    patient.change("c1", settings={**SETTINGS, f"{CPU}/smt/control": "on"})
    assert patient.only(NOTE).mend == "./invoke tune"
    patient.config = replace(patient.config, tune=frozenset({"governor"}))
    assert "TUNE in config.sh" in patient.only(NOTE).mend


def test_ports_that_the_cluster_s_own_containers_hold_are_well(patient: Patient) -> None:
    patient.change("head", listeners={("tcp", 8888): "docker-proxy", ("tcp", 5000): "docker-proxy"})
    patient.ports_of_the_cluster = {8888, 5000}
    assert patient.findings(MEND) == []


def test_head_that_lacks_a_command_is_told_what_installs_it(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda command: None if command == "openssl" else f"/bin/{command}")
    assert patient.only(NOTE) == Finding(NOTE, "head", "lacks openssl", "./invoke up installs what is missing")
    patient.change("head", values={"apt-get": ""})
    assert patient.only(MEND).mend == "install them by hand"


def test_silent_machine_is_named_and_the_others_are_shown(patient: Patient) -> None:
    silent = Silent(C1, ClusterError("10.0.0.2 cannot be reached by SSH:\nssh: no route", "see that it is up"))
    patient.answers[1] = silent
    found = patient.only(MEND)
    assert found.machine == "c1"
    assert found.what == "does not answer: 10.0.0.2 cannot be reached by SSH: ssh: no route"
    assert found.mend == "see that it is up"
    assert {other.machine for other in patient.findings(OK)} == {"head", "c2"}


def test_silent_machine_is_told_of_without_ssh_s_banner(patient: Patient) -> None:
    said = "10.0.0.2 shows another host key:\n@@@@@\n@ WARNING @\nHost key verification failed."
    patient.answers[1] = Silent(C1, ClusterError(said, "do this"))
    assert patient.only(MEND).what == (
        "does not answer: 10.0.0.2 shows another host key: Host key verification failed."
    )


def test_clock_of_a_simulated_machine_is_the_head_s(patient: Patient) -> None:
    patient.answers[1] = well(machine("c1", simulated=True), values={"nfs-client": "yes"}, offset_s=700.0)
    assert patient.findings(MEND) == []


def test_head_that_cannot_serve_homes_is_told(patient: Patient, tmp_path: Path) -> None:
    patient.config = config(tmp_path, WORKER_ADDRS="10.0.0.2 10.0.0.3")
    found = patient.only(MEND)
    assert (found.machine, "HOME_SERVER" in found.mend) == ("head", True)
    patient.change("head", values={"nfs-server": "yes"})
    assert patient.findings(MEND) == []


def test_nfs_is_not_asked_for_where_homes_are_bound(patient: Patient, tmp_path: Path) -> None:
    patient.config = config(tmp_path)
    for name in ("head", "c1", "c2"):
        patient.change(name, values={"nfs-client": ""})
    patient.is_running = False
    assert patient.findings(MEND) == []
    assert not [found for found in patient.findings(OK) if "NFS" in found.what]


@pytest.mark.parametrize("homes_are_exported", [False, True])
def test_nfs_server_is_asked_for_once_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, homes_are_exported: bool
) -> None:
    monkeypatch.setattr(homes, "EXPORTS", tmp_path / "exports")
    if homes_are_exported:
        homes.EXPORTS.write_text("")
    settings = config(tmp_path, WORKER_ADDRS="10.0.0.2")
    assert doctor._targets(settings, is_running=False) == (["10.0.0.1:2049"] if homes_are_exported else [])


def test_registry_must_be_reached_and_trusted_from_every_machine(patient: Patient) -> None:
    certificate = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
    patient.state.path("ca.crt").write_text(certificate)
    digest = hashlib.sha256(certificate.encode()).hexdigest()
    for name in ("head", "c1", "c2"):
        patient.change(name, reached={REGISTRY: True}, trusted={REGISTRY: digest})
    assert patient.findings(MEND) == []
    patient.change("c1", trusted={REGISTRY: "00"})
    patient.change("c2", reached={REGISTRY: False})
    first, second = patient.findings(MEND)
    assert (first.machine, first.mend) == ("c1", "./invoke up")
    assert "does not trust" in first.what
    assert (second.machine, "cannot reach" in second.what) == ("c2", True)


# --- the registry's account, the images ------------------------------------------------------------------------------


def _logged_in(monkeypatch: pytest.MonkeyPatch, login: Callable[[], None]) -> None:
    class Account:
        address = REGISTRY
        username = "cfiddle"

        def ensure_login(self) -> None:
            login()

    monkeypatch.setattr(doctor, "_has_registry", lambda: True)
    monkeypatch.setattr(doctor.registry, "of", lambda _config, _state: Account())


def _refuse() -> None:
    raise ClusterError(f"{REGISTRY} refuses the password of cfiddle", "docker service rm cfiddle-registry")


def test_registry_that_refuses_the_password_must_be_mended(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    patient.state.path("secrets").mkdir()
    _logged_in(monkeypatch, lambda: None)
    assert patient.findings(MEND) == []
    _logged_in(monkeypatch, _refuse)
    found = patient.only(MEND)
    assert "refuses the password" in found.what
    assert found.mend == "docker service rm cfiddle-registry"


def test_account_without_a_password_is_told_and_nobody_is_asked(
    patient: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DOCKERHUB_TOKEN", raising=False)
    monkeypatch.setattr(doctor.registry, "of", lambda *_args: pytest.fail("it might ask"))
    patient.config = replace(patient.config, dockerhub_username="teacher")
    assert "DOCKERHUB_TOKEN" in patient.only(MEND).mend


# The fixture puts a stand-in there.
_pythons = doctor._pythons


@pytest.mark.parametrize(
    ("odd", "level", "what"),
    [
        ("Debian 13, Python 3.13.5", OK, "3 images with Debian 13, Python 3.13.5"),
        ("Debian 12, Python 3.11.2", MEND, "cfiddle-sandbox has Debian 12, Python 3.11.2"),
    ],
)
def test_images_must_have_one_python(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, odd: str, level: str, what: str
) -> None:
    found = dict.fromkeys(("user", "cluster"), "Debian 13, Python 3.13.5") | {"sandbox": odd}
    monkeypatch.setattr(doctor.images, "built", lambda _config: {})
    monkeypatch.setattr(doctor.images, "releases", lambda *_args: found)
    (finding,) = _pythons(patient.config, patient.state, is_running=True)
    assert finding.level == level
    assert what in finding.what


# --- what sandboxes leave --------------------------------------------------------------------------------------------


def test_sandbox_of_a_job_in_the_queue_is_well(patient: Patient) -> None:
    patient.change("c1", sandboxes={"abc": "12"})
    patient.jobs = {"12"}
    patient.sandboxes_later = {"c1": {"abc"}}
    assert patient.findings(MEND) == []


def test_sandbox_without_a_job_is_told_with_how_to_remove_it(patient: Patient) -> None:
    identity = "0123456789abcdef"
    patient.change("c1", sandboxes={identity: "12", "fedcba": "13", "nojob": ""})
    patient.jobs = {"13"}
    patient.sandboxes_later = {"c1": {identity, "fedcba", "nojob"}}
    found = patient.only(MEND)
    assert (found.machine, found.mend) == ("c1", "there: docker rm --force 0123456789ab nojob")
    assert "2 sandboxes" in found.what


def test_sandbox_that_is_just_being_removed_is_well(patient: Patient) -> None:
    patient.change("c1", sandboxes={"abc": "12"})
    assert patient.findings(MEND) == []


# --- before the first up ---------------------------------------------------------------------------------------------


def test_doctor_works_before_the_first_up(patient: Patient, tmp_path: Path) -> None:
    patient.config = config(tmp_path)
    patient.is_running = False
    patient.state = State(tmp_path / "no-state")
    patient.answers = [well(HEAD, engine=None, is_engine_installed=False)]
    assert patient.findings(MEND) == []
    assert patient.only(NOTE).mend == "./invoke up installs it"
    said = " ".join(found.what for found in patient.findings(OK))
    assert "no simulated machines yet" in said
    assert "no registry yet" in said
    assert not patient.state.directory.exists()


@pytest.mark.parametrize(("images", "faults"), [(0, 1), (9, 0)])
def test_disk_must_hold_the_images_that_are_not_built_yet(patient: Patient, images: int, faults: int) -> None:
    patient.change("head", engine=INFO | {"Images": images}, values={"disk-docker": "4000"})
    assert len(patient.findings(MEND)) == faults


# --- what a person and a program read --------------------------------------------------------------------------------


def test_ports_that_are_open_to_everybody_are_told(patient: Patient, tmp_path: Path) -> None:
    patient.is_walled = False
    assert patient.only(NOTE).mend.startswith("./invoke firewall --set")
    patient.config = config(tmp_path)
    assert not [found for found in patient.findings(NOTE) if "firewall" in found.mend]


def test_firewall_that_differs_must_be_mended(patient: Patient) -> None:
    wanted = {"iptables": ["-A CFIDDLE-MEMBERS -j DROP"]}
    patient.walls = [
        Wall(HEAD, {}, wanted, wanted, "yes"),
        Wall(C1, {}, wanted, {"iptables": []}, "yes"),
        Silent(C2, ClusterError("no answer")),
    ]
    assert Finding(OK, "head", "strangers are kept from the cluster's ports") in patient.findings(OK)
    assert patient.only(MEND) == Finding(MEND, "c1", "its firewall is not as it should be", "./invoke firewall --set")


def _lines(findings: Sequence[Finding]) -> list[str]:
    return doctor.text(findings).splitlines()


def test_lines_are_at_most_80_columns_wide() -> None:
    findings = [
        Finding(OK, "c1", "fine"),
        Finding(MEND, "a-rather-long-name", "word " * 40, "do this " * 20),
        Finding(NOTE, "c1", "/a/path/without/any/blank" * 3),
    ]
    lines = _lines(findings)
    assert max(map(len, lines)) <= 80
    assert "→ do this" in "\n".join(lines)
    assert lines[0] == "ok    c1                  fine"


def test_what_is_so_on_several_machines_is_said_once() -> None:
    same = [Finding(OK, name, "fine") for name in ("c1", "c2", "c3")]
    assert _lines(same) == ["ok    c1, c2, c3  fine"]
    many = [Finding(OK, f"c{number}", "fine") for number in range(1, 201)]
    assert _lines(many) == ["ok    c1 … c200  fine"]
    assert len(_lines([*same, Finding(OK, "c4", "also fine")])) == 2


def test_json_has_every_finding(patient: Patient, capsys: pytest.CaptureFixture[str]) -> None:
    patient.change("c1", engine=INFO | {"LiveRestoreEnabled": True})
    assert doctor.main(patient.config, patient.state, as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["must_be_mended"] == 1
    assert [finding["machine"] for finding in found["findings"] if finding["level"] == "mend"] == ["c1"]
    assert {"level", "machine", "what", "mend"} == set(found["findings"][0])
