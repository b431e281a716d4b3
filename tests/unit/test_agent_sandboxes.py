"""The fixed shape of a sandbox, byte for byte, and what privileged code may not even load."""

import ast
import dataclasses
import errno
import json
import os
import platform
import socket
from pathlib import Path

import pytest

import agent
from agent import seccomp, usage, wire
from agent.engine import Engine
from agent.node import counters, fingerprint, numbers
from agent.policy import Limits, Mount, Profile
from agent.sandboxes import Sandbox, SandboxError, State, configuration

LIMITS = Limits(
    seconds=10,
    memory_mb=256,
    processes=64,
    cpus="job",
    open_files=128,
    file_mb=16,
    tmpfs_mb=64,
    tmpfs_files=1000,
    output_mb=4,
)
PROFILE = Profile("default", "cfiddle-sandbox:1", ("python3", "-I", "-m", "delegate_function.inside"), LIMITS)

GOLDEN = {
    "Image": "cfiddle-sandbox:1",
    "Entrypoint": ["python3", "-I", "-m", "delegate_function.inside"],
    "Cmd": [],
    "User": "65533:65533",
    "WorkingDir": "/tmp",
    "Hostname": "sandbox",
    "NetworkDisabled": True,
    "Labels": {"cfiddle.cluster": "cfiddle", "cfiddle.sandbox": "1"},
    "HostConfig": {
        "AutoRemove": False,
        "Binds": ["/sockets/x:/run/cfiddle:ro"],
        "CapAdd": [],
        "CapDrop": ["ALL"],
        "CgroupParent": "/cfiddle",
        "CpusetCpus": "0-1",
        "Init": False,
        "IpcMode": "none",
        "LogConfig": {"Type": "none"},
        "Memory": 268435456,
        "MemorySwap": 268435456,
        "Mounts": [],
        "NetworkMode": "none",
        "OomKillDisable": False,
        "PidsLimit": 64,
        "Privileged": False,
        "ReadonlyRootfs": True,
        "RestartPolicy": {"Name": "no"},
        "SecurityOpt": ["no-new-privileges", "seccomp={}"],
        "Tmpfs": {
            "/dev/shm": "rw,exec,nosuid,nodev,size=64m,nr_inodes=1000,mode=1777",
            "/tmp": "rw,exec,nosuid,nodev,size=64m,nr_inodes=1000,mode=1777",
        },
        "Ulimits": [
            {"Name": "nofile", "Soft": 128, "Hard": 128},
            {"Name": "fsize", "Soft": 16777216, "Hard": 16777216},
            {"Name": "core", "Soft": 0, "Hard": 0},
            {"Name": "msgqueue", "Soft": 0, "Hard": 0},
            {"Name": "memlock", "Soft": 65536, "Hard": 65536},
        ],
    },
}

# What would run somebody's code, follow somebody's path, or start a program.
FORBIDDEN = {"pickle", "cloudpickle", "marshal", "shelve", "dill", "ctypes", "subprocess", "importlib", "runpy", "code"}
FORBIDDEN_NAMES = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "system",
    "popen",
    "unsafe_load",
    "full_load",
    "execv",
    "fork",
}


def test_configuration_is_the_golden_one() -> None:
    found = configuration(
        profile=PROFILE,
        limits=LIMITS,
        cpus="0-1",
        socket_directory="/sockets/x",
        cgroup_parent="/cfiddle",
        seccomp_profile="{}",
    )
    assert json.dumps(found) == json.dumps(GOLDEN)


def test_mounts_are_read_only_and_bring_nothing_along() -> None:
    found = configuration(
        profile=dataclasses.replace(PROFILE, mounts=(Mount("/srv/data", "/data"),)),
        limits=LIMITS,
        cpus="",
        socket_directory="/sockets/x",
        cgroup_parent="/cfiddle",
        seccomp_profile="{}",
    )
    [mount] = found["HostConfig"]["Mounts"]
    assert (mount["Type"], mount["Source"], mount["Target"], mount["ReadOnly"]) == ("bind", "/srv/data", "/data", True)
    assert mount["BindOptions"] == {"NonRecursive": True, "Propagation": "rprivate"}
    assert found["HostConfig"]["Binds"] == ["/sockets/x:/run/cfiddle:ro"]


