"""The command ddocker: its sessions, tables, questions and refusals, over agents and a Slurm that only keep states."""

import itertools
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from click.testing import CliRunner, Result

from container_manager import ddocker, fleet, interrupts, launch, room
from container_manager.agents import AgentRefused
from container_manager.errors import ContainerError
from container_manager.launch import Launch
from container_manager.room import Job, Machine

IMAGES = ("ubuntu:latest", "python3_cuda:latest", "nvidia/cuda:10.2-base")
TYPES = (
    ("12 CPUS, 64 GB", 12, 64, ()),
    ("12 CPUS, 64 GB, 1 TITAN XP", 12, 64, ("TITAN Xp",)),
    ("24 CPUS, 128 GB, 2 TITAN XP", 24, 128, ("TITAN Xp", "TITAN Xp")),
)
CREATED = "2020-05-29T15:35:39.123456789Z"


@dataclass
class World:
    """Machines with containers, of which some do not answer, and the jobs that were submitted."""

    silent: set[str] = field(default_factory=set)
    full: bool = False
    refusal: AgentRefused | None = None
    on_submit: Callable[[], None] = lambda: None
    jobs: dict[int, Launch] = field(default_factory=dict)
    over: set[int] = field(default_factory=set)
    containers: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"c1": [], "c2": []})
    committed: list[str] = field(default_factory=list)
    uid: int = 1000

    # what Slurm does

    def machines(self) -> list[Machine]:
        return [Machine(name, "idle", 8, 65536, {"titan_xp": 1}) for name in ("c1", "c2")]

    def submit(self, launch: Launch) -> int:
        number = len(self.jobs) + 1
        self.jobs[number] = launch
        self.on_submit()
        if not self.full and not self.refusal:
            machine = launch.machine or "c2"
            there = [one for one in self.containers[machine] if one["name"] == launch.name]
            if there:
                there[0]["status"] = "running"
            else:
                self.add(launch.name, machine, image=launch.image, launch=launch)
        return number

    def job(self, number: int) -> Job:
        if number in self.over:
            return Job("CANCELLED", "", "")
        return Job("PENDING", "", "Resources") if self.full else Job("RUNNING", self.jobs[number].machine or "c2", "")

    def cancel(self, numbers: Any) -> None:
        for number in numbers:
            self.over.add(number)
            for container in itertools.chain(*self.containers.values()):
                if container["name"] == self.jobs[number].name:
                    container["status"] = "exited"

    # what the agents do

    def add(
        self, name: str, machine: str, *, image: str = IMAGES[1], launch: Launch | None = None, **more: Any
    ) -> None:
        told = {"name": name, "uid": 1000, "user": "ada", "image": image, "status": "running", "created": CREATED}
        told |= {"cpus": 12, "memory_mb": 65536, "ports": [], "gpus": [], "id": "0" * 64, "job": 1}
        if launch:
            told |= {"cpus": launch.cpus, "memory_mb": launch.memory_mb}
            told |= {"ports": list(range(25000, 25000 + launch.ports))}
        self.containers[machine].append({**told, **more})

    def ask_all(self, kind: str, **fields: Any) -> dict[str, dict[str, Any]]:
        return {machine: self.ask(machine, kind, **fields) for machine in self.containers if machine not in self.silent}

    @property
    def agents(self) -> list[str]:
        return [machine for machine in self.containers if machine not in self.silent]

    def ask(self, machine: str, kind: str, **fields: Any) -> dict[str, Any]:
        if machine in self.silent:
            raise ContainerError(f"{machine} does not answer")
        found = [one for one in self.containers[machine] if fields.get("name") in (one["name"], f"u1000.{one['name']}")]
        if kind in ("stop", "delete", "inspect", "commit") and not found:
            raise AgentRefused("name", f"there is no container {fields['name']}")
        return dict(getattr(self, f"_{kind}")(machine, found, fields))

    def _list(self, machine: str, *_: Any) -> dict[str, Any]:
        return {"containers": [dict(container) for container in self.containers[machine]]}

    def _types(self, *_: Any) -> dict[str, Any]:
        names = ("name", "cpus", "memory_mb", "gpus")
        return {
            "types": [dict(zip(names, (name, cpus, gb * 1024, gpus), strict=True)) for name, cpus, gb, gpus in TYPES]
        }

    def _images(self, machine: str, *_: Any) -> dict[str, Any]:
        own = [{"name": name, "id": "sha256:2", "owner": "ada", "size": 5_000_000} for name in self.committed]
        given = [{"name": name, "id": f"sha256:{name:x<70}", "owner": "", "size": 1_190_000_000} for name in IMAGES]
        return {"images": [*given, *(own if machine == "c1" else [])]}

    def _outcome(self, *_: Any) -> dict[str, Any]:
        if self.refusal:
            raise self.refusal
        return {"id": "0" * 64}

    def _inspect(self, machine: str, found: list[dict[str, Any]], *_: Any) -> dict[str, Any]:
        return {"container": {"Id": found[0]["id"], "Name": f"/u1000.{found[0]['name']}"}}

    def _stop(self, machine: str, found: list[dict[str, Any]], *_: Any) -> dict[str, Any]:
        found[0]["status"] = "exited"
        return {}

    def _delete(self, machine: str, found: list[dict[str, Any]], *_: Any) -> dict[str, Any]:
        if found[0]["status"] == "running":
            raise AgentRefused("running", f"container {found[0]['name']} is running")
        self.containers[machine].remove(found[0])
        return {}

    def _commit(self, machine: str, found: list[dict[str, Any]], fields: dict[str, Any]) -> dict[str, Any]:
        self.committed.append(fields["image"])
        return {}

    def _fetch(self, *_: Any) -> dict[str, Any]:
        return {}

    def _forget(self, machine: str, found: list[dict[str, Any]], fields: dict[str, Any]) -> dict[str, Any]:
        self.committed = [name for name in self.committed if name != fields["image"]]
        return {}

    def _gpus(self, machine: str, *_: Any) -> dict[str, Any]:
        if machine == "c1":
            raise AgentRefused("gpus", "c1 has no GPU")
        return {"report": "NVIDIA-SMI\n"}

    def _amiss(self, machine: str, *_: Any) -> dict[str, Any]:
        return (
            {"missing": ["ubuntu:latest"], "foreign": ["left-over"]}
            if machine == "c2"
            else {"missing": [], "foreign": []}
        )


