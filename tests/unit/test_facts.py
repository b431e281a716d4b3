"""Facts about machines: what probe.sh prints of this one, and what is read from such lines."""

import socket
import subprocess
import time
from pathlib import Path

import pytest

from cfiddle_cluster import facts
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.facts import Facts, gather, parse
from cfiddle_cluster.machines import Machine, Silent

HERE = Machine(name="here", addr="127.0.0.1", roles=frozenset({"head"}))

PRINTED = """\
began 100.5
name c1
kernel 6.1.0
disk-docker 5000
MemTotal 2000
listen tcp 2377 dockerd
listen udp 4789 kernel
listen tcp 80 a program
reach-10.0.0.1:5000 yes
reach-10.0.0.2:2049 no
trust 10.0.0.1:5000 abc
sandbox 0123 17
sandbox 4567
pmu cpu
setting /sys/devices/system/cpu/smt/control on
setting swap:/dev/sda2 on
busy 80 Web Content
busy 12 kworker/0:1
container beside
info {"ServerVersion":"26.1.5","LiveRestoreEnabled":false}
nfs-client yes
paranoid -1
governor
swap-used 12
ended 101.5
"""


def test_every_kind_of_line_is_read() -> None:
    found = parse(HERE, PRINTED, sent=100.0, received=102.0)
    assert found.name == "c1"
    assert found.listeners == {("tcp", 2377): "dockerd", ("udp", 4789): "kernel", ("tcp", 80): "a program"}
    assert found.reached == {"10.0.0.1:5000": True, "10.0.0.2:2049": False}
    assert found.trusted == {"10.0.0.1:5000": "abc"}
    assert found.sandboxes == {"0123": "17", "4567": ""}
    assert found.pmu == ["cpu"]
    assert found.settings == {"/sys/devices/system/cpu/smt/control": "on", "swap:/dev/sda2": "on"}
    assert found.busy == [("Web Content", 80), ("kworker/0:1", 12)]
    assert found.foreign == ["beside"]
    assert found.engine
    assert found.engine["ServerVersion"] == "26.1.5"
    assert found.is_yes("nfs-client")
    assert not found.is_yes("nfs-server")
    assert (found.number("disk-docker"), found.number("paranoid"), found.number("governor")) == (5000, -1, None)
    assert found.number("no such") is None


@pytest.mark.parametrize(
    ("began", "ended", "offset_s", "error_s"),
    [
        (100.5, 101.5, 0.0, 0.5),
        (160.5, 161.5, 60.0, 0.5),
        (39.5, 42.5, -60.0, -0.5 + 1.0),
    ],
)
def test_clock_is_told_with_its_error(began: float, ended: float, offset_s: float, error_s: float) -> None:
    found = parse(HERE, f"began {began}\nended {ended}\n", sent=100.0, received=102.0)
    assert found.offset_s == pytest.approx(offset_s)
    assert found.offset_error_s == pytest.approx(error_s)


def test_machine_without_an_engine_and_one_whose_engine_is_stopped() -> None:
    assert not parse(HERE, "engine absent\n", sent=0, received=0).is_engine_installed
    stopped = parse(HERE, "engine stopped\n", sent=0, received=0)
    assert stopped.is_engine_installed
    assert stopped.engine is None


def test_this_machine_is_probed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        port, closed = server.getsockname()[1], other.getsockname()[1]
        other.close()
        (found,) = gather(
            [HERE],
            home_root=tmp_path / "not/yet/there",
            ports=[port, closed],
            targets=[f"127.0.0.1:{port}", f"127.0.0.1:{closed}"],
        )
    assert isinstance(found, Facts)
    assert found.name == socket.gethostname().partition(".")[0]
    assert list(found.listeners) == [("tcp", port)]
    assert found.listeners["tcp", port].startswith("py")
    assert found.reached == {f"127.0.0.1:{port}": True, f"127.0.0.1:{closed}": False}
    assert found.values["cgroup"] in ("1", "2")
    for name in ("disk-docker", "disk-home", "disk-state", "MemTotal", "MemAvailable"):
        assert (found.number(name) or 0) > 0, name
    assert abs(found.offset_s) <= found.offset_error_s + 0.01


