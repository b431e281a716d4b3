"""Which image goes where, by which way, and what stops it."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from cfiddle_cluster import distribution
from cfiddle_cluster.commands import CommandError
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.images import IMAGES
from cfiddle_cluster.registry import Registry

PASSWORD = "correct-horse-battery"
BUILT = {name: f"cfiddle-{name}:0123456789ab" for name in IMAGES}
OF_WORKERS = ["agent", "cluster", "compiler", "sandbox", "task"]
REGISTRY = "192.0.2.1:5000"
DIGEST = "sha256:" + "d" * 64


@dataclass
class FakeMachine:
    """A machine of ours that remembers the scripts that it was given."""

    name: str
    roles: frozenset[str]
    complaint: str = ""
    images: list[str] = field(default_factory=list)
    lacks_digests: bool = False
    scripts: list[tuple[str, list[str]]] = field(default_factory=list)

    def script(self, text: str, args: Sequence[str] = (), *, timeout_s: float) -> str:
        if text == distribution._HAS_ALL:
            if self.lacks_digests and args:
                raise CommandError(["ssh", self.name], 1, "No such image", "ended with status 1")
            return ""
        self.scripts.append((text, list(args)))
        if self.complaint:
            raise CommandError(["ssh", self.name], 1, self.complaint, "ended with status 1")
        return ""

    def run(self, _argv: Sequence[str], *, timeout_s: float) -> str:
        return "\n".join(self.images)


class FakeEngine:
    """An engine of ours that has the built images, and a registry behind it."""

    def __init__(self) -> None:
        self.pushed: list[str] = []
        self.refusal = ""
        self.digests: dict[str, str] = {}
        self.images = self
        self.api = self

    def get(self, reference: str) -> Any:
        name = reference.partition(":")[0]
        known = [f"{REGISTRY}/{name}@{self.digests[name]}"] if name in self.digests else []
        return SimpleNamespace(id=f"sha256:{name}", attrs={"RepoDigests": known}, tag=lambda *_args: True)

    def push(self, repository: str, _tag: str, **_options: object) -> Iterator[dict[str, Any]]:
        if self.refusal:
            yield {"error": self.refusal}
            return
        self.pushed.append(repository.rpartition("/")[2])
        yield {"status": "Pushed"}
        yield {"aux": {"Digest": DIGEST}}

    def inspect_distribution(self, _reference: str, **_options: object) -> dict[str, Any]:
        return {"Descriptor": {}}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(distribution.engine, "client", lambda: fake)
    own = Registry(REGISTRY, "", "cfiddle", PASSWORD)
    monkeypatch.setattr(distribution.registry, "of", lambda _config, _state: own)
    return fake


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Return what was copied over SSH to each machine."""
    found: dict[str, list[str]] = {}
    monkeypatch.setattr(distribution, "copy", lambda machine, images: found.update({machine.name: sorted(images)}))
    return found


def head(*roles: str) -> FakeMachine:
    return FakeMachine("head", frozenset({"head", *roles}))


def worker(name: str, complaint: str = "") -> FakeMachine:
    return FakeMachine(name, frozenset({"worker"}), complaint)


def distribute(*machines: FakeMachine, running: Collection[str] = ()) -> dict[str, str]:
    return distribution.distribute(None, None, machines, BUILT, lambda _text: None, running)  # type: ignore[arg-type]


def test_one_machine_needs_no_registry(engine: FakeEngine) -> None:
    references = distribute(head("worker"))
    assert engine.pushed == []
    assert references["agent"] == "sha256:cfiddle-agent"


def test_workers_get_by_digest_what_they_run_and_no_more(engine: FakeEngine) -> None:
    c1 = worker("c1")
    references = distribute(head(), c1)
    assert sorted(engine.pushed) == [f"cfiddle-{name}" for name in OF_WORKERS]
    assert references["agent"] == f"{REGISTRY}/cfiddle-agent@{DIGEST}"
    assert references["user"] == "sha256:cfiddle-user"
    ((_, arguments),) = c1.scripts
    assert sorted(arguments) == [
        f"{REGISTRY}/cfiddle-{name}@{DIGEST}=cfiddle-{name}:0123456789ab" for name in OF_WORKERS
    ]


def test_password_goes_over_standard_input_and_never_in_an_argument(engine: FakeEngine) -> None:
    c1 = worker("c1")
    distribute(head(), c1)
    ((text, arguments),) = c1.scripts
    auth = Registry(REGISTRY, "", "cfiddle", PASSWORD).docker_config
    assert auth in text
    assert not any(PASSWORD in argument or auth in argument for argument in arguments)


def test_what_the_registry_has_is_not_pushed_again(engine: FakeEngine) -> None:
    engine.digests = {f"cfiddle-{name}": DIGEST for name in IMAGES}
    references = distribute(head(), worker("c1"))
    assert engine.pushed == []
    assert references["cluster"] == f"{REGISTRY}/cfiddle-cluster@{DIGEST}"


def test_what_was_carried_to_a_worker_in_a_file_goes_through_no_registry(
    engine: FakeEngine, copied: dict[str, list[str]]
) -> None:
    c1, c2 = worker("c1"), worker("c2")
    c1.images = [f"sha256:cfiddle-{name}" for name in OF_WORKERS]
    references = distribute(head(), c1, c2)
    assert not engine.pushed
    assert not c1.scripts
    assert references["agent"] == "sha256:cfiddle-agent"
    assert copied["c2"] == [BUILT[name] for name in OF_WORKERS], "the one without the file gets them over SSH"