class FakeAgents:
    """The world as `Agents` shows it."""

    def __init__(self, world: World) -> None:
        self.ask, self.ask_all = world.ask, world.ask_all
        self.machines = world.agents

    def run(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a container that is not there was asked for")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> World:
    made = World()
    monkeypatch.setattr(fleet, "Agents", lambda: FakeAgents(made))
    monkeypatch.setattr(fleet.os, "getuid", lambda: made.uid)
    monkeypatch.setattr(fleet.getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(fleet, "PATIENCE_S", 0.05)
    monkeypatch.setattr(launch, "_LOOK_S", 0.01)
    for name in ("machines", "submit", "job", "cancel"):
        monkeypatch.setattr(room, name, getattr(made, name))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ddocker, "_default_name", lambda: "ada_20200530-003533")
    return made


def run(*words: str, input: str | None = None) -> Result:
    return CliRunner().invoke(ddocker.commands, list(words), input=input)


def refusal(*words: str) -> str:
    """Return what a command that must fail says."""
    done = run(*words)
    assert isinstance(done.exception, ContainerError), done.output
    return str(done.exception)


def test_help_is_the_list_of_commands() -> None:
    said = run("--help").output.splitlines()
    assert said[:4] == ["", "Usage: ddocker COMMAND [ARGUMENTS]", "", "Commands:"]
    for line in (
        "  ddocker ps                                      List-up running containers",
        "  ddocker ps [-a,--all]                           List-up every container",
        "  ddocker images                                  List-up images",
        "  ddocker inspect <CONTAINER_NAME>                Container details",
        "  ddocker exec <CONTAINER_NAME>                   Access in container",
        "  ddocker start <CONTAINER_NAME>                  Start container",
        "  ddocker stop <CONTAINER_NAME>                   Stop container",
        "  ddocker rm <CONTAINER_NAME>                     Remove container",
        "  ddocker rmi <IMAGE_NAME>                        Remove image",
        "  ddocker nvidia-smi <HOST_NAME>                  Show GPU usage",
        "  ddocker create                                  Create/start container with selected types",
        "  ddocker commit <CONTAINER_NAME> <IMAGE_NAME>    Commit container",
    ):
        assert line in said


@pytest.mark.parametrize("command", sorted(ddocker.commands.commands))
def test_every_command_has_help(command: str) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0
    assert done.output.startswith("Usage: ")


def test_create_asks_and_answers_as_people_know_it(world: World) -> None:
    done = run("create", input="\n\n1\nabc\n")
    assert done.exit_code == 0
    # What is typed after a question ends its line at a terminal.
    assert done.output.splitlines() == [
        "Service types.",
        "0 : 12 CPUS, 64 GB",
        "1 : 12 CPUS, 64 GB, 1 TITAN XP",
        "2 : 24 CPUS, 128 GB, 2 TITAN XP",
        "Select one of types (default: 0): ",
        "Input the number of ports (default: 1): ",
        "Docker Images.",
        "0 : ubuntu:latest",
        "1 : python3_cuda:latest",
        "2 : nvidia/cuda:10.2-base",
        "Select one of types (default: 0): 1",
        "Input Container name (default: ada_20200530-003533): abc",
        "Start to create",
        "abc",
        "Successfully created!",
    ]
    [made] = world.jobs.values()
    assert (made.cpus, made.memory_mb, made.gpus, made.ports, made.image) == (12, 65536, (), 1, "python3_cuda:latest")
    assert (made.machine, made.counts_cpus) == ("", True)


def test_ps_is_the_table_that_people_know(world: World) -> None:
    world.add("abc", "c1", ports=[25000])
    world.add("other", "c2", status="exited", cpus=1, memory_mb=512, image="u", created="2020-05-29T15:36:00Z")
    assert run("ps", "-a").output.splitlines() == [
        "NAME    PORT                       IMAGE                 CREATED             HOST   TYPE              RUNNING",
        "other                              u                     20-05-29T15:36:00   c2     1 cpus,0.5g mem   False",
        "abc     0.0.0.0:25000->25000/tcp   python3_cuda:latest   20-05-29T15:35:39   c1     12 cpus,64g mem   True",
    ]
    assert "other" in run("ps", "--all").output
    assert "other" not in run("ps").output
    world.add("cards", "c2", gpus=["TITAN Xp", "TITAN Xp"])
    assert "12 cpus,64g mem,2 TITAN Xp" in run("ps").output


def test_machine_that_does_not_answer_is_named_and_the_others_shown(world: World) -> None:
    world.add("abc", "c1")
    world.silent = {"c2"}
    for command in (("ps", "-a"), ("images",)):
        done = run(*command)
        assert done.stderr == "c2 does not answer\n"
        assert "c1" in done.stdout
    assert "c2 does not" in refusal("stop", "nope")


def test_everything_can_be_said_by_options(world: World) -> None:
    done = run("create", "--type", "2", "--ports", "0", "--image", "ubuntu", "--name", "abc")
    assert done.output == "Start to create\nabc\nSuccessfully created!\n"
    [made] = world.jobs.values()
    assert (made.image, made.gpus, made.ports) == ("ubuntu:latest", ("titan_xp", "titan_xp"), 0)
    done = run("create", "--type", "12 CPUS, 64 GB", "--ports", "0", "--image", "1", "--name", "other")
    assert world.jobs[2].cpus == 12
    assert world.jobs[2].image == "python3_cuda:latest"


def test_what_is_neither_said_nor_answered_is_asked_for_by_its_option(world: World) -> None:
    assert "say it with --type" in refusal("create")
    assert "say it with --name" in refusal("create", "--type", "0", "--ports", "0", "--image", "0")
    assert world.jobs == {}


def test_wrong_answer_is_asked_for_again(world: World) -> None:
    done = run("create", "--ports", "0", "--image", "0", "--name", "abc", input="3\n-1\nx\n1\n")
    assert done.output.count("Select one of types") == 4
    assert world.jobs[1].gpus == ("titan_xp",)


ALL = ("--type", "0", "--ports", "1", "--image", "0")


@pytest.mark.parametrize("name", ["../x", "-rf", "a b", "x" * 300, "ü", "", ".x", "a\n"])
def test_illegal_name_is_refused_before_anything_is_asked_of_anyone(world: World, name: str) -> None:
    assert "no name of a container" in refusal("create", *ALL, f"--name={name}")
    assert "no name of a container" in refusal("rm", "--", name)
    assert world.jobs == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--type", "3"), "--type '3' is none of these"),
        (("--type", "-1"), "--type '-1' is none of these"),
        (("--type", "²"), "is none of these"),
        (("--image", "nope"), "--image 'nope' is none of these: ubuntu:latest"),
    ],
)
def test_choice_that_is_none_is_refused(world: World, options: tuple[str, ...], said: str) -> None:
    assert said in refusal("create", *ALL, "--name", "abc", *options)
    assert world.jobs == {}


