"""The cluster as a place of containers: what Slurm says, where new ones go, starts that wait, fail or are given up."""

import contextlib
import functools
import itertools
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import letters
from agent.letters import LetterError
from container_manager import agents, cluster, launch, room
from container_manager.agents import AgentRefused, Agents, together
from container_manager.cluster import Cluster
from container_manager.errors import ContainerError
from container_manager.interrupts import Interrupted
from container_manager.launch import Launch
from container_manager.place import Container
from container_manager.room import Job, Machine
from container_manager.slurm import ask
from live import wait_until
from stand_ins import program


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Return what puts a shell script in a command's place; it finds its arguments in the file that is returned."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def says(name: str, text: str) -> Path:
        asked = tmp_path / f"{name}.asked"
        program(tmp_path, name, f'printf "%s\\n" "$@" >{asked}\n{text}')
        return asked

    return says


Says = Callable[[str, str], Path]

# --- what Slurm says -------------------------------------------------------------------------------------------------


def _launch(**wanted: Any) -> Launch:
    known: dict[str, Any] = {"user": "me", "name": "a", "image": "i", "machine": "", "cpus": 2, "memory_mb": 300}
    return Launch(**(known | wanted))


def _submitted(asked: Path) -> tuple[dict[str, str], list[str]]:
    """Return the options that sbatch was given with a value each, and its last words."""
    argv = asked.read_text().split("\n")[:-1]
    return dict(itertools.pairwise(argv)), argv[-5:]


def test_job_is_submitted_as_it_shall_be(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 2001)
    asked = says("sbatch", "echo '17;cluster'")
    assert room.submit(_launch(machine="c2", gpus=("titan_xp", "h200", "titan_xp"), ports=3)) == 17
    given, words = _submitted(asked)
    assert words == ["/usr/local/lib/cfiddle/container-job", "me", "a", "i", "3"]
    assert (given["--nodelist"], given["--gres"]) == ("c2", "container_cpus:2,gpu:titan_xp:2,gpu:h200:1")
    assert (given["--cpus-per-task"], given["--mem"], given["--export"]) == ("2", "300M", "NIL")
    assert "--uid" not in given
    room.submit(_launch(counts_cpus=False))
    given, words = _submitted(asked)
    assert words[-1] == "0"
    assert not {"--nodelist", "--gres"} & set(given)


