"""The manager's verbs and messages, over a place that only keeps states."""

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from container_manager import cm, interrupts, task2
from container_manager.errors import ContainerError
from container_manager.manager import Manager
from container_manager.place import Container

Command = Callable[..., str]


class FakePlace:
    """Containers as their states; `fails` is raised by the call of that name after it has done its work."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.states: dict[str, Container] = {}
        self.fails: dict[str, BaseException] = {}
        self.status = 0
        self.away: list[str] = []
        self._lock = threading.Lock()
        self._made = 0

    def naming(self) -> AbstractContextManager[None]:
        return nullcontext()

    def containers(self) -> list[Container]:
        return sorted(self.states.values(), key=lambda container: container.created, reverse=True)

    def silent(self) -> list[str]:
        return self.away

    def create(self, names: Sequence[str]) -> None:
        for name in names:
            assert name not in self.states
            self._made += 1
            made = Container(name, f"{self._made:064x}", "sha256:1", "created", f"2024-02-15T02:59:{self._made:02}Z")
            self.states[name] = made
        self._end("create")

    def start(self, containers: Sequence[Container]) -> None:
        self._become(containers, "running")
        self._end("start")

    def execute(self, container: Container, command: str, output: Callable[[bytes], None]) -> int:
        assert self.states[container.name].is_running
        output(f"{command}\n".encode())
        self._end("execute")
        return self.status

    def stop(self, containers: Sequence[Container]) -> None:
        self._become([container for container in containers if self.states[container.name].is_running], "exited")

    def delete(self, containers: Sequence[Container]) -> None:
        for container in containers:
            assert not self.states.pop(container.name).is_running

    def _become(self, containers: Sequence[Container], status: str) -> None:
        with self._lock:
            for container in containers:
                self.states[container.name] = replace(self.states[container.name], status=status)

    def _end(self, call: str) -> None:
        if error := self.fails.get(call):
            raise error


@pytest.fixture(autouse=True)
def _signals_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "raise_them", lambda: None)


@pytest.fixture
def place(tmp_path: Path) -> FakePlace:
    return FakePlace(tmp_path)


@pytest.fixture
def command(place: FakePlace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Return what runs `CM.py WORDS…` and returns its stdout; `status` and `stderr` are what else is expected of it."""
    monkeypatch.setattr(cm, "here", lambda: place)

    def run(*words: str, status: int = 0, stderr: str = "") -> str:
        monkeypatch.setattr("sys.argv", ["CM.py", *words])
        with pytest.raises(SystemExit) as ended:
            cm.main()
        code = ended.value.code
        said = capfd.readouterr()
        errors = said.err
        if isinstance(code, str):
            code, errors = 1, f"{errors}{code}\n"
        assert (code or 0, errors) == (status, stderr)
        return said.out

    return run


def _statuses(place: FakePlace) -> dict[str, str]:
    return {name.rpartition("_")[2]: container.status for name, container in place.states.items()}


def test_create_counts_on(command: Command) -> None:
    assert command("create", "2") == (
        "created 2 containers\ncontainer 1 : my_task_container_0\ncontainer 2 : my_task_container_1\n"
    )
    assert command("create", "1") == "created 1 containers\ncontainer 1 : my_task_container_2\n"


def test_created_after_some_were_deleted(command: Command) -> None:
    command("create", "3")
    command("delete", "--name", "my_task_container_1")
    assert command("create", "2").splitlines()[1:] == [
        "container 1 : my_task_container_1",
        "container 2 : my_task_container_3",
    ]