@pytest.mark.parametrize("ports", ["-1", "65", "1000000000000", "one", "1.5"])
def test_number_of_ports_that_is_none_is_refused(world: World, ports: str) -> None:
    done = run("create", *ALL, "--name", "abc", f"--ports={ports}")
    assert done.exit_code == 2
    assert "--ports" in done.stderr
    assert world.jobs == {}


def test_name_that_is_taken_on_any_machine_is_refused(world: World) -> None:
    world.add("abc", "c1", status="exited")
    assert "there is a container abc already" in refusal("create", *ALL, "--name", "abc")
    assert world.jobs == {}


def test_no_room_says_what_is_free_and_leaves_no_job(world: World) -> None:
    world.full = True
    said = refusal("create", *ALL, "--name", "abc")
    assert said.splitlines() == [
        "there is no room for container abc now: Resources",
        "  c1 (idle): 8 CPUs, 64.0 GB, 1 titan_xp free",
        "  c2 (idle): 8 CPUs, 64.0 GB, 1 titan_xp free",
    ]
    assert world.over == {1}


def test_what_the_agent_refuses_leaves_no_job(world: World) -> None:
    world.refusal = AgentRefused("ports", "this machine has no 1 ports free")
    assert refusal("create", *ALL, "--name", "abc") == "this machine has no 1 ports free"
    assert world.over == {1}