def _probe(home_root: Path = Path("/no/such/home"), ports: tuple[int, ...] = ()) -> Facts:
    (found,) = gather([HERE], home_root=home_root, ports=ports, targets=())
    assert isinstance(found, Facts)
    return found


def test_holder_of_a_datagram_port_is_named_too() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as held:
        held.bind(("::1", 0))
        port = held.getsockname()[1]
        assert _probe(ports=(port,)).listeners == {("udp", port): Path("/proc/self/comm").read_text().strip()}
    assert _probe(ports=(port,)).listeners == {}


def test_free_space_is_that_of_the_file_system_that_a_directory_would_be_made_on(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", tmp_path], check=True)
    try:
        assert _probe(home_root=tmp_path / "not" / "yet").number("disk-home") == 64
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_probe_leaves_nothing_behind() -> None:
    before = {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}
    _probe()
    assert "/mnt/all" not in {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()} - before
    assert "cfiddle0" not in {path.name for path in Path("/sys/class/net").iterdir()}


def test_all_are_asked_at_once_and_one_that_fails_does_not_spoil_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(machine: Machine, text: str, args: list[str], *, timeout_s: float) -> str:
        assert text == facts.PROBE.read_text()
        assert args == ["/home", "1 2", "a:1 b:2"]
        time.sleep(0.2)
        if machine.name == "c2":
            raise ClusterError("c2 is not there")
        return f"name {machine.name}\n"

    monkeypatch.setattr(Machine, "script", script)
    machines = [Machine(name=f"c{n}", addr=f"10.0.0.{n}", roles=frozenset({"worker"})) for n in range(1, 9)]
    began = time.monotonic()
    found = gather(machines, home_root=Path("/home"), ports=[1, 2], targets=["a:1", "b:2"])
    assert time.monotonic() - began < 1
    assert [answer.machine.name for answer in found] == [machine.name for machine in machines]
    assert [isinstance(answer, Silent) for answer in found] == [machine.name == "c2" for machine in machines]


def test_what_spoils_measurements_is_read_from_the_kernel_s_files(tmp_path: Path) -> None:
    cpu = "/sys/devices/system/cpu"
    for path, text in {
        f"{cpu}/cpu0/cpufreq/scaling_governor": "performance",
        f"{cpu}/cpu1/cpufreq/scaling_governor": "powersave",
        f"{cpu}/cpufreq/boost": "1",
        f"{cpu}/intel_pstate/no_turbo": "0",
        f"{cpu}/smt/control": "on",
        f"{cpu}/cpu0/thermal_throttle/core_throttle_count": "2",
        f"{cpu}/cpu1/thermal_throttle/package_throttle_count": "17",
        "/sys/bus/event_source/devices/cpu/type": "4",
        "/proc/sys/kernel/perf_event_paranoid": "4",
        "/proc/swaps": "Filename Type Size Used Priority\n/dev/sda2 partition 4096000 20480 -2",
        "/proc/stat": "cpu  700 0 200 99999 50 10 20 70 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0",
    }.items():
        file = tmp_path / path[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    argv = ["bash", str(facts.PROBE), "/", "", "", str(tmp_path)]
    text = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout
    found = parse(HERE, text, sent=0, received=0)
    assert found.settings == {
        f"{cpu}/cpu0/cpufreq/scaling_governor": "performance",
        f"{cpu}/cpu1/cpufreq/scaling_governor": "powersave",
        f"{cpu}/cpufreq/boost": "1",
        f"{cpu}/intel_pstate/no_turbo": "0",
        f"{cpu}/smt/control": "on",
        "/proc/sys/kernel/perf_event_paranoid": "4",
        "swap:/dev/sda2": "on",
    }
    assert found.pmu == ["cpu"]
    assert found.number("swap-used") == 20
    assert found.number("throttled") == 17
    assert found.number("steal") == 70, "7.0 % of the time that was not idle"


def test_who_takes_the_cpu_is_named() -> None:
    with subprocess.Popen(["python3", "-c", "while True: pass"]) as spinning:
        try:
            busy = [name for name, percent in _probe().busy if percent >= 10]
        finally:
            spinning.kill()
    assert any(name.startswith("python3") for name in busy), busy
