"""The status: one table from what the engine, the swarm and Slurm say, and from their absence."""

import json
from types import SimpleNamespace
from typing import Any

import docker.errors
import pytest

from cfiddle_cluster import status
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.slurm import Job, Node

CONFIG: Any = SimpleNamespace(head_addr="", jupyter_port=8888)
STATE: Any = None
HOST = "10.0.0.1:5000"


class FakeEngine:
    """An engine with two machines, three services and their images."""

    def __init__(self) -> None:
        self.api = SimpleNamespace(nodes=self._nodes, tasks=self._tasks)
        self.images = SimpleNamespace(get=self._image)
        self.containers = SimpleNamespace(list=self._containers)
        self.services = SimpleNamespace(list=lambda filters: [_service("cfiddle-registry", f"{HOST}/r@sha256:1")])
        self.machines = ["cfiddle-machine-c1", "cfiddle-machine-c2", "cfiddle-other"]
        self.states = {"slurm-stack_agent": "running"}

    def ping(self) -> bool:
        return True

    def info(self) -> dict[str, Any]:
        return {"ServerVersion": "26.1.5", "Swarm": {"ControlAvailable": True}}

    def _nodes(self) -> list[dict[str, Any]]:
        def node(name: str, labels: dict[str, str], state: str, availability: str = "active") -> dict[str, Any]:
            return {
                "Spec": {"Labels": labels, "Availability": availability},
                "Status": {"State": state, "Addr": f"addr-{name}"},
                "Description": {"Hostname": name, "Engine": {"EngineVersion": "26.1.5"}},
            }

        return [
            node("head", {"slurm_head": "true", "slurm_role": "head_node"}, "ready"),
            node("c1", {"slurm_worker": "true", "slurm_role": "worker"}, "ready", "drain"),
            node("stranger", {}, "ready"),
        ]

    def _tasks(self, filters: dict[str, str]) -> list[dict[str, Any]]:
        state = self.states.get(filters["service"], "running")
        return [{"Status": {"State": state, "Err": "no such image"}, "DesiredState": "running", "UpdatedAt": "1"}]

    def _image(self, reference: str) -> Any:
        known = {
            "cfiddle-agent:aa": "A",
            f"{HOST}/a@sha256:2": "A",
            "cfiddle-sandbox:bb": "B",
            f"{HOST}/s@sha256:3": "old",
        }
        if reference not in known:
            raise docker.errors.ImageNotFound("no such image")
        return SimpleNamespace(id=known[reference])

    def _containers(self, all: bool, filters: dict[str, str], ignore_removed: bool = False) -> list[Any]:
        return [SimpleNamespace(name=name, status="exited") for name in self.machines]


def _service(name: str, image: str, mode: str = "Global", env: tuple[str, ...] = ()) -> Any:
    spec = {"Mode": {mode: {"Replicas": 1}}, "TaskTemplate": {"ContainerSpec": {"Image": image, "Env": list(env)}}}
    return SimpleNamespace(name=name, attrs={"Spec": spec})


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(status.engine, "client", lambda: fake)
    monkeypatch.setattr(status.services, "is_manager", lambda: True)
    agent = _service("slurm-stack_agent", f"{HOST}/a@sha256:2", env=(f"SANDBOX_IMAGE={HOST}/s@sha256:3",))
    monkeypatch.setattr(status.services, "services", lambda: [agent])
    monkeypatch.setattr(
        status.services, "unhealthy", lambda: [name for name, state in fake.states.items() if state != "running"]
    )
    monkeypatch.setattr(status.services, "container", lambda _service: SimpleNamespace(id="x"))
    monkeypatch.setattr(status.slurm, "is_answering", lambda: True)
    monkeypatch.setattr(status.slurm, "nodes", lambda: {"c1": Node("c1", "idle", True)})
    monkeypatch.setattr(
        status.slurm, "jobs", lambda: [Job(str(n), "ada", "normal", "RUNNING", "0:01", "c1") for n in range(1, 31)]
    )
    names = ("mysql", "cluster", "agent", "user", "registry", "sandbox", "compiler", "task")
    built = {name: f"cfiddle-{name}:00" for name in names} | {
        "agent": "cfiddle-agent:aa",
        "sandbox": "cfiddle-sandbox:bb",
    }
    monkeypatch.setattr(status.images, "built", lambda _config: built)
    return fake


def test_table_has_a_line_for_each_thing(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(CONFIG, STATE) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "machine head ready head addr-head Docker 26.1.5" in text
    assert "machine c1 ready, drain worker addr-c1" in text
    assert "machine c2 exited, not in the swarm simulated" in text
    assert "stranger" not in text
    assert "service registry 1 of 1" in text
    assert "service agent 1 of 1" in text
    assert "node c1 idle" in text
    assert "job 1 running ada normal 0:01 c1" in text
    assert "job … 10 more" in text
    assert "image cfiddle-agent current cfiddle-agent:aa" in text
    assert "image cfiddle-sandbox differs from what runs" in text
    assert "image cfiddle-user not built" in text
    assert "http://localhost:8888" in text
    assert "token=" not in text


def test_json_has_what_the_table_has(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    status.main(CONFIG, STATE, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["well"] is True
    assert len(found["queue"]) == 30
    assert {machine["name"] for machine in found["machines"]} == {"head", "c1", "c2"}


def test_service_that_does_not_run_is_said_with_its_reason(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.states["slurm-stack_agent"] = "rejected"
    assert status.main(CONFIG, STATE) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if " agent " in line)
    assert line.split() == ["service", "agent", "0", "of", "1", "no", "such", "image"]


def test_node_that_does_not_answer_is_not_well(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status.slurm, "nodes", lambda: {"c1": Node("c1", "down", False, "Not responding")})
    found = status.collect(CONFIG, STATE)
    assert not found["well"]
    assert "down, no answer" in status.text(found)


def test_machine_without_a_swarm_has_a_status(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.machines = []
    monkeypatch.setattr(status.services, "is_manager", lambda: False)
    monkeypatch.setattr(status.services, "services", list)
    monkeypatch.setattr(status.services, "unhealthy", lambda: pytest.fail("there is no swarm to ask"))
    monkeypatch.setattr(status.services, "container", lambda _service: None)
    monkeypatch.setattr(status.images, "built", lambda _config: (_ for _ in ()).throw(ClusterError("incomplete")))
    assert status.main(CONFIG, STATE) == 0
    assert status.text(status.collect(CONFIG, STATE)) == "the cluster does not run; ./invoke up starts it"


def test_machine_without_an_engine_has_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> Any:
        raise ClusterError("no engine")

    monkeypatch.setattr(status.engine, "client", none)
    assert status.main(CONFIG, STATE) == 0
    assert "no Docker Engine" in capsys.readouterr().out