def test_interruption_leaves_neither_job_nor_container(world: World) -> None:
    def interrupt() -> None:
        world.on_submit = lambda: None
        raise interrupts.Interrupted(signal.SIGINT)

    world._outcome = lambda *_: interrupt()  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(interrupts.Interrupted):
        CliRunner().invoke(ddocker.commands, ["create", *ALL, "--name", "abc"])
    assert world.over == {1}
    assert world.containers == {"c1": [], "c2": []}


def test_stopped_container_starts_where_it_is_with_what_it_had(world: World) -> None:
    world.add("abc", "c1", status="exited", cpus=3, memory_mb=700)
    assert run("start", "abc").output == "abc\n"
    [made] = world.jobs.values()
    assert (made.machine, made.image, made.cpus, made.memory_mb) == ("c1", "", 3, 700)
    assert run("start", "abc").output == "abc\n"
    assert len(world.jobs) == 1


def test_container_that_runs_is_not_removed(world: World) -> None:
    world.add("abc", "c2")
    assert refusal("rm", "abc") == "container abc is running\n→ ddocker stop abc"
    assert run("stop", "abc").output == "abc\n"
    assert run("rm", "abc").output == "abc\n"
    assert world.containers["c2"] == []


@pytest.mark.parametrize("command", [("inspect",), ("exec",), ("start",), ("stop",), ("rm",)])
def test_unknown_container_is_told(world: World, command: tuple[str, ...]) -> None:
    assert refusal(*command, "nope") == "no such container: nope\n→ ddocker ps -a shows them"


