"""Slurm's daemons in containers on a network of their own, without a swarm: what each does, and what it survives."""

import contextlib
import re
import secrets
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cfiddle_cluster import config
from cfiddle_cluster.commands import CommandError, docker_cli, run
from cfiddle_cluster.state import new_secret
from cfiddle_cluster.wait import wait_until
from containers import Container, Start

ROOT = Path(__file__).resolve().parents[2]
USER, OTHER = "2001:2001", "2002:2002"
LOOK_AT_CLOCKS = """
import sys, time, types
sys.path.insert(0, "/usr/local/lib/cfiddle")
import node_clocks
node_clocks.time = types.SimpleNamespace(time=lambda: time.time() + float(sys.argv[1]))
node_clocks.main()
"""
"""As slurmctld's container does it, where this machine's clock is so much ahead."""
DOOR = 'from agent.door import Door; import signal; Door(None, None, address="0.0.0.0").open(); signal.pause()'
ACCOUNTS = "ada:x:2001:2001::/:/bin/sh\nben:x:2002:2002::/:/bin/sh\n"

Secret = Callable[[str, str], Path]


@dataclass(frozen=True)
class Slurm:
    """Slurm in containers of this test."""

    slurmctld: Container
    slurmdbd: Container
    slurmd: Container

    def run(self, *argv: str, user: str = USER) -> str:
        """Run one of Slurm's commands where slurmctld runs."""
        return self.slurmctld.run(*argv, user=user)

    def script(self, text: str, user: str = USER) -> str:
        """Run a script as a job's only step and return what it prints."""
        return self.run("srun", "--quiet", "--chdir=/", "--ntasks=1", "sh", "-c", text, user=user)

    def ending(self, job: str) -> str:
        """Wait for a job's end on record and return its state."""
        argv = ("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", "--format=State", "--jobs", job)

        def ended() -> str:
            states = self.run(*argv, user="slurm").split()
            return "" if not states or {"PENDING", "RUNNING"} & set(states) else " ".join(states)

        return wait_until(ended, timeout_s=60, what=f"the end of job {job}")

    def wait_until_answering(self) -> None:
        """Wait until slurmctld answers and the node is idle."""

        def answers() -> bool:
            try:
                return self.run("sinfo", "--noheader", "--format=%T", "--partition=normal").strip() == "idle"
            except CommandError:
                return False

        wait_until(answers, timeout_s=90, what="an idle node")


@pytest.fixture(scope="module")
def munge_key(secret_file: Secret) -> Path:
    path = secret_file("munge-key", secrets.token_hex(64))
    path.chmod(0o400)
    subprocess.run(["chown", "801:801", path], check=True)
    return path


