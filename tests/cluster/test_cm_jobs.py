"""cminfo, cmrun and cmkill as a user meets them."""

import json
import signal
import time
from collections.abc import Iterator

import pytest

from live import LiveCluster, job_name, wait_until

USER, OTHER = "test_user1", "test_user2"


@pytest.fixture
def directory(cluster: LiveCluster) -> Iterator[str]:
    """Return a directory of the user's on the nodes' file system, whose name is nothing to be proud of."""
    path = f"/home/{USER}/{job_name()} %j'ö"
    cluster.user(["mkdir", path], USER).ok()
    yield path
    cluster.user(["rm", "-rf", path], USER).ok()


def _in(directory: str, *command: str) -> list[str]:
    return ["env", "--chdir", directory, *command]


def _logs(cluster: LiveCluster, directory: str) -> dict[str, str]:
    program = (
        "import json, pathlib; "
        "print(json.dumps({file.name: file.read_bytes().decode() for file in pathlib.Path('cmlogs').iterdir()}))"
    )
    found: dict[str, str] = json.loads(cluster.user(_in(directory, "python3", "-c", program), USER).ok())
    return found


def test_clones_run_on_every_node_and_their_output_is_kept_apart(cluster: LiveCluster, directory: str) -> None:
    nodes = len(cluster.workers)
    odd = ["", "-x", "--wait", "a\nb\r", "'\"`id`$(id)\\ %j", "ö"]
    program = 'printf "%s\\0" "$@"; hostname; echo "$SLURM_PROCID" >&2; exit 3'
    done = cluster.user(
        _in(directory, "cmrun", "-n", str(nodes), "-p", "2", "--wait", "bash", "-c", program, *odd), USER
    )
    assert done.exit_status == 3, done.output
    job = int(done.stdout)
    logs = _logs(cluster, directory)
    clones = range(2 * nodes)
    assert sorted(logs) == sorted([f"{job}.log", *(f"{job}.{n}.{kind}" for n in clones for kind in ("out", "err"))])
    outputs = [logs[f"{job}.{n}.out"].split("\0") for n in clones]
    assert [output[:-1] for output in outputs] == [odd[1:]] * len(clones), "bash takes the first for its own name"
    assert sorted(output[-1].strip() for output in outputs) == sorted(cluster.workers * 2)
    assert [logs[f"{job}.{n}.err"] for n in clones] == [f"{n}\n" for n in clones]
    assert "try 1 of 1" in logs[f"{job}.log"] and "ended with exit status 3" in logs[f"{job}.log"]
    record = cluster.wait_for_state(job, "FAILED")
    assert (record["user"], record["exit_code"]) == (USER, "3:0")


def test_waiting_ends_soon_after_the_command(cluster: LiveCluster, directory: str) -> None:
    done = cluster.user(_in(directory, "cmrun", "--wait", "bash", "-c", "sleep 3; date +%s.%N"), USER)
    late = time.time() - float(_logs(cluster, directory)[f"{int(done.ok())}.0.out"])
    assert late < 1.5


def test_user_sees_own_jobs_and_what_all_use(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    job = cluster.sbatch("sleep 60", OTHER, "-p", "shared", "-n1", "--mem=700", "-w", worker)
    cluster.wait_until_runs(job)
    seen, own = (json.loads(cluster.user(["cminfo", "--json"], user).ok()) for user in (USER, OTHER))
    assert [entry["id"] for entry in own["jobs"]] == [str(job)]
    assert str(job) not in [entry["id"] for entry in seen["jobs"] + seen["ended"]]
    assert seen["nodes"] == own["nodes"]
    [node] = [entry for entry in seen["nodes"] if entry["name"] == worker]
    assert node["cpus_in_use"] >= 1
    assert node["memory_mb_in_use"] == 700
    table = cluster.user(["cminfo"], OTHER).ok()
    assert max(map(len, table.splitlines())) <= 80
    assert any(line.split()[:2] == [str(job), "running"] for line in table.splitlines())
    cluster.user(["cmkill", str(job)], OTHER).ok()
    cluster.wait_for_state(job, "CANCELLED")
    ended = json.loads(cluster.user(["cminfo", "--json"], OTHER).ok())["ended"]
    assert [entry["state"] for entry in ended if entry["id"] == str(job)] == ["cancelled"]


def test_a_thousand_queued_jobs_are_shown_quickly(cluster: LiveCluster) -> None:
    holder = cluster.sbatch("sleep 300", USER, f"-N{len(cluster.workers)}")
    cluster.wait_until_runs(holder)
    array = cluster.sbatch("true", USER, "-p", "shared", "--array=0-999")
    times = []
    for _ in range(3):
        start = time.monotonic()
        listed = json.loads(cluster.user(["cminfo", "--json"], USER).ok())["jobs"]
        times.append(time.monotonic() - start)
        assert f"{array}_[0-999]" in [entry["id"] for entry in listed]
    cluster.user(["cmkill", str(array), str(holder)], USER).ok()
    assert min(times) < 1.5, times


def test_what_cannot_be_ended_is_said(cluster: LiveCluster) -> None:
    other = cluster.sbatch("sleep 60", OTHER, "-p", "shared")
    cluster.wait_until_runs(other)
    own = cluster.sbatch("sleep 60", USER, "-p", "shared")
    over = cluster.sbatch("true", USER, "-p", "shared")
    cluster.wait_for_state(over, "COMPLETED")
    done = cluster.user(["cmkill", str(other), str(over), "word", "-1", "4000000000", str(own)], USER)
    assert (done.exit_status, done.stdout) == (1, "")
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        f"error: job {other} is not yours",
        f"error: job {over} has ended already: completed",
        "error: 'word' is no number of a job",
        "error: '-1' is no number of a job",
        "error: there is no job 4000000000 of yours",
    ]
    cluster.wait_for_state(own, "CANCELLED")
    assert f"{other} RUNNING" in cluster.queue()
    cluster.user(["cmkill", str(other)], OTHER).ok()