def test_inspect_prints_what_docker_prints(world: World) -> None:
    world.add("abc", "c1")
    assert json.loads(run("inspect", "abc").output)[0]["Name"] == "/u1000.abc"


def test_images_tell_who_has_them_and_whose_they_are(world: World) -> None:
    world.committed = ["mine:latest"]
    lines = run("images").output.splitlines()
    assert lines[0].split() == ["IMAGE", "IMAGE", "ID", "SIZE", "OWNER", "HOSTS"]
    assert lines[1].split() == ["ubuntu:latest", "ubuntu:lates", "1.19GB", "c1,c2"]
    assert lines[-1].split() == ["mine:latest", "2", "5MB", "ada", "c1"]


def test_committed_image_is_removed_unless_a_container_is_made_of_it(world: World) -> None:
    world.add("abc", "c1")
    assert run("commit", "abc", "mine:latest").output == "mine:latest\n"
    world.add("two", "c2", image="mine:latest")
    assert "container two is made of mine" in refusal("rmi", "mine")
    world.containers["c2"].clear()
    assert run("rmi", "mine:latest").output == "mine:latest\n"
    assert "no such image" in refusal("rmi", "mine:latest")
    assert "administrator's" in refusal("rmi", "ubuntu:latest")


def test_gpus_of_a_machine_are_shown_or_said_to_be_none(world: World) -> None:
    assert run("nvidia-smi", "c2").output == "NVIDIA-SMI\n"
    assert refusal("nvidia-smi", "c1") == "c1 has no GPU"
    assert refusal("nvidia-smi", "c9") == "there is no machine 'c9'; there are: c1, c2"


def test_administrator_sees_all_by_the_engine_s_names_and_has_none(world: World) -> None:
    world.add("abc", "c1")
    world.uid = 0
    assert "u1000.abc" in run("ps").output
    assert run("stop", "u1000.abc").output == "u1000.abc\n"
    assert run("start", "u1000.abc").output == "u1000.abc\n"
    [made] = world.jobs.values()
    assert (made.user, made.name) == ("ada", "abc")
    assert "root has no containers" in refusal("create", *ALL, "--name", "abc")


def test_setup_names_what_is_missing_and_what_is_in_the_way(world: World) -> None:
    assert "administrator's" in refusal("setup")
    world.uid = 0
    done = run("setup")
    assert done.exit_code == 1
    assert done.output.splitlines() == [
        "c1: is ready",
        "c2: lacks the image ubuntu:latest; on the head: ./invoke setup-containers",
        "c2: container left-over is not the cluster's: remove it",
    ]


def test_machines_are_read_from_what_slurm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def line(name: str, state: str, **more: str) -> str:
        told = {"NodeName": name, "Gres": "container_cpus:7,gpu:titan_xp:2(S:0)", "RealMemory": "8000"}
        told |= {"GresUsed": "container_cpus:2,gpu:titan_xp:1(IDX:0)", "State": state}
        told |= {"AllocMem": "2048", "MemSpecLimit": "1000"}
        return " ".join(f"{key}={value}" for key, value in {**told, "Partitions": "normal,shared", **more}.items())

    lines = [
        line("c2", "DOWN*+DYNAMIC_NORM", Gres="(null)", GresUsed="gpu:0"),
        line("c1", "MIXED+DYNAMIC_NORM"),
        line("c3", "IDLE+DRAIN+DYNAMIC_NORM"),
        line("other", "IDLE", Partitions="normal"),
    ]
    monkeypatch.setattr(room, "ask", lambda *_args, **_options: "\n".join(lines))
    found = room.machines()
    assert [(machine.name, machine.takes_jobs) for machine in found] == [("c1", True), ("c2", False), ("c3", False)]
    assert (found[0].free_cpus, found[0].free_memory_mb, dict(found[0].free_gpus)) == (5, 4952, {"titan_xp": 1})
    assert dict(found[1].free_gpus) == {}
