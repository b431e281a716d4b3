"""`cm` on the cluster, as its user sees it, with the states that engines and Slurm have: what runs is in its job."""

import ast
import json
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from live import LiveCluster, Result, wait_until

USER = "test_user1"
NAME = "my_task_container_{}".format

Cm = Callable[..., Result]


@pytest.fixture(autouse=True)
def _nobody_has_containers(cluster: LiveCluster) -> Iterator[None]:
    cluster.remove_containers(USER)
    yield
    cluster.remove_containers(USER)


@pytest.fixture
def cm(cluster: LiveCluster) -> Cm:
    """Return what runs `cm WORDS…` as the user."""
    return lambda *words: cluster.user(["cm", *words], USER)


def _states(cluster: LiveCluster) -> dict[str, str]:
    """Return the states of the user's containers, as the engines say."""
    found = cluster.containers(USER)
    states = {container.name: container.state for container in found}
    assert len(states) == len(found), found
    return states


def _places(cluster: LiveCluster) -> set[tuple[str, str]]:
    """Return which of the user's containers run, and on which worker."""
    return {(found.name, found.worker) for found in cluster.containers(USER) if found.state == "running"}


def _jobs(cluster: LiveCluster) -> dict[str, tuple[int, str]]:
    """Return number and worker of the user's running jobs, by name."""
    lines = cluster.slurm(f"squeue -h -u {USER} -t RUNNING -o '%j %A %N'").splitlines()
    return {name: (int(number), worker) for name, number, worker in map(str.split, lines)}


def _wait_until_each_is_in_a_job(cluster: LiveCluster, *, timeout_s: float = 5) -> None:
    def look() -> bool:
        queue = cluster.slurm(f"squeue -h -u {USER} -o '%j %N'").splitlines()
        return sorted(f"{name} {worker}" for name, worker in _places(cluster)) == sorted(queue)

    wait_until(look, timeout_s=timeout_s, what="each container that runs is in a job, and each job has its container")


def _created(numbers: Sequence[int]) -> str:
    lines = [f"container {position} : {NAME(number)}\n" for position, number in enumerate(numbers, 1)]
    return f"created {len(numbers)} containers\n" + "".join(lines)


def _refusal(result: Result) -> str:
    assert (result.exit_status, result.stdout) == (1, ""), result
    return result.stderr.rstrip("\n")


# --- the sessions ----------------------------------------------------------------------------------------------------


def test_containers_are_created_counted_on_and_listed(cluster: LiveCluster, cm: Cm) -> None:
    assert cm("create", "4").ok() == _created(range(4))
    assert cm("create", "4").ok() == _created(range(4, 8))
    assert _states(cluster) == {NAME(number): "created" for number in range(8)}
    assert len({found.worker for found in cluster.containers(USER)}) == len(cluster.workers), "they are spread"
    assert _jobs(cluster) == {}
    first, *lines = cm("list").ok().splitlines()
    assert first == "There are 8 containers:"
    listed = []
    for position, line in enumerate(lines, 1):
        begin, _, entry = line.partition(" : ")
        assert begin == f"container {position}"
        listed.append(ast.literal_eval(entry))
    assert [list(entry) for entry in listed] == [["NAME", "IMAGE", "STATUS", "CREATED", "CONTAINER ID"]] * 8
    assert {entry["NAME"]: entry["CONTAINER ID"] for entry in listed} == {
        found.name: found.id for found in cluster.containers(USER)
    }
    assert [entry["NAME"] for entry in listed] == [NAME(number) for number in reversed(range(8))]
    created = [entry["CREATED"][:19] for entry in listed]
    assert created == sorted(created, reverse=True)
    one = cluster.containers(USER)[0]
    inspected = json.loads(cluster.on_worker(one.worker, ["docker", "inspect", one.id]).ok())[0]
    [entry] = [entry for entry in listed if entry["NAME"] == one.name]
    assert (entry["IMAGE"], entry["CREATED"]) == (inspected["Image"], inspected["Created"])
    assert [entry["name"] for entry in json.loads(cm("list", "--json").ok())] == [entry["NAME"] for entry in listed]
    assert len(cm("list", "--table").ok().splitlines()) == 9


def test_lowest_names_that_are_free_are_given(cm: Cm) -> None:
    cm("create", "3").ok()
    cm("delete", "--name", NAME(1)).ok()
    assert cm("create", "2").ok() == _created([1, 3])