@pytest.mark.slow
def test_job_over_its_time_is_ended_and_said_so(cluster: LiveCluster, directory: str) -> None:
    done = cluster.user(_in(directory, "cmrun", "--time", "1", "--wait", "sleep", "1000"), USER, timeout_s=180)
    job = int(done.stdout)
    assert (done.exit_status, done.stderr) == (124, f"job {job}: over its time of 1:00\n")
    assert "DUE TO TIME LIMIT" in _logs(cluster, directory)[f"{job}.log"]
    cluster.wait_for_state(job, "TIMEOUT")
    assert "over its time of 1:00" in " ".join(cluster.user(["cminfo"], USER).ok().split())


def test_where_the_nodes_do_not_see_the_directory_the_output_goes_home(cluster: LiveCluster) -> None:
    done = cluster.user(_in("/tmp", "cmrun", "--wait", "pwd"), USER)
    try:
        assert "warning: the nodes do not see /tmp" in done.stderr
        assert cluster.user(f"cat ~/cmlogs/{int(done.ok())}.0.out", USER).ok() == f"/home/{USER}\n"
    finally:
        cluster.user(f"rm -rf ~/cmlogs/{done.stdout.strip()}.*; rmdir --ignore-fail-on-non-empty ~/cmlogs", USER)


def test_ctrl_c_ends_the_job_that_is_waited_for(cluster: LiveCluster, directory: str) -> None:
    waiting = cluster.background(_in(directory, "cmrun", "--wait", "sleep", "1000"), USER)
    job = int(waiting.wait_for_line(r"^\d+$"))
    cluster.wait_until_runs(job)
    waiting.kill(signal.SIGINT)
    done = waiting.wait(timeout_s=20)
    assert (done.exit_status, done.stdout.splitlines()[-1]) == (130, f"interrupted: job {job} was ended")
    cluster.wait_for_state(job, "CANCELLED")


def test_what_no_node_has_is_refused_at_once(cluster: LiveCluster, directory: str) -> None:
    number = cluster.next_job()
    for option in ("-n", "-p"):
        done = cluster.user(_in(directory, "cmrun", option, "1000", "true"), USER)
        assert (done.exit_status, done.stdout) == (1, "")
        assert "cannot be had: the partition shared has" in done.stderr
    assert cluster.next_job() == number, "nothing was submitted"
    assert cluster.user(_in(directory, "ls"), USER).ok() == ""


def test_interruption_while_submitting_leaves_no_job_that_nobody_knows(cluster: LiveCluster, directory: str) -> None:
    begun = time.monotonic()
    job = cluster.user(_in(directory, "cmrun", "true"), USER).ok().strip()
    whole_s = time.monotonic() - begun
    cluster.wait_for_state(job, "COMPLETED")
    submitted = []
    for tenths in range(11):
        after = f"{max(whole_s * tenths / 10, 0.01):.3f}"  # counted there: what asks for it takes long by itself
        done = cluster.user(_in(directory, "timeout", "--signal=INT", after, "cmrun", "sleep", "1000"), USER)
        said = [line for line in done.stdout.splitlines() if line.isdigit()]
        queued = cluster.user(["squeue", "--me", "-h", "-o", "%i"], USER).ok().split()
        assert queued == said
        submitted.append(bool(said))
        if said:
            cluster.user(["cmkill", *said], USER).ok()
            wait_until(lambda: not cluster.user("squeue --me -h", USER).ok(), timeout_s=30, what="it is gone")
    assert set(submitted) == {True, False}, "it was interrupted before and after"
