"""When the cluster is ready, and when it is not."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from cfiddle_cluster import readiness, wait
from cfiddle_cluster.calibration import Identity
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.slurm import Node

HEAD: Any = SimpleNamespace(name="head", roles={"head"})
C1: Any = SimpleNamespace(name="c1", roles={"worker"})
C2: Any = SimpleNamespace(name="c2", roles={"worker"})


class Fake:
    """Slurm: nodes, the jobs that ran, and their records."""

    def __init__(self) -> None:
        self.nodes_ = {name: Node(name, "idle", True) for name in ("c1", "c2")}
        self.ran: list[tuple[str, str]] = []
        self.records: dict[str, str] = {}
        self.fails = 0
        self.runs_on: dict[str, str] = {}
        self.is_recording = True

    def nodes(self) -> dict[str, Node]:
        return self.nodes_

    def slurm(self, argv: list[str], *, user: str = "slurm", timeout_s: float = 60) -> str:
        if argv[0] == "sacct":
            return "".join(f"{node}|{job}|COMPLETED\n" for job, node in self.records.items())
        if self.fails:
            self.fails -= 1
            raise ClusterError("srun fails")
        wanted = next(word.removeprefix("--nodelist=") for word in argv if word.startswith("--nodelist="))
        job = str(len(self.ran) + 1)
        self.ran.append((wanted, user))
        if self.is_recording:
            self.records[job] = wanted
        identity = {"program": "p", "boot": f"boot-{wanted}", "model": "m"}
        return f"{self.runs_on.get(wanted, wanted)} {job}\n{json.dumps(identity)}\n"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()
    monkeypatch.setattr(readiness.slurm, "nodes", found.nodes)
    monkeypatch.setattr(readiness.slurm, "slurm", found.slurm)
    monkeypatch.setattr(wait.time, "sleep", lambda _s: None)
    for name, seconds in {"REGISTER_TIMEOUT_S": 0.05, "RECORD_TIMEOUT_S": 0.05, "BUSY_TIMEOUT_S": 0.4}.items():
        monkeypatch.setattr(readiness, name, seconds)
    return found


def test_an_ordinary_account_s_job_runs_on_each_worker_and_is_on_record(fake: Fake) -> None:
    readiness.wait_until_ready([HEAD, C1, C2])
    assert sorted(fake.ran) == [("c1", "2000:2000"), ("c2", "2000:2000")]


def test_workers_that_ran_a_job_say_which_machines_they_are(fake: Fake) -> None:
    fake.nodes_["c2"] = Node("c2", "allocated", True)
    fake.records = {"3": "c2"}
    assert readiness.wait_until_ready([HEAD, C1, C2]) == {"c1": Identity("p", "boot-c1", "m")}


def test_a_job_without_a_record_is_not_ready(fake: Fake) -> None:
    fake.is_recording = False
    with pytest.raises(ClusterError, match="record of job"):
        readiness.wait_until_ready([C1])


def test_a_worker_that_does_not_answer_is_named(fake: Fake) -> None:
    fake.nodes_["c2"] = Node("c2", "down", False, "Not responding")
    with pytest.raises(ClusterError, match=r": c2 to answer slurmctld"):
        readiness.wait_until_ready([C1, C2])
    assert fake.ran == []


@pytest.mark.parametrize("state", ["allocated", "mixed", "draining", "drained"])
def test_a_busy_or_drained_worker_is_ready_if_one_ran_there_before(fake: Fake, state: str) -> None:
    fake.nodes_["c1"] = Node("c1", state, True)
    fake.records = {"3": "c2"}
    with pytest.raises(ClusterError, match="busy or drained and has never run one"):
        readiness.wait_until_ready([C1])
    fake.records["4"] = "c1"
    readiness.wait_until_ready([C1])
    assert fake.ran == []


def test_a_job_that_fails_once_is_tried_again_and_one_that_always_fails_is_an_error(fake: Fake) -> None:
    fake.fails = readiness.ATTEMPTS - 1
    readiness.wait_until_ready([C1])
    fake.fails = 99
    with pytest.raises(ClusterError, match="srun fails"):
        readiness.wait_until_ready([C1])


def test_a_job_that_ran_elsewhere_proves_nothing(fake: Fake) -> None:
    fake.runs_on["c1"] = "c2"
    with pytest.raises(ClusterError, match="the job for c1 ran on c2"):
        readiness.wait_until_ready([C1])


def test_without_workers_there_is_nothing_to_wait_for(fake: Fake) -> None:
    readiness.wait_until_ready([HEAD])
    assert fake.ran == []