def test_administrator_submits_for_the_container_s_owner(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    asked = says("sbatch", "echo 17")
    room.submit(_launch(user="ada"))
    assert _submitted(asked)[0]["--uid"] == "ada"


@pytest.mark.parametrize(
    ("line", "found", "waits"),
    [
        ("RUNNING|c1|None", Job("RUNNING", "c1", "None"), False),
        ("PENDING||Resources", Job("PENDING", "", "Resources"), True),
        *(
            (f"PENDING||{said}", Job("PENDING", "", f"you have as much as one user may ({said})"), True)
            for said in ("QOSMaxMemoryPerUser", "QOSMaxCpuPerUserLimit", "QOSMaxGRESPerUser")
        ),
        (
            "PENDING||ReqNodeNotAvail, UnavailableNodes:c1|c2",
            Job("PENDING", "", "ReqNodeNotAvail, UnavailableNodes:c1|c2"),
            True,
        ),
        ("", Job("COMPLETED", "", ""), False),
    ],
)
def test_job_is_as_squeue_says(says: Says, line: str, found: Job, waits: bool) -> None:
    says("squeue", f"echo '{line}'")
    assert room.job(7) == found
    assert found.waits is waits


def test_job_that_slurm_has_forgotten_is_over(says: Says) -> None:
    says("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert room.job(7).state == "COMPLETED"
    says("scancel", "echo 'scancel: error: Kill job error on job id 7: Job/step already completing' >&2; exit 1")
    room.cancel([7])


def test_cancelled_job_is_waited_for(says: Says, tmp_path: Path) -> None:
    says("scancel", "true")
    says("squeue", f"[ -e {tmp_path}/seen ] || echo 7; touch {tmp_path}/seen")
    room.cancel([7])
    assert (tmp_path / "scancel.asked").read_text().split() == ["--quiet", "7"]


@pytest.mark.parametrize("said", ["Invalid node name specified for job 7", "Invalid job id specified"])
def test_job_that_runs_or_is_over_by_now_is_left_where_it_is(says: Says, said: str) -> None:
    asked = says("scontrol", f"echo {said!r} >&2; exit 1")
    room.let_go_anywhere(7)
    assert asked.read_text().split() == ["update", "JobId=7", "ReqNodeList="]


def test_job_that_does_not_end_is_an_error(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_END_S", 0.2)
    says("scancel", "true")
    says("squeue", "echo 7")
    with pytest.raises(ContainerError, match="job 7 was cancelled"):
        room.cancel([7])


def test_nothing_is_cancelled_where_there_is_nothing(says: Says) -> None:
    asked = says("scancel", "true")
    room.cancel([])
    assert not asked.exists()


def _node(name: str, state: str, **more: str) -> str:
    """Return a machine's line as scontrol has it."""
    told = {"NodeName": name, "Gres": "container_cpus:7,gpu:titan_xp:2(S:0)", "RealMemory": "8000"}
    told |= {
        "GresUsed": "container_cpus:2,gpu:titan_xp:1(IDX:0)",
        "AllocMem": "2048",
        "MemSpecLimit": "1000",
        "State": state,
    }
    return " ".join(f"{key}={value}" for key, value in {**told, "Partitions": "normal,shared", **more}.items())


def test_machines_and_what_is_free_on_them(says: Says) -> None:
    lines = [
        _node("c2", "DOWN*+DYNAMIC_NORM", Gres="(null)", GresUsed="gpu:0"),
        _node("c1", "MIXED+DYNAMIC_NORM"),
        _node("other", "IDLE", Partitions="normal"),
    ]
    asked = says("scontrol", f"printf '%s\\n' {' '.join(map(repr, lines))}")
    assert room.machines() == [
        Machine("c1", "mixed+dynamic_norm", 5, 4952, {"titan_xp": 1}),
        Machine("c2", "down*+dynamic_norm", 0, 4952, {}),
    ]
    assert asked.read_text().split() == ["--details", "--oneliner", "show", "nodes"]


@pytest.mark.parametrize(
    ("state", "takes"),
    [
        *(
            (state, True)
            for state in (
                *("idle", "mixed", "allocated", "idle+dynamic_norm", "mixed+completing"),
                *("idle+cloud+powered_down", "mixed+cloud+powering_up"),
            )
        ),
        *(
            (state, False)
            for state in (
                *("down", "down*", "idle*", "mixed*+dynamic_norm", "idle+not_responding", "unknown"),
                *("idle+drain+dynamic_norm", "mixed+drain", "idle+reserved", "idle+maintenance+reserved"),
                *("idle+fail", "idle+invalid_reg", "idle+cloud+powering_down"),
            )
        ),
    ],
)
def test_machine_takes_jobs_in_some_states(state: str, takes: bool) -> None:
    assert Machine("c1", state, 1, 1, {}).takes_jobs is takes


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "echo 'sbatch: error: Batch job submission failed: no' >&2; exit 1",
            "sbatch: Batch job submission failed: no",
        ),
        (
            "echo 'sbatch: error: Requested node configuration is not available' >&2; exit 1",
            "no machine that is up has so many CPUs, so much memory or such GPUs",
        ),
        ("exit 3", "sbatch: it failed and did not say why"),
        ("exec sleep 60", "Slurm did not answer sbatch within 0.2 s"),
    ],
)
def test_what_slurm_refuses_is_said(says: Says, monkeypatch: pytest.MonkeyPatch, said: str, message: str) -> None:
    monkeypatch.setattr(room, "ask", functools.partial(ask, timeout_s=0.2))
    says("sbatch", said)
    with pytest.raises(ContainerError, match=message):
        room.submit(_launch())


def test_without_slurm_this_is_no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ContainerError, match="there is no scontrol here"):
        room.machines()


def test_ctrl_c_of_the_terminal_does_not_reach_slurm_s_commands(says: Says) -> None:
    says("scontrol", "ps -o sid= -p $$ >&2; ps -o sid= -p $$; exit 1")
    with pytest.raises(ContainerError) as caught:
        room.machines()
    session = str(caught.value).split()[-1]
    assert session.isdigit()
    assert int(session) != os.getsid(0)