def test_what_was_carried_and_what_was_not_go_different_ways(engine: FakeEngine, copied: dict[str, list[str]]) -> None:
    c1 = worker("c1")
    c1.images = ["sha256:cfiddle-sandbox"]
    references = distribute(head(), c1)
    assert sorted(engine.pushed) == [f"cfiddle-{name}" for name in OF_WORKERS if name != "sandbox"]
    assert references["sandbox"] == "sha256:cfiddle-sandbox"
    assert references["agent"] == f"{REGISTRY}/cfiddle-agent@{DIGEST}"
    assert copied["c1"] == [BUILT["sandbox"]]


def test_what_was_pushed_once_keeps_its_reference_though_workers_have_it(engine: FakeEngine) -> None:
    engine.digests = {f"cfiddle-{name}": DIGEST for name in IMAGES}
    c1 = worker("c1")
    c1.images = [f"sha256:cfiddle-{name}" for name in OF_WORKERS]
    assert distribute(head(), c1)["agent"] == f"{REGISTRY}/cfiddle-agent@{DIGEST}"


def test_machine_that_cannot_pull_gets_all_over_ssh_and_all_use_ids(
    engine: FakeEngine, copied: dict[str, list[str]]
) -> None:
    references = distribute(head(), worker("c1"), worker("c2", "dial tcp 192.0.2.1:5000: connect: no route to host"))
    assert set(references.values()) == {f"sha256:cfiddle-{name}" for name, image in IMAGES.items() if image.roles}
    assert copied == {machine: [BUILT[name] for name in OF_WORKERS] for machine in ("c1", "c2")}


NO_ROUTE = "dial tcp 192.0.2.1:5000: connect: no route to host"


def by_digest(*names: str) -> dict[str, str]:
    return {name: f"{REGISTRY}/cfiddle-{name}@{DIGEST}" for name in names}


def test_what_services_run_by_digest_stays_so_where_a_machine_cannot_pull_what_is_new(
    engine: FakeEngine, copied: dict[str, list[str]]
) -> None:
    unchanged = by_digest(*(name for name in OF_WORKERS if name != "agent"))
    references = distribute(head(), worker("c1"), worker("c2", NO_ROUTE), running=unchanged.values())
    assert unchanged.items() <= references.items()
    assert references["agent"] == "sha256:cfiddle-agent"
    assert copied == {machine: [BUILT["agent"]] for machine in ("c1", "c2")}


def test_machine_that_can_neither_pull_nor_has_what_services_run_is_refused(
    engine: FakeEngine, copied: dict[str, list[str]]
) -> None:
    new = worker("c3", NO_ROUTE)
    new.lacks_digests = True
    with pytest.raises(ClusterError, match=r"c3 cannot pull from 192\.0\.2\.1:5000: .* no route") as caught:
        distribute(head(), worker("c1"), worker("c2", NO_ROUTE), new, running=by_digest(*OF_WORKERS).values())
    assert REGISTRY in caught.value.remedy
    assert copied == {}


def test_what_services_run_by_id_stays_so_when_the_registry_is_back(
    engine: FakeEngine, copied: dict[str, list[str]]
) -> None:
    engine.digests = {f"cfiddle-{name}": DIGEST for name in IMAGES}
    c1 = worker("c1")
    c1.images = [f"sha256:cfiddle-{name}" for name in OF_WORKERS]
    references = distribute(head(), c1, worker("c2"), running=["sha256:cfiddle-agent"])
    assert references["agent"] == "sha256:cfiddle-agent"
    assert references["cluster"] == f"{REGISTRY}/cfiddle-cluster@{DIGEST}"
    assert copied["c2"] == [BUILT["agent"]]


def test_registry_that_cannot_be_reached_is_replaced_by_ssh(engine: FakeEngine, copied: dict[str, list[str]]) -> None:
    engine.refusal = "dial tcp 192.0.2.1:5000: connect: connection refused"
    assert distribute(head(), worker("c1"))["agent"] == "sha256:cfiddle-agent"
    assert list(copied) == ["c1"]


def test_wrong_password_is_said_and_not_worked_around(engine: FakeEngine, copied: dict[str, list[str]]) -> None:
    engine.refusal = "unauthorized: authentication required"
    with pytest.raises(ClusterError, match="refuses the password of cfiddle"):
        distribute(head(), worker("c1"))
    assert copied == {}


def test_password_refused_to_a_worker_is_said(engine: FakeEngine, copied: dict[str, list[str]]) -> None:
    with pytest.raises(ClusterError, match="refuses the password of cfiddle"):
        distribute(head(), worker("c1", "Error response from daemon: no basic auth credentials"))
    assert copied == {}


def test_full_disk_is_said_with_the_machines_name(engine: FakeEngine, copied: dict[str, list[str]]) -> None:
    with pytest.raises(ClusterError, match="the disk of c1 is full"):
        distribute(head(), worker("c1", "write /var/lib/docker/tmp/x: no space left on device"))
    assert copied == {}
