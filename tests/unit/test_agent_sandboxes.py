"""The fixed shape of a sandbox, byte for byte, and what privileged code may not even load."""

import ast
import json
import platform
from pathlib import Path

import pytest

import agent
from agent import seccomp, usage
from agent.node import fingerprint, numbers
from agent.policy import Limits, Profile
from agent.sandboxes import configuration

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
            assert not {name.split(".")[0] for name in imported} & FORBIDDEN, path
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


@pytest.mark.parametrize(("text", "cpus"), [("", set()), ("0", {0}), ("0-3", {0, 1, 2, 3}), ("1,4-5", {1, 4, 5})])
def test_list_of_cpus_is_read(text: str, cpus: set[int]) -> None:
    assert numbers(text) == cpus