# --- all at once -----------------------------------------------------------------------------------------------------


def test_results_come_in_order_from_calls_at_once() -> None:
    barrier = threading.Barrier(3, timeout=10)

    def double(number: int) -> int:
        barrier.wait()
        return 2 * number

    assert together(double, [3, 1, 2]) == [6, 2, 4]
    assert together(double, []) == []


def test_others_are_waited_for_when_one_fails() -> None:
    ended = []

    def work(number: int) -> None:
        if number == 0:
            raise ContainerError("no")
        time.sleep(0.2)
        ended.append(number)

    with pytest.raises(ContainerError, match="no"):
        together(work, range(4))
    assert sorted(ended) == [1, 2, 3]


def test_one_that_fails_gives_up_those_that_wait() -> None:
    given_up = threading.Event()

    def work(number: int) -> None:
        if number:
            raise ContainerError("no")
        assert given_up.wait(5)

    with pytest.raises(ContainerError, match="no"):
        together(work, range(2), giving_up=given_up.set)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [1, 4])
def test_no_call_is_cut_in_two_by_ctrl_c(number: int) -> None:
    ended, given_up = [], threading.Event()

    def work(item: int) -> None:
        if item == 0:
            os.kill(os.getpid(), signal.SIGINT)
        assert given_up.wait(10)
        ended.append(item)

    with pytest.raises(Interrupted):
        together(work, range(number), giving_up=given_up.set)
    assert len(ended) == number


# --- containers ------------------------------------------------------------------------------------------------------


class FakeSlurm:
    """Jobs as their states. `on_submit` says how a new one is; `submitting` is called before it is known."""

    def __init__(self) -> None:
        self.jobs: dict[int, Job] = {}
        self.submitted: list[Launch] = []
        self.cancelled: list[int] = []
        self.free: list[Machine] = [Machine("c1", "idle", 2, 4000, {}), Machine("c2", "idle", 2, 3000, {})]
        self.on_submit: Callable[[Launch], Job] = lambda wanted: Job("RUNNING", wanted.machine, "None")
        self.submitting: Callable[[], object] = lambda: None
        self._numbers = itertools.count(7)

    def submit(self, wanted: Launch) -> int:
        self.submitting()
        number = next(self._numbers)
        self.submitted.append(wanted)
        self.jobs[number] = self.on_submit(wanted)
        return number

    def job(self, number: int) -> Job:
        return self.jobs[number]

    def cancel(self, numbers: Any) -> None:
        for number in numbers:
            self.cancelled.append(number)
            self.jobs[number] = Job("CANCELLED", self.jobs[number].machine, "None")

    def let_go_anywhere(self, number: int) -> None:
        self.jobs[number] = Job("RUNNING", "c2", "None")

    def machines(self) -> list[Machine]:
        return self.free


class FakeAgents:
    """What is asked of the agents. `answers` are by kind, machine first; what is an exception is raised."""

    def __init__(self) -> None:
        self.machines = ["c1", "c2"]
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.refuses: dict[tuple[str, str], Exception] = {}
        self.containers: dict[str, list[dict[str, Any]]] = {"c1": [], "c2": []}
        self.slurm: FakeSlurm | None = None

    def ask(self, machine: str, kind: str, **fields: Any) -> dict[str, Any]:
        self.asked.append((machine, kind, fields))
        if error := self.refuses.get((machine, kind)):
            raise error
        if kind == "outcome":
            assert self.slurm
            runs = self.slurm.jobs[fields["job"]] == Job("RUNNING", machine, "None")
            return {"id": "1" * 64 if runs else None}
        return {"id": "1" * 64}

    def ask_all(self, kind: str) -> dict[str, dict[str, Any]]:
        assert kind == "list"
        return {machine: {"containers": self.containers[machine]} for machine in self.machines}


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    found = FakeSlurm()
    for name in ("submit", "job", "cancel", "let_go_anywhere", "machines"):
        monkeypatch.setattr(room, name, getattr(found, name))
    monkeypatch.setattr(launch, "_LOOK_S", 0.02)
    monkeypatch.setattr(launch, "_FIRST_LOOK_S", 0.02)
    monkeypatch.setattr(launch, "_PINNED_S", 0.05)
    monkeypatch.setattr(launch, "_SAY_S", 0.1)
    return found