def test_containers_are_deleted(cluster: LiveCluster, cm: Cm) -> None:
    cm("create", "4").ok()
    cm("run", "--name", NAME(0), "--cmd", "true").ok()
    assert _refusal(cm("delete", "--name", "no_exist_container")) == "no container names no_exist_container"
    running = f"container {NAME(0)} is running, please stop it before delete it!"
    assert _refusal(cm("delete", "--name", NAME(0))) == running
    assert cm("delete", "--name", NAME(3)).ok() == f"deleted container {NAME(3)}\n"
    assert set(_states(cluster)) == {NAME(0), NAME(1), NAME(2)}
    said = cm("delete").ok()
    assert said.startswith("deleted all not running containers: ")
    assert set(ast.literal_eval(said.partition(": ")[2])) == {NAME(1), NAME(2)}
    assert _states(cluster) == {NAME(0): "running"}


def test_containers_are_stopped_and_their_jobs_complete(cluster: LiveCluster, cm: Cm) -> None:
    cm("create", "4").ok()
    for number in range(3):
        cm("run", "--name", NAME(number), "--cmd", "true").ok()
    jobs = _jobs(cluster)
    assert set(jobs) == {NAME(0), NAME(1), NAME(2)}
    assert _refusal(cm("stop", "--name", NAME(3))) == f"container {NAME(3)} is not running"
    assert _refusal(cm("stop", "--name", "my_task_container_100")) == "no container names my_task_container_100"
    assert cm("stop", "--name", NAME(0)).ok() == f"stopped container {NAME(0)}\n"
    assert _states(cluster)[NAME(0)] == "exited"
    said = cm("stop").ok()
    assert said.startswith("stopped all running containers: ")
    assert set(ast.literal_eval(said.partition(": ")[2])) == {NAME(1), NAME(2)}
    assert _states(cluster) == {NAME(0): "exited", NAME(1): "exited", NAME(2): "exited", NAME(3): "created"}
    for number, _ in jobs.values():
        record = cluster.wait_for_state(number, "COMPLETED")
        assert (record["user"], record["exit_code"]) == (USER, "0:0")


def test_commands_run_in_a_container_that_goes_on(cluster: LiveCluster, cm: Cm) -> None:
    missing = cm("run", "--name", "no_exist_container", "--cmd", "echo Hello!")
    assert _refusal(missing) == "no container name no_exist_container"
    new = cm("run", "--cmd", "ls -l").ok().splitlines()
    assert (new[0], new[1].split()[0]) == ("command output:", "total")
    assert [line.split()[8] for line in new[2:]] == ["data", "requirements.txt", "task2.py", "task3.py"]
    again = cm("run", "--name", NAME(0), "--cmd", "ls").ok()
    assert again == "command output:\ndata\nrequirements.txt\ntask2.py\ntask3.py\n"
    assert _states(cluster) == {NAME(0): "running"}
    _wait_until_each_is_in_a_job(cluster)
    assert cm("run", "--cmd", "hostname").ok() == f"command output:\n{NAME(1)}\n"
    assert _places(cluster) == {(name, worker) for name, (_, worker) in _jobs(cluster).items()}


def test_stopped_container_starts_on_its_machine_with_what_it_had(cluster: LiveCluster, cm: Cm) -> None:
    cm("run", "--cmd", "touch /tmp/kept").ok()
    [before] = cluster.containers(USER)
    cm("stop").ok()
    assert cm("run", "--name", NAME(0), "--cmd", "ls /tmp").ok() == "command output:\nkept\n"
    [after] = cluster.containers(USER)
    assert (after.worker, after.id, after.state) == (before.worker, before.id, "running")


# --- what a command is -----------------------------------------------------------------------------------------------


def test_command_is_its_owner_s_in_their_home(cluster: LiveCluster, cm: Cm) -> None:
    uid, gid = cluster.ids(USER)
    said = cm("run", "--cmd", "id -u; id -g; echo from inside >data/.t; cd; pwd; cat data/.t").ok()
    assert said.splitlines()[1:] == [str(uid), str(gid), f"/home/{USER}", "from inside"]
    assert cluster.user("stat -c %u data/.t; cat data/.t; rm data/.t", USER).ok() == f"{uid}\nfrom inside\n"


@pytest.mark.parametrize("status", [0, 1, 42, 137])
def test_exit_status_is_the_command_s(cm: Cm, status: int) -> None:
    assert cm("run", "--cmd", f"echo said; echo more >&2; exit {status}").exit_status == status


def test_output_comes_as_it_is_while_it_comes(cluster: LiveCluster) -> None:
    running = cluster.background(["cm", "run", "--cmd", "echo first; read -t 3 </dev/zero; sleep 3; echo last"], USER)
    running.wait_for_line("first", timeout_s=20)
    came = time.monotonic()
    assert running.process.poll() is None
    running.wait_for_line("last", timeout_s=20)
    assert time.monotonic() - came > 2
    assert running.wait().exit_status == 0


