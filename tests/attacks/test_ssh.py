"""Attack 11, by SSH: a worker lets in who has a job there, by a key of theirs, and nobody when it has ended."""

from collections.abc import Iterator

import pytest

from live import LiveCluster, wait_until

OWNER, THIEF = "test_user1", "test_user2"
REFUSED = "Permission denied (publickey)"


@pytest.fixture
def job(cluster: LiveCluster) -> Iterator[int]:
    """Have a job of the owner's on the first worker, of which a step has begun."""
    worker = cluster.workers[0]
    number = cluster.sbatch("sleep 300", OWNER, "-p", "shared", "-c1", "--mem=16", "-w", worker)
    cluster.wait_until_runs(number)
    wait_until(
        lambda: cluster.in_service("slurmd", f"test -e /run/cfiddle-grants/{number}", worker).exit_status == 0,
        timeout_s=20,
        what="the job's grant",
    )
    yield number
    cluster.slurm(f"scancel {number}")
    cluster.wait_until_idle()


def _ssh(cluster: LiveCluster, user: str, *words: str) -> str:
    """Return what becomes of a login: its output."""
    return cluster.user(["timeout", "30", "ssh", "-o", "BatchMode=yes", *words], user).output


def test_node_without_a_job_there_is_closed(cluster: LiveCluster) -> None:
    for worker in cluster.workers:
        said = _ssh(cluster, THIEF, worker, "echo in")
        assert REFUSED in said, said


def test_another_s_job_lets_nobody_in(cluster: LiveCluster, job: int) -> None:
    worker = cluster.workers[0]
    for login in (worker, f"{OWNER}@{worker}", f"root@{worker}", f"slurm@{worker}"):
        said = _ssh(cluster, THIEF, login, "echo in")
        assert REFUSED in said, (login, job, said)


def test_owner_gets_in_by_their_own_key_and_as_nobody_else(cluster: LiveCluster, job: int) -> None:
    worker = cluster.workers[0]
    assert _ssh(cluster, OWNER, worker, "id -un; hostname").split() == [OWNER, worker], job
    foreign = "rm -f ~/.foreign*; ssh-keygen -q -t ed25519 -N '' -f ~/.foreign"
    cluster.user(foreign, OWNER).ok()
    only = ("-o", "IdentitiesOnly=yes")
    attempts = (
        (*only, "-i", f"/home/{OWNER}/.foreign", worker),
        ("-o", "PreferredAuthentications=password,keyboard-interactive,hostbased", worker),
        (f"root@{worker}",),
    )
    said = {attempt: _ssh(cluster, OWNER, *attempt, "echo in") for attempt in attempts}
    cluster.user("rm -f ~/.foreign*", OWNER).ok()
    assert all(REFUSED in answer for answer in said.values()), said


def test_session_is_gone_when_the_job_has_ended(cluster: LiveCluster, job: int) -> None:
    worker = cluster.workers[0]
    session = cluster.background(["ssh", worker, "setsid -f sleep 7301; echo begun; exec sleep 7302"], OWNER)
    session.wait_for_line("begun")
    cluster.slurm(f"scancel {job}")
    session.wait(timeout_s=30)
    cluster.wait_until_idle()
    left = cluster.in_service("slurmd", f"pgrep -fa '^(sleep 730|sshd-session: {OWNER})' || true", worker).ok()
    assert left == "", left
    said = _ssh(cluster, OWNER, worker, "echo in")
    assert REFUSED in said, said


def test_session_is_held_to_what_a_job_is_held_to(cluster: LiveCluster, job: int) -> None:
    worker = cluster.workers[0]
    look = "grep -E '^(NoNewPrivs|CapEff)' /proc/self/status; ulimit -u; ulimit -c"
    found = _ssh(cluster, OWNER, worker, look).split()
    assert found == ["CapEff:", "0000000000000000", "NoNewPrivs:", "1", "4096", "0"], (job, found)