@pytest.fixture
def asked(slurm: FakeSlurm) -> FakeAgents:
    found = FakeAgents()
    found.slurm = slurm
    return found


@pytest.fixture
def place(slurm: FakeSlurm, asked: FakeAgents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(cluster, "Agents", lambda: asked)
    return Cluster()


def _container(
    name: str = "my_task_container_0", machine: str = "c1", status: str = "created", id_: str = "a"
) -> Container:
    return Container(name, id_, "sha256:1", status, "2024-02-15T02:59:35Z", machine)


def _told(name: str, created: str, **fields: Any) -> dict[str, Any]:
    known = {"id": "a", "image_id": "sha256:1", "status": "created", "job": None}
    return known | {"name": name, "created": created} | fields


def test_containers_of_all_machines_are_listed_newest_first(place: Cluster, asked: FakeAgents) -> None:
    asked.containers["c1"] = [_told("my_task_container_0", "2024-02-15T02:59:35.1Z"), _told("other", "2025Z")]
    asked.containers["c2"] = [_told("my_task_container_1", "2024-02-15T02:59:35.12Z", status="running", job=7)]
    found = place.containers()
    assert [(one.name, one.machine, one.job) for one in found] == [
        ("my_task_container_1", "c2", 7),
        ("my_task_container_0", "c1", None),
    ]


def test_machine_that_slurm_knows_and_that_does_not_answer_is_silent(place: Cluster, slurm: FakeSlurm) -> None:
    assert place.silent() == []
    slurm.free.append(Machine("c3", "down*", 0, 4000, {}))
    assert place.silent() == ["c3"]


def test_new_containers_go_where_most_memory_is_free_by_turns(place: Cluster, asked: FakeAgents) -> None:
    place.create([f"n{number}" for number in range(5)])
    where = {fields["name"]: machine for machine, _, fields in asked.asked}
    assert [where[f"n{number}"] for number in range(5)] == ["c1", "c1", "c2", "c1", "c2"]


def test_new_containers_go_to_no_machine_that_is_down_or_silent(
    place: Cluster, slurm: FakeSlurm, asked: FakeAgents
) -> None:
    slurm.free = [
        Machine("c1", "down*", 0, 4000, {}),
        Machine("c2", "mixed", 1, 1000, {}),
        Machine("c3", "idle", 2, 9000, {}),
    ]
    place.create(["n0", "n1", "n2"])
    assert {machine for machine, _, _ in asked.asked} == {"c2"}
    slurm.free = slurm.free[:1]
    with pytest.raises(ContainerError, match="no machine takes containers now"):
        place.create(["n3"])


def test_container_runs_in_a_job_on_its_machine(place: Cluster, slurm: FakeSlurm, asked: FakeAgents) -> None:
    place.start(
        [_container(), _container("my_task_container_1", "c2", "exited", "b"), _container(status="running", id_="c")]
    )
    wanted = {one.name: (one.machine, one.image, one.cpus, one.memory_mb) for one in slurm.submitted}
    assert wanted == {
        "my_task_container_0": ("c1", "my_task_image", 1, 512),
        "my_task_container_1": ("c2", "", 1, 512),
    }
    assert not any(one.counts_cpus for one in slurm.submitted)
    assert all(not one.ports and one.patience_s is None for one in slurm.submitted)
    assert slurm.cancelled == []
    assert {kind for _, kind, _ in asked.asked} == {"outcome"}
    assert place.data.is_dir()


def test_container_that_never_ran_moves_to_where_room_is(place: Cluster, slurm: FakeSlurm, asked: FakeAgents) -> None:
    slurm.on_submit = lambda _: Job("PENDING", "", "Resources")
    place.start([_container()])
    assert ("c1", "delete", {"name": "my_task_container_0"}) in asked.asked


def test_container_that_has_run_waits_for_its_machine_and_says_so(
    place: Cluster, slurm: FakeSlurm, capfd: pytest.CaptureFixture[str]
) -> None:
    slurm.on_submit = lambda _: Job("PENDING", "", "Resources")
    start = threading.Thread(target=place.start, args=([_container(status="exited")],))
    start.start()
    wait_until(lambda: "waits" in (said := capfd.readouterr().err) and said, timeout_s=5, what="it says so")
    slurm.jobs[7] = Job("RUNNING", "c1", "None")
    start.join(5)
    assert not start.is_alive()


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "NODE_FAIL", "COMPLETED"])
def test_job_that_ends_without_its_container_is_an_error(place: Cluster, slurm: FakeSlurm, state: str) -> None:
    slurm.on_submit = lambda _: Job(state, "c1", "None")
    with pytest.raises(ContainerError, match=f"my_task_container_0 did not start: its job 7 is {state}"):
        place.start([_container()])
    assert slurm.cancelled == [7]