def test_megabytes_of_any_bytes_come_through(cluster: LiveCluster) -> None:
    program = "head -c 5000000 /dev/urandom | tee data/.t"
    command = f"cm run --cmd '{program}' >.out; tail -c +17 .out | cmp - data/.t && echo same; rm .out data/.t"
    assert cluster.user(command, USER).ok() == "same\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_command_ends_with_its_caller_and_the_container_goes_on(cluster: LiveCluster, number: signal.Signals) -> None:
    caller = cluster.background(["cm", "run", "--cmd", "echo begun; setsid sleep 987654 & wait"], USER)
    caller.wait_for_line("begun", timeout_s=20)
    [container] = cluster.containers(USER)

    def runs() -> bool:
        processes = cluster.on_worker(container.worker, ["docker", "top", container.id, "-o", "pid,args"]).ok()
        return "987654" in processes

    wait_until(runs, timeout_s=5, what="the command runs")
    caller.kill(number)
    wait_until(lambda: not runs(), timeout_s=5, what="the command has ended")
    caller.wait(timeout_s=10)
    assert _states(cluster) == {NAME(0): "running"}
    _wait_until_each_is_in_a_job(cluster)


# --- what is in force ------------------------------------------------------------------------------------------------


def test_memory_of_the_job_is_all_there_is(cluster: LiveCluster, cm: Cm) -> None:
    hog = cm("run", "--cmd", "python3 -c 'bytearray(700 * 2**20)'; echo status $?")
    assert hog.stdout.splitlines()[-1] == "status 137"
    [container] = cluster.containers(USER)
    form = "{{.HostConfig.Memory}} {{.HostConfig.MemorySwap}} {{.HostConfig.NanoCpus}}"
    limits = cluster.on_worker(container.worker, ["docker", "inspect", "-f", form, container.id]).ok()
    assert limits.split() == [str(512 * 2**20), str(512 * 2**20), str(10**9)]
    [(number, _)] = _jobs(cluster).values()
    assert "mem=512M" in cluster.slurm(f"scontrol show job {number}")


def test_container_of_a_cancelled_job_is_stopped_within_two_seconds(cluster: LiveCluster, cm: Cm) -> None:
    cm("run", "--cmd", "true").ok()
    [(number, _)] = _jobs(cluster).values()
    cluster.user(["scancel", str(number)], USER).ok()
    wait_until(lambda: _states(cluster) == {NAME(0): "exited"}, timeout_s=2, interval_s=0.1, what="it is stopped")
    cluster.wait_for_state(number, "CANCELLED")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_container_ends_with_the_time_of_its_job(cluster: LiveCluster, cm: Cm) -> None:
    cm("run", "--cmd", "true").ok()
    [(number, _)] = _jobs(cluster).values()
    cluster.slurm(f"scontrol update jobid={number} timelimit=1")
    wait_until(lambda: _states(cluster) == {NAME(0): "exited"}, timeout_s=200, interval_s=2, what="it is stopped")
    cluster.wait_for_state(number, "TIMEOUT")


def test_container_that_ends_by_itself_ends_its_job(cluster: LiveCluster, cm: Cm) -> None:
    cm("run", "--cmd", "true").ok()
    [(number, _)] = _jobs(cluster).values()
    [container] = cluster.containers(USER)
    cluster.on_worker(container.worker, ["docker", "kill", container.id]).ok()
    record = cluster.wait_for_state(number, "FAILED", timeout_s=15)
    assert record["exit_code"] == "9:0", "as Slurm tells of 137, what a shell says where signal 9 ended a process"


# --- at once, and interrupted ----------------------------------------------------------------------------------------


def test_no_name_is_given_twice(cluster: LiveCluster) -> None:
    said = cluster.user("cm create 5 & cm create 5 & wait", USER).output
    names = re.findall(r"my_task_container_\d+", said)
    assert sorted(names) == sorted(NAME(number) for number in range(10)), said
    assert set(_states(cluster)) == set(names)


def _interrupted(cluster: LiveCluster, after_s: float, *words: str) -> Result:
    argv = ["timeout", "--foreground", "--preserve-status", "--signal", "INT", f"{after_s:.3f}", "cm", *words]
    return cluster.user(argv, USER, timeout_s=60)


def _moments(whole: Result) -> list[float]:
    """Return nine moments of what takes so long undisturbed, in seconds, from before its begin to well after it."""
    return [*(0.1 + whole.seconds * part / 7 for part in range(8)), 3 * whole.seconds]