def test_list(command: Command, place: FakePlace) -> None:
    assert command("list") == "There are 0 containers:\n"
    command("create", "2")
    assert command("list") == (
        "There are 2 containers:\n"
        "container 1 : {'NAME': 'my_task_container_1', 'IMAGE': 'sha256:1', 'STATUS': 'created', "
        f"'CREATED': '2024-02-15T02:59:02Z', 'CONTAINER ID': '{2:064x}'}}\n"
        "container 2 : {'NAME': 'my_task_container_0', 'IMAGE': 'sha256:1', 'STATUS': 'created', "
        f"'CREATED': '2024-02-15T02:59:01Z', 'CONTAINER ID': '{1:064x}'}}\n"
    )
    [last, first] = json.loads(command("list", "--json"))
    assert (first["name"], last["name"], last["status"], last["job"]) == (
        "my_task_container_0",
        "my_task_container_1",
        "created",
        None,
    )


def test_table_has_machine_and_job_where_there_are_any(command: Command, place: FakePlace) -> None:
    command("create", "1")
    heading, row = command("list", "--table").splitlines()
    assert heading.split() == "NAME STATUS CREATED CONTAINER ID".split()
    assert row.split() == ["my_task_container_0", "created", "2024-02-15", "02:59:01Z", f"{1:064x}"[:12]]
    place.states["my_task_container_0"] = replace(place.containers()[0], machine="c1", job=17)
    heading, row = command("list", "--table").splitlines()
    assert heading.split()[-2:] == ["MACHINE", "JOB"]
    assert row.split()[-2:] == ["c1", "17"]


def test_delete(command: Command, place: FakePlace) -> None:
    command("create", "4")
    place.start([place.states["my_task_container_0"], place.states["my_task_container_3"]])
    command("delete", "--name", "no_exist_container", status=1, stderr="no container names no_exist_container\n")
    refusal = "container my_task_container_0 is running, please stop it before delete it!\n"
    assert command("delete", "--name", "my_task_container_0", status=1, stderr=refusal) == ""
    assert command("delete") == "deleted all not running containers: ['my_task_container_2', 'my_task_container_1']\n"
    assert _statuses(place) == {"0": "running", "3": "running"}
    assert command("delete") == "deleted all not running containers: []\n"
    place.stop(place.containers())
    assert command("delete", "--name", "my_task_container_3") == "deleted container my_task_container_3\n"
    assert _statuses(place) == {"0": "exited"}


def test_stop(command: Command, place: FakePlace) -> None:
    command("create", "4")
    place.start([place.states[f"my_task_container_{number}"] for number in (0, 2, 3)])
    command("stop", "--name", "my_task_container_100", status=1, stderr="no container names my_task_container_100\n")
    refusal = "container my_task_container_1 is not running\n"
    assert command("stop", "--name", "my_task_container_1", status=1, stderr=refusal) == ""
    assert command("stop", "--name", "my_task_container_2") == "stopped container my_task_container_2\n"
    assert command("stop") == "stopped all running containers: ['my_task_container_3', 'my_task_container_0']\n"
    assert _statuses(place) == {"0": "exited", "1": "created", "2": "exited", "3": "exited"}


def test_run(command: Command, place: FakePlace) -> None:
    refusal = "no container name no_exist_container\n"
    assert command("run", "--name", "no_exist_container", "--cmd", "ls", status=1, stderr=refusal) == ""
    assert command("run", "--cmd", "ls -l") == "command output:\nls -l\n"
    assert _statuses(place) == {"0": "running"}, "it goes on running"
    place.stop(place.containers())
    place.status = 7
    assert command("run", "--name", "my_task_container_0", "--cmd", "ls", status=7) == "command output:\nls\n"
    assert _statuses(place) == {"0": "running"}, "it was started, and no other was made"


@pytest.mark.parametrize("name", ["../x", "-rf", "a b", "x" * 300, "ä"])
@pytest.mark.parametrize("words", [("delete",), ("stop",), ("run", "--cmd", "ls")])
def test_illegal_name(command: Command, words: Sequence[str], name: str) -> None:
    complaint = f"error: {name!r} is no name of a container: letters, digits, _ . and -, at most 63\n"
    assert command(*words, f"--name={name}", status=1, stderr=complaint) == ""