def test_refusal_of_the_agent_is_what_is_said(place: Cluster, slurm: FakeSlurm, asked: FakeAgents) -> None:
    asked.refuses["c1", "outcome"] = AgentRefused("disk", "you have written too much")
    with pytest.raises(ContainerError, match="you have written too much"):
        place.start([_container()])
    assert slurm.cancelled == [7]


def test_machine_that_goes_away_ends_the_start(place: Cluster, slurm: FakeSlurm, asked: FakeAgents) -> None:
    asked.refuses["c1", "outcome"] = ContainerError("c1 does not answer")
    with pytest.raises(ContainerError, match="c1 does not answer"):
        place.start([_container(), _container("my_task_container_1", "c2", id_="b")])
    assert sorted(slurm.cancelled) == sorted(slurm.jobs), "all run or none"


@pytest.mark.usefixtures("interruptible")
def test_start_that_waits_is_given_up_by_ctrl_c(place: Cluster, slurm: FakeSlurm) -> None:
    slurm.on_submit = lambda _: Job("PENDING", "", "Resources")
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(Interrupted):
        place.start([_container(status="exited"), _container("my_task_container_1", "c2", "exited", "b")])
    assert sorted(slurm.cancelled) == [7, 8]


@pytest.mark.usefixtures("interruptible")
def test_job_that_is_being_submitted_when_ctrl_c_comes_is_ended(place: Cluster, slurm: FakeSlurm) -> None:
    def submitting() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)

    slurm.submitting = submitting
    slurm.on_submit = lambda _: Job("PENDING", "", "Resources")
    with pytest.raises(Interrupted):
        place.start([_container(status="exited")])
    assert slurm.cancelled == [7]


def test_stop_gives_up_what_is_being_started(place: Cluster, slurm: FakeSlurm, asked: FakeAgents) -> None:
    slurm.on_submit = lambda _: Job("PENDING", "", "Resources")
    errors: list[ContainerError] = []

    def start() -> None:
        try:
            place.start([_container(status="exited")])
        except ContainerError as error:
            errors.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    wait_until(lambda: slurm.jobs, timeout_s=5, what="its job is submitted")
    place.stop([_container(status="exited")])
    starting.join(5)
    assert [str(error) for error in errors] == ["container my_task_container_0 did not start: its job 7 is CANCELLED"]
    assert ("c1", "stop", {"name": "my_task_container_0"}) in asked.asked


def test_container_that_has_moved_is_found_by_its_id_and_else_by_its_name(place: Cluster, asked: FakeAgents) -> None:
    asked.containers["c1"] = [_told("my_task_container_0", "2024", id="a")]
    asked.containers["c2"] = [_told("my_task_container_0", "2025", id="b")]
    place.delete([_container(id_="a"), _container(id_="b", machine="c2")])
    place.delete([_container(id_="gone")])
    assert sorted(machine for machine, kind, _ in asked.asked if kind == "delete") == ["c1", "c2", "c2"]


def test_data_that_cannot_be_made_is_said_before_a_job_is_submitted(place: Cluster, slurm: FakeSlurm) -> None:
    place.data.symlink_to("nowhere")
    with pytest.raises(ContainerError, match="data cannot be made"):
        place.start([_container()])
    assert slurm.submitted == []