def test_what_a_sandbox_may_say_and_when(tmp_path: Path) -> None:
    path, kind = str(tmp_path / "socket"), (socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with socket.socket(*kind) as listener, socket.socket(*kind) as process:
        listener.bind(path)
        listener.listen()
        options = {"profile": PROFILE, "limits": LIMITS, "cpus": ""}
        sandbox = Sandbox(Engine(path), tmp_path, "c", listener, **options)  # type: ignore[arg-type]
        process.connect(path)
        woken, nothing = os.eventfd(1), os.eventfd(0)
        wire.send(process, {"type": "connected", "counters": 0})
        assert sandbox.wait_until(State.CONNECTED, timeout_s=5, wake=nothing)
        assert not sandbox.wait_until(State.READY, timeout_s=5, wake=woken)
        assert wire.receive(process)[0] == {"type": "prepare"}
        sandbox.hand_over([])
        assert wire.receive(process)[0] == {"type": "call"}
        said = [("ready", None), ("returned", 0), ("done", 3)]
        for what, status in said:
            wire.send(process, {"type": what, "status": 3})
            assert sandbox.status() == status
            assert sandbox.has_returned is (what != "ready")
        for what in ("ready", "returned", "connected"):
            wire.send(process, {"type": what})
            with pytest.raises(SandboxError):
                sandbox.status()
        sandbox.connection.close()
        os.close(woken)
        os.close(nothing)


def test_agent_loads_nothing_that_runs_what_it_is_given() -> None:
    modules = sorted(Path(agent.__file__).parent.glob("*.py"))
    assert len(modules) > 8
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            imported: list[str] = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
                assert not {alias.name for alias in node.names} & FORBIDDEN_NAMES, path
            allowed = {"ctypes"} if path.name == "munge.py" else set()  # MUNGE has no other interface than its library
            assert not {name.split(".")[0] for name in imported} & (FORBIDDEN - allowed), path
            assert not any(name.split(".")[0] in ("delegate_function", "cfiddle_cluster") for name in imported), path
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                assert name not in FORBIDDEN_NAMES or ast.unparse(node.func) == "re.compile", (path, name)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_seccomp_allows_a_list_and_denies_the_rest(machine: str) -> None:
    profile = seccomp.profile(machine, counters=False)
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert len(profile["architectures"]) == 1
    anyhow = {name for rule in profile["syscalls"] if not rule.get("args") for name in rule["names"]} - {"clone3"}
    denied = """
        mount umount2 unshare setns pivot_root chroot ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd
        bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register keyctl add_key
        request_key socket clone init_module finit_module delete_module kexec_load reboot swapon swapoff acct
        quotactl syslog personality iopl ioperm open_by_handle_at name_to_handle_at vmsplice splice shmget
        msgget semget mq_open setuid setgid capset settimeofday clock_settime adjtimex sethostname fanotify_init
        fsopen open_tree move_mount io_setup
    """
    assert not anyhow & set(denied.split())
    assert {"read", "write", "futex", "mmap", "execve", "exit_group"} <= anyhow
    [clone] = [rule for rule in profile["syscalls"] if rule["names"] == ["clone"]]
    assert clone["args"][0]["value"] & 0x7E020000 == 0x7E020000
    families = [rule["args"][0]["value"] for rule in profile["syscalls"] if rule["names"] == ["socket"]]
    assert families == [1, 2, 10]


def test_counters_are_of_oneself_alone() -> None:
    without, given = (seccomp.profile("x86_64", counters=counters)["syscalls"] for counters in (False, True))
    [rule] = [rule for rule in given if rule not in without]
    assert [found for found in given if found is not rule] == without
    assert (rule["names"], rule["action"]) == (["perf_event_open"], "SCMP_ACT_ALLOW")
    masks = {argument["index"]: (argument["value"], argument["valueTwo"]) for argument in rule["args"]}
    assert masks == {1: (0xFFFFFFFF, 0), 4: (0xFFFFFFFFFFFFFFF7, 0)}, "pid 0; no flag but to close it at exec"
    assert {argument["op"] for argument in rule["args"]} == {"SCMP_CMP_MASKED_EQ"}


def test_seccomp_knows_this_machine() -> None:
    assert seccomp.profile(platform.machine(), counters=True)


def _write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


def test_usage_is_read_from_cgroup_1(tmp_path: Path) -> None:
    _write(
        tmp_path / "memory/cfiddle/abc",
        memory__max_usage_in_bytes="104857600\n",
        memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    )
    _write(tmp_path / "pids/cfiddle/abc", pids__events="max 3\n", pids__current="5\n")
    _write(tmp_path / "cpuacct/cfiddle/abc", cpuacct__usage_user="1500000000\n", cpuacct__usage_sys="250000000\n")
    assert usage.Cgroup(tmp_path, "abc").read() == usage.Reading(1.5, 0.25, 100.0, 2, 3, 5)


@pytest.mark.parametrize("name", ["cfiddle/abc", "cfiddle.slice/docker-abc.scope"])
def test_usage_is_read_from_cgroup_2(tmp_path: Path, name: str) -> None:
    _write(tmp_path, cgroup__controllers="cpu memory pids\n")
    _write(
        tmp_path / name,
        memory__peak="104857600\n",
        memory__events="low 0\nhigh 0\nmax 9\noom 2\noom_kill 2\n",
        pids__events="max 3\n",
        pids__current="5\n",
        cpu__stat="usage_usec 1750000\nuser_usec 1500000\nsystem_usec 250000\n",
    )
    assert usage.Cgroup(tmp_path, "abc").read() == usage.Reading(1.5, 0.25, 100.0, 2, 3, 5)


def test_usage_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert usage.Cgroup(tmp_path, "abc").read() == usage.Reading(None, None, None, 0, 0, None)


def test_a_group_is_frozen_and_thawed(tmp_path: Path) -> None:
    _write(tmp_path / "1/freezer/cfiddle/abc", freezer__state="THAWED\n")
    _write(tmp_path / "2", cgroup__controllers="cpu\n")
    _write(tmp_path / "2/cfiddle.slice/docker-abc.scope", cgroup__freeze="0\n")
    files = (
        tmp_path / "1/freezer/cfiddle/abc/freezer.state",
        tmp_path / "2/cfiddle.slice/docker-abc.scope/cgroup.freeze",
    )
    groups = [usage.Cgroup(tmp_path / version, "abc") for version in ("1", "2")]
    for group in groups:
        group.freeze()
    assert [file.read_text() for file in files] == ["FROZEN", "1"]
    for group in groups:
        group.thaw()
    assert [file.read_text() for file in files] == ["THAWED", "0"]


def test_a_group_that_is_gone_is_thawed_but_cannot_be_frozen(tmp_path: Path) -> None:
    group = usage.Cgroup(tmp_path, "abc")
    group.thaw()
    with pytest.raises(FileNotFoundError, match="cannot be frozen"):
        group.freeze()


def test_cgroup_parent_is_what_the_driver_wants() -> None:
    assert usage.parent("cgroupfs") == "/cfiddle"
    assert usage.parent("systemd") == "cfiddle.slice"


def test_fingerprint_says_what_the_machine_says(tmp_path: Path) -> None:
    _write(tmp_path / "proc", cpuinfo="processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\n")
    cpu = tmp_path / "sys/devices/system/cpu"
    _write(cpu, online="0-3\n")
    _write(cpu / "smt", active="1\n")
    _write(cpu / "cpufreq", boost="1\n")
    _write(cpu / "cpu2/cpufreq", scaling_governor="performance\n")
    found = fingerprint(cpus="2-3", image="sha256:1", counters=None, root=tmp_path)
    assert (found["cpu_model"], found["cores"], found["cpus"]) == ("Fast CPU @ 3 GHz", 2, "2-3")
    assert (found["governor"], found["boost"], found["smt"]) == ("performance", True, True)
    assert found["image"] == "sha256:1"
    _write(cpu / "intel_pstate", no_turbo="1\n")
    found = fingerprint(cpus="", image="", counters=None, root=tmp_path)
    assert (found["cores"], found["cpus"], found["boost"], found["governor"]) == (4, "0-3", False, None)


def test_fingerprint_of_a_machine_that_says_nothing(tmp_path: Path) -> None:
    found = fingerprint(cpus="", image="", counters=None, root=tmp_path)
    assert (found["cpu_model"], found["governor"], found["boost"], found["smt"]) == (None, None, None, None)


@pytest.mark.parametrize(
    ("allowed", "error", "said"),
    [
        (False, errno.EPERM, "policy: profile default has no counters"),
        (False, 0, "policy: profile default has no counters"),
        (True, 0, "available"),
        (True, errno.EACCES, "kernel: perf_event_paranoid is 4; counting one's own programs needs 2 or less"),
        (True, errno.EPERM, "kernel: perf_event_paranoid is 4; counting one's own programs needs 2 or less"),
        (True, errno.ENOSYS, "kernel: it was built without perf events"),
        (True, errno.ENOENT, "machine: no PMU that the kernel can use (No such file or directory)"),
        (True, errno.EOPNOTSUPP, "machine: no PMU that the kernel can use (Operation not supported)"),
        (True, None, None),
    ],
)
def test_why_there_are_no_counters(tmp_path: Path, allowed: bool, error: int | None, said: str | None) -> None:
    (tmp_path / "paranoid").write_text("4\n")
    assert counters(dataclasses.replace(PROFILE, counters=allowed), error, tmp_path / "paranoid") == said


@pytest.mark.parametrize(("text", "cpus"), [("", set()), ("0", {0}), ("0-3", {0, 1, 2, 3}), ("1,4-5", {1, 4, 5})])
def test_list_of_cpus_is_read(text: str, cpus: set[int]) -> None:
    assert numbers(text) == cpus