@pytest.fixture(scope="module")
def network() -> Iterator[str]:
    name = f"cfiddle-test-{uuid.uuid4().hex[:8]}"
    run([docker_cli(), "network", "create", "--label", config.LABEL, name], timeout_s=30)
    yield name
    subprocess.run([docker_cli(), "network", "rm", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def slurm(network: str, start_for_all: Start, secret_file: Secret, munge_key: Path) -> Slurm:
    password = secret_file("database-password", secrets.token_hex(32))
    common = ["--volume", f"{munge_key}:/run/secrets/munge-key:ro", "--network", network]
    with_password = ["--volume", f"{password}:/run/secrets/database-password:ro"]
    # No agent runs here, so the check of a node's health would take the node out.
    lines = (ROOT / "conf/slurm.conf").read_text().splitlines()
    conf = secret_file("slurm.conf", "\n".join(line for line in lines if not line.startswith("HealthCheck")) + "\n")
    conf.chmod(0o644)
    settings = [
        f"--volume={conf}:/etc/slurm/slurm.conf:ro",
        f"--volume={ROOT}/conf/cgroup.conf:/etc/slurm/cgroup.conf:ro",
        f"--volume={ROOT}/conf/slurmdbd.conf:/etc/slurm/slurmdbd.conf.in:ro",
    ]

    def named(name: str) -> list[str]:
        return ["--hostname", name, "--network-alias", name]

    start_for_all("mysql", options=[*common, *with_password, *named("mysql")])
    slurmdbd = start_for_all("cluster", "slurmdbd", options=[*common, *with_password, *settings, *named("slurmdbd")])
    slurmctld = start_for_all("cluster", "slurmctld", options=[*common, *settings, *named("slurmctld")])
    shared_memory = ["--tmpfs", "/tmp:mode=1777", "--volume", "/run/cfiddle-grants", "--env", "SLURMD_CPUS=4"]
    authority = secret_file("ssh-authority", new_secret("ssh-authority"))
    authority.chmod(0o400)
    with_authority = f"--volume={authority}:/run/secrets/ssh-authority:ro"
    slurmd = start_for_all("cluster", "slurmd", options=[*common, *shared_memory, with_authority, *named("c1")])
    for container in (slurmctld, slurmdbd):
        container.run("tee", "/var/lib/extrausers/passwd", input=ACCOUNTS)
        container.wait_until_healthy()
    wait_until(
        lambda: "cfiddle" in slurmctld.run("sacctmgr", "-n", "show", "cluster", user="slurm"),
        timeout_s=30,
        what="cluster",
    )
    slurmctld.run("sacctmgr", "-i", "add", "account", "cfiddle", user="slurm")
    slurmctld.run("sacctmgr", "-i", "add", "user", "ada,ben", "account=cfiddle", user="slurm")
    found = Slurm(slurmctld, slurmdbd, slurmd)
    found.wait_until_answering()
    # Ready, as `up` means it: a job is on record.
    assert found.ending(found.script("echo $SLURM_JOB_ID").strip()) == "COMPLETED"
    return found


def test_job_runs_as_a_user_whom_the_worker_does_not_know(slurm: Slurm) -> None:
    assert slurm.script("id -u; id -g; hostname").split() == ["2001", "2001", "c1"]


def test_root_and_strangers_submit_nothing(slurm: Slurm) -> None:
    for user in ("root", "2999:2999"):
        with pytest.raises(CommandError):
            slurm.script("true", user)


def test_of_equal_users_who_submits_many_jobs_stands_behind_who_submits_one(slurm: Slurm) -> None:
    def nice(user: str, *options: str) -> int:
        argv = ["sbatch", "--parsable", "--begin=now+1hour", "--output=/dev/null", "--wrap=true", *options]
        job = slurm.run(*argv, user=user).strip()
        shown = slurm.run("scontrol", "show", "job", job, user=user)
        slurm.run("scancel", job, user=user)
        return int(re.findall(r"Nice=(-?\d+)", shown)[0])

    ada, ben = "2001:2001", "2002:2002"
    first = nice(ada)
    assert first + 2 <= nice(ada, "--array=1-9:4,20%2") <= first + 4
    assert first + 4 <= nice(ada) <= first + 5
    assert nice(ben) == 0
    assert nice(ben, "--nice=300") == 301, "what a user wants is added to"
    with contextlib.suppress(CommandError):
        nice(ben, "--array=999-0")
    assert nice(ben) > 0, "what is no array makes nobody's jobs fewer"


def test_job_can_gain_no_rights_and_write_nowhere_but_where_the_epilog_cleans(slurm: Slurm) -> None:
    assert slurm.script("grep NoNewPrivs /proc/self/status").split()[1] == "1"
    script = r"find / -path /proc -prune -o \( -type d -o -type f \) -writable -print 2>/dev/null || true"
    assert set(slurm.script(script).split()) == {"/tmp", "/dev/shm", "/dev/mqueue"}


def test_grant_is_there_while_the_job_is(slurm: Slurm) -> None:
    job = slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 3").strip()
    grant = f"/run/cfiddle-grants/{job}"
    wait_until(lambda: slurm.slurmd.run("ls", "-A", "/run/cfiddle-grants").split() == [job], timeout_s=20, what=grant)
    assert slurm.slurmd.run("cat", grant).split()[:3] == ["2001", "*", "4"]
    assert slurm.slurmd.run("stat", "--format=%a %u", grant, "/run/cfiddle-grants").split("\n")[:2] == [
        "600 0",
        "700 0",
    ]
    slurm.ending(job)
    wait_until(lambda: not slurm.slurmd.run("ls", "-A", "/run/cfiddle-grants"), timeout_s=20, what="no grant")


LEFTOVERS = r"""
mkdir -p /tmp/mine/deep; echo x >/tmp/mine/deep/file; chmod 000 /tmp/mine/deep; ln -s /dev/shm/other /tmp/mine/link
echo y >/dev/shm/mine; ipcmk -M 1024 -p 0; ipcmk -S 2 -p 0; ipcmk -Q -p 0
python3 - <<'PROGRAM'
import os, signal, time
for _ in range(2):
    if os.fork():
        os._exit(0)
    os.setsid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.closerange(0, 64)
os.execve("/usr/bin/sleep", ["left-behind", "600"], {})
PROGRAM
"""


def everything_left(slurm: Slurm) -> str:
    script = "ls -A /tmp /dev/shm /dev/mqueue; tail -qn +2 /proc/sysvipc/*; pgrep -fa [l]eft-behind || true"
    return slurm.slurmd.run("sh", "-c", script)


def test_nothing_of_a_job_is_left_after_it(slurm: Slurm) -> None:
    slurm.slurmd.run("sh", "-c", "echo z >/dev/shm/other", user=OTHER)
    before = everything_left(slurm)
    slurm.script(LEFTOVERS)
    wait_until(lambda: everything_left(slurm) == before, timeout_s=20, what="everything gone, and nothing of others")
    slurm.wait_until_answering()
    slurm.slurmd.run("rm", "/dev/shm/other")


def test_of_two_jobs_the_one_that_ends_takes_its_own_processes_along(slurm: Slurm) -> None:
    script = "setsid -f sleep 601; touch /tmp/of-both"
    other = slurm.run(
        "sbatch", "--parsable", "--partition=shared", "--output=/dev/null", "--wrap=setsid -f sleep 602; sleep 600"
    )
    wait_until(lambda: "sleep 602" in slurm.slurmd.run("pgrep", "-fa", "sleep"), timeout_s=20, what="the other job")
    slurm.run("srun", "--partition=shared", "--chdir=/", "--ntasks=1", "sh", "-c", script)
    wait_until(lambda: "601" not in slurm.slurmd.run("pgrep", "-fa", "sleep"), timeout_s=20, what="the process gone")
    assert "sleep 602" in slurm.slurmd.run("pgrep", "-fa", "sleep"), "the other job goes on"
    assert "of-both" in slurm.slurmd.run("ls", "/tmp")
    slurm.run("scancel", other.strip())
    wait_until(lambda: "60" not in slurm.slurmd.run("pgrep", "-fa", "sleep"), timeout_s=20, what="its processes gone")
    wait_until(lambda: everything_left(slurm).count("of-both") == 0, timeout_s=20, what="files gone")
    slurm.wait_until_answering()


def test_controller_killed_right_after_it_accepted_a_job_forgets_nothing(slurm: Slurm) -> None:
    script = "sbatch --parsable --output=/dev/null --wrap='sleep 3'; sbatch --parsable --output=/dev/null --wrap=true"
    running, waiting = slurm.run("sh", "-c", script).split()
    run([docker_cli(), "kill", slurm.slurmctld.name], timeout_s=30)
    run([docker_cli(), "start", slurm.slurmctld.name], timeout_s=30)
    slurm.slurmctld.wait_until_healthy()
    assert slurm.ending(running) == "COMPLETED"
    assert slurm.ending(waiting) == "COMPLETED"
    following = slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=true").strip()
    assert int(following) == int(waiting) + 1
    assert slurm.ending(following) == "COMPLETED"


def test_script_of_an_accepted_job_outlives_a_power_cut(slurm: Slurm) -> None:
    job = slurm.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true").strip()
    kept = slurm.slurmctld.run("lsattr", f"/var/lib/slurm/hash.{job[-1]}/job.{job}").splitlines()
    slurm.run("scancel", job)
    assert sorted(line.rpartition("/")[2] for line in kept) == ["environment", "script"]
    assert all("S" in line.split()[0] for line in kept), "written to the disk before slurmctld knows of it"


@pytest.mark.parametrize("daemon", ["slurmdbd", "slurmctld", "slurmd"])
def test_daemon_ends_when_asked_and_comes_back(slurm: Slurm, daemon: str) -> None:
    container: Container = getattr(slurm, daemon)
    container.stop()
    assert container.wait_until_ended() == 0
    run([docker_cli(), "start", container.name], timeout_s=30)
    container.wait_until_healthy()
    slurm.wait_until_answering()
    assert slurm.script("echo hello").strip() == "hello"


def test_end_of_munged_ends_the_container(slurm: Slurm) -> None:
    slurm.slurmd.run("pkill", "-KILL", "munged")
    assert slurm.slurmd.wait_until_ended() != 0
    run([docker_cli(), "start", slurm.slurmd.name], timeout_s=30)
    slurm.wait_until_answering()


def test_slurmd_waits_for_a_slurmctld_that_does_not_answer(slurm: Slurm) -> None:
    slurm.slurmd.stop()
    run([docker_cli(), "pause", slurm.slurmctld.name], timeout_s=30)
    try:
        run([docker_cli(), "start", slurm.slurmd.name], timeout_s=30)
        timed_out = "slurm_load_partitions: Socket timed out"
        wait_until(lambda: timed_out in slurm.slurmd.log(), timeout_s=60, what="it was not answered once")
    finally:
        run([docker_cli(), "unpause", slurm.slurmctld.name], timeout_s=30)
    slurm.slurmd.wait_until_healthy()
    assert slurm.script("echo hello").strip() == "hello"


@pytest.mark.slow
def test_node_whose_clock_is_off_takes_no_jobs_and_comes_back_by_itself(
    slurm: Slurm, network: str, start: Start
) -> None:
    def state() -> str:
        return slurm.run("sinfo", "--noheader", "--format=%T %E", "--partition=normal").strip()

    def look(ahead_s: str) -> str:
        script = f"python3 -I -c '{LOOK_AT_CLOCKS}' {ahead_s} && sinfo --noheader --format='%T %E' --partition=normal"
        return slurm.run("sh", "-c", script, user="slurm").strip()

    where = ["--network", network, "--network-alias", "agent", "--hostname", "c1"]
    start("agent", "python3", "-c", DOOR, options=[*where, "--no-healthcheck"])
    off = "drained its clock is 600 s ahead of the head's"
    wait_until(lambda: look("-600") == off, timeout_s=30, what="the node is drained")
    wait_until(lambda: state() == "idle none", timeout_s=90, what="slurmctld's container sees that it is right")
    assert slurm.script("hostname").strip() == "c1"


def test_logs_hold_no_secret(slurm: Slurm, munge_key: Path) -> None:
    for container in (slurm.slurmctld, slurm.slurmdbd, slurm.slurmd):
        assert munge_key.read_text() not in container.log()
    password = slurm.slurmdbd.run("cat", "/run/secrets/database-password")
    assert password not in slurm.slurmdbd.log()
    with pytest.raises(CommandError, match="Permission denied"):
        slurm.slurmdbd.run("cat", "/etc/slurm/slurmdbd.conf", user=USER)


def test_container_without_its_key_or_role_does_not_start(start: Start, munge_key: Path) -> None:
    assert start("cluster", "slurmctld").wait_until_ended() != 0
    without_role = start("cluster", "nothing", options=["--volume", f"{munge_key}:/run/secrets/munge-key:ro"])
    assert without_role.wait_until_ended() != 0
    assert "no such role: nothing" in without_role.log()


def test_image_has_fixed_ids_no_key_and_a_worker_s_python(image: Callable[[str], str]) -> None:
    imports = "import agent.call, cfiddle, cloudpickle, delegate_function.hop"
    script = f"id -u munge; id -u slurm; ls /etc/munge; python3 -I -c '{imports}'"
    argv = [docker_cli(), "run", "--rm", "--network=none", "--entrypoint=sh", image("cluster"), "-c", script]
    assert run(argv, timeout_s=60).split() == ["801", "802"]