@pytest.mark.parametrize(
    "words",
    [
        *(("create", number) for number in ("0", "-1", "101", "99999999999999999999", "four", "1.5", "")),
        ("create",),
        ("create", "1", "2"),
        ("run",),
        ("run", "--cmd", ""),
        ("task2", "--size", "0"),
        ("task2", "--size", "99999999999"),
        ("task2", "--size", "3", "--containers", "4"),
        ("task2", "--containers", "0"),
        ("task3", "--seed", "-1"),
        ("task3", "--seed", str(2**63)),
        ("list", "--table", "--json"),
        ("nonesuch",),
    ],
)
def test_bad_input_changes_nothing(
    place: FakePlace, words: Sequence[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cm, "here", lambda: place)
    monkeypatch.setattr("sys.argv", ["CM.py", *words])
    with pytest.raises(SystemExit) as ended:
        cm.main()
    said = capfd.readouterr()
    assert ended.value.code == 2
    assert "Error: " in said.err
    assert said.out == ""
    assert place.states == {}


def test_task2_prints_each_result_in_its_order(command: Command, place: FakePlace, tmp_path: Path) -> None:
    progress = f"1000 random numbers for {tmp_path}/data.csv\n" + "".join(
        f"containers done: {done} of 3\n" for done in (1, 2, 3)
    )
    out = command("task2", "--size", "1000", "--containers", "3", "--seed", "1", stderr=progress)
    assert out.splitlines() == [
        f"result from container {index + 1} : python task2.py --file data/data.csv --idx {index} --of 3"
        for index in range(3)
    ]
    assert len((tmp_path / "data.csv").read_text().splitlines()) == 1000
    assert _statuses(place) == {"0": "running", "1": "running", "2": "running"}


def test_task3_passes_on_what_it_prints(command: Command) -> None:
    assert command("task3", "--seed", "4") == "python task3.py --file data/data.ptd --make --seed 4\n"


@pytest.mark.parametrize("call", ["create", "start", "execute"])
@pytest.mark.parametrize("error", [ContainerError("no room"), interrupts.Interrupted(2)])
@pytest.mark.parametrize("words", [("task2", "--size", "50"), ("task3",)])
def test_what_ends_a_task_early_leaves_no_container(
    place: FakePlace, monkeypatch: pytest.MonkeyPatch, words: Sequence[str], call: str, error: BaseException
) -> None:
    kept = Manager(place).create(1)
    place.fails[call] = error
    monkeypatch.setattr(cm, "here", lambda: place)
    monkeypatch.setattr("sys.argv", ["CM.py", *words])
    with pytest.raises(SystemExit) as ended:
        cm.main()
    assert ended.value.code in ("error: no room", 130)
    assert place.containers() == kept


def test_task_that_fails_in_its_container(place: FakePlace) -> None:
    place.status = 3
    with pytest.raises(ContainerError, match=r"my_task_container_. ended with status 3:\npython task2"):
        task2.run(Manager(place), size=50)
    assert place.states == {}


def test_new_container_that_does_not_start_is_not_left(place: FakePlace) -> None:
    place.fails["start"] = ContainerError("no room")
    with pytest.raises(ContainerError, match="no room"):
        Manager(place).ready()
    assert place.states == {}


def test_container_that_does_not_start_is_kept(place: FakePlace) -> None:
    [container] = Manager(place).create(1)
    place.fails["start"] = ContainerError("no room")
    with pytest.raises(ContainerError, match="no room"):
        Manager(place).ready(container.name)
    assert container.name in place.states


def test_machine_that_does_not_answer_is_named_beside_the_list(place: FakePlace, command: Command) -> None:
    place.away = ["c2"]
    said = "c2 does not answer: containers that are there are not shown\n"
    assert command("list", stderr=said) == "There are 0 containers:\n"
    assert command("list", "--json", stderr=said) == "[]\n"