@pytest.mark.timeout(200)
def test_create_that_is_interrupted_leaves_nothing(cluster: LiveCluster, cm: Cm) -> None:
    said = []
    for after_s in _moments(cm("create", "6")):
        cm("delete").ok()
        result = _interrupted(cluster, after_s, "create", "6")
        assert (result.exit_status, result.stderr) in ((0, ""), (130, ""), (130, "interrupted\n")), result
        assert len(_states(cluster)) == (6 if result.stdout else 0), result
        said.append(result.output)
    assert "interrupted\n" in said
    assert _created(range(6)) in said


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_run_that_is_interrupted_leaves_a_container_in_a_job_or_none(cluster: LiveCluster, cm: Cm) -> None:
    said = set()
    for after_s in _moments(cm("run", "--cmd", "true")):
        cluster.remove_containers(USER)
        result = _interrupted(cluster, after_s, "run", "--cmd", "sleep 100")
        assert (result.exit_status, result.stderr) in ((130, ""), (130, "interrupted\n")), result
        assert _states(cluster) == ({NAME(0): "running"} if result.stdout else {}), result
        _wait_until_each_is_in_a_job(cluster, timeout_s=3)
        said.add(result.stdout)
    assert said == {"", "command output:\n"}, "it was interrupted before and after its start"


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_start_that_is_interrupted_leaves_the_container_stopped(cluster: LiveCluster, cm: Cm) -> None:
    said = set()
    for after_s in _moments(cm("run", "--cmd", "true")):
        cm("stop").ok()
        result = _interrupted(cluster, after_s, "run", "--name", NAME(0), "--cmd", "sleep 100")
        assert result.exit_status == 130, result
        wanted = {NAME(0): "running" if result.stdout else "exited"}
        wait_until(lambda: _states(cluster) == wanted, timeout_s=3, what=f"its state is {wanted}")  # noqa: B023
        _wait_until_each_is_in_a_job(cluster, timeout_s=3)
        said.add(result.stdout)
    assert said == {"", "command output:\n"}, "it was interrupted before and after its start"


def test_container_waits_for_room_says_so_and_can_be_given_up(cluster: LiveCluster) -> None:
    holders = [
        cluster.sbatch("sleep 300", user, "-p", "shared", "-n1", "--mem=0", "-w", worker)
        for worker, user in zip(cluster.workers, ("test_user2", "jovyan"), strict=True)  # neither may have them all
    ]
    for holder in holders:
        cluster.wait_until_runs(holder)
    waiting = cluster.background(["cm", "run", "--cmd", "hostname"], USER)
    line = waiting.wait_for_line("waits for room", timeout_s=20)
    assert re.fullmatch(rf"{NAME(0)} waits for room, in job \d+: \w+", line), line
    waiting.kill(signal.SIGINT)
    assert waiting.wait(timeout_s=5).exit_status == 130
    assert _states(cluster) == {}
    assert cluster.slurm(f"squeue -h -u {USER}") == ""
    patient = cluster.background(["cm", "run", "--cmd", "hostname"], USER)
    patient.wait_for_line("waits for room", timeout_s=20)
    cluster.slurm(f"scancel {holders[0]}")
    assert patient.wait(timeout_s=40).ok().splitlines()[-1] == NAME(0)
    assert _places(cluster) == {(NAME(0), cluster.workers[0])}, "where the room is"
    _wait_until_each_is_in_a_job(cluster)
    cluster.slurm(f"scancel {holders[1]}")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["0", "-1", "101", "1" * 30, "x", "", "1.5", "٣٣٣", "--name"])
def test_number_that_is_none_creates_nothing(cluster: LiveCluster, cm: Cm, number: str) -> None:
    result = cm("create", number)
    assert (result.exit_status, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: cm create")
    assert _states(cluster) == {}


@pytest.mark.parametrize("name", ["../x", "-rf", "a b", "a" * 300, "größe", "a\nb", ".", "x;id"])
def test_name_that_is_none_is_refused(cm: Cm, name: str) -> None:
    for words in (("stop",), ("delete",), ("run", "--cmd", "id")):
        result = cm(*words, f"--name={name}")
        assert (result.exit_status, result.stdout) == (1, ""), words
        assert result.stderr.startswith("error: "), result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_data_that_cannot_be_made_is_said_and_nothing_is_left(cluster: LiveCluster, cm: Cm) -> None:
    cluster.user("mv data .kept; ln -s /nowhere data", USER)
    try:
        result = cm("run", "--cmd", "true")
        assert (result.exit_status, result.stdout) == (1, "")
        assert result.stderr.startswith(f"error: /home/{USER}/data cannot be made: File exists\n")
        assert _states(cluster) == {}
    finally:
        cluster.user("rm data; mv .kept data; true", USER).ok()


def test_more_containers_than_a_user_may_have_are_refused_and_none_is_left(cluster: LiveCluster, cm: Cm) -> None:
    result = cm("create", "100")
    assert (result.exit_status, result.stdout) == (1, "")
    assert "32 containers of yours are here, the most there may be" in result.stderr
    assert _states(cluster) == {}