# --- the agents over the network -------------------------------------------------------------------------------------


class FakeAgent:
    """Answers on an address of its own as an agent does; in MUNGE's place everything is in the clear and root's."""

    def __init__(self, address: str, node: str) -> None:
        self.node = node
        self.answers: list[dict[str, Any] | None] = []
        self.requests: list[dict[str, Any]] = []
        self._listener = socket.create_server((address, letters.PORT))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError, LetterError):
            letters.send(connection, letters.encoded({"v": 1, "node": self.node, "nonce": "0"}))
            for number in itertools.count(1):
                request = letters.parse(letters.receive(connection))
                self.requests.append(request)
                answer = self.answers.pop(0) if self.answers else {}
                if answer is None:
                    return
                told = {"type": "ok", "node": self.node, "reply": request["reply"], "nonce": str(number)}
                letters.send(connection, letters.encoded(told | answer))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeAgent, FakeAgent]]:
    with socket.create_server(("127.0.0.2", 0)) as probe:
        monkeypatch.setattr(letters, "PORT", probe.getsockname()[1])
    monkeypatch.setattr(agents, "_addresses_of", lambda _: ["127.0.0.2", "127.0.0.3", "127.0.0.4"])
    monkeypatch.setattr(letters, "seal", lambda message: letters.encoded(message))
    monkeypatch.setattr(letters, "unseal", lambda content: (letters.parse(content), 0))
    found = FakeAgent("127.0.0.2", "c1"), FakeAgent("127.0.0.3", "c2")
    yield found
    for one in found:
        one.close()


def test_those_that_answer_are_heard_and_a_silent_one_is_left_out(two: tuple[FakeAgent, FakeAgent]) -> None:
    asking = Agents()
    assert asking.machines == ["c1", "c2"]
    assert set(asking.ask_all("list")) == {"c1", "c2"}
    two[1].answers = [None]
    assert set(asking.ask_all("list")) == {"c1"}
    assert [request["nonce"] for request in two[0].requests] == ["0", "1"], "a connection is used again"


@pytest.mark.parametrize(
    "wrong", [{"reply": "of another question"}, {"node": "another"}, {"reply": None}], ids=["reply", "node", "none"]
)
def test_answer_to_another_question_is_none(two: tuple[FakeAgent, FakeAgent], wrong: dict[str, Any]) -> None:
    two[0].answers = [wrong]
    with pytest.raises(ContainerError, match="c1 does not answer: the answer is not from this node's agent"):
        Agents().ask("c1", "list")


def test_answer_that_is_not_root_s_is_none(two: tuple[FakeAgent, FakeAgent], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letters, "unseal", lambda content: (letters.parse(content), 2001))
    with pytest.raises(ContainerError, match="not from this node's agent"):
        Agents().ask("c1", "list")


def test_refusal_keeps_its_code(two: tuple[FakeAgent, FakeAgent]) -> None:
    two[0].answers = [{"type": "refused", "code": "share", "message": "no more"}]
    with pytest.raises(AgentRefused, match="no more") as caught:
        Agents().ask("c1", "create")
    assert caught.value.code == "share"


def test_machine_that_is_not_there_is_said(two: tuple[FakeAgent, FakeAgent]) -> None:
    with pytest.raises(ContainerError, match="c9 does not answer: its agent is not there"):
        Agents().ask("c9", "list")


def test_machine_that_goes_away_in_a_command_is_said(two: tuple[FakeAgent, FakeAgent]) -> None:
    stream = Agents().run("c1", name="a", argv=["sh"], terminal=False)
    stream.send(letters.INPUT_ENDS, b"which no agent understands here")
    with pytest.raises(ContainerError, match="c1 went away while the command ran"):
        list(stream.pieces())


def test_loading_the_commands_is_quick() -> None:
    heavy = "import sys, container_manager.cm; print(sorted({'docker', 'rich', 'numpy', 'yaml'} & set(sys.modules)))"
    src = str(Path(cluster.__file__).parents[1])
    argv = ["python3", "-c", heavy]
    assert subprocess.run(argv, env={**os.environ, "PYTHONPATH": src}, capture_output=True, text=True).stdout == "[]\n"
