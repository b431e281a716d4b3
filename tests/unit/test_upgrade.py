"""An upgrade: what is told to Swarm and to Slurm, in which order, and what is left of it when it fails."""

import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import samples
from cfiddle_cluster import stack, upgrade
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.slurm import Node
from cfiddle_cluster.state import State
from cfiddle_cluster.upgrade import Patience

OLD, NEW = {"Image": "old"}, {"Image": "new"}


class World:
    """A cluster that does what it is told: Swarm replaces containers on active members, unless they do not start."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.did: list[str] = []
        self.said: list[str] = []
        self.state = State(tmp_path)
        self.machines = [samples.machine("head", "head"), samples.machine("c1"), samples.machine("c2")]
        self.members = dict.fromkeys(("head", "c1", "c2"), "active")
        self.specs: dict[str, dict[str, str]] = dict.fromkeys(stack.SERVICES, OLD)
        self.running = {(name, service): OLD for name in ("c1", "c2") for service in stack.WORKER_SERVICES}
        self.nodes = {name: Node(name, "idle", is_answering=True) for name in ("c1", "c2")}
        self.changing = set(stack.SERVICES)
        self.broken: set[tuple[str, str]] = set()
        self.at: dict[str, Callable[[], None]] = {}
        self._monkeypatch = monkeypatch
        replace: Any = monkeypatch.setattr
        replace(stack, "values_of", lambda *_: {})
        replace(stack, "changed", lambda _values: {name for name in self.changing if self.specs.get(name) != NEW})
        replace(stack, "put", lambda _config, _state, _values, names: self._put(names, NEW))
        replace(stack, "stop_worker_services", lambda found: self._event(f"stop {found.name}"))
        replace(stack, "remove_unused", lambda _values: self._event("tidy"))
        replace(Machine, "engine_post", lambda _head, path, spec: self._engine_post(path, spec))
        replace(upgrade.services, "services", self._services)
        replace(upgrade.services, "stale_on", self._stale_on)
        replace(upgrade.services, "wait_until_healthy", self._wait_until_healthy)
        replace(upgrade.swarm, "nodes", self._members)
        replace(upgrade.swarm, "node_of", lambda found: {"ID": found.name} if found.name in self.members else None)
        replace(upgrade.swarm, "set_availability", self._set_availability)
        replace(upgrade.slurm, "nodes", lambda: self.nodes)
        replace(upgrade.slurm, "drain", self._drain)
        replace(upgrade.slurm, "resume", self._resume)
        replace(upgrade.slurm, "wait_until_empty", self._wait_until_empty)
        replace(upgrade.readiness, "wait_until_ready", lambda found: self._event(f"job on {found[0].name}"))
        tasks = [{"ID": "task", "CreatedAt": "2026", "Status": {"State": "failed", "Err": "exit status 1"}}]
        api = SimpleNamespace(tasks=lambda filters: tasks)
        replace(upgrade.engine, "client", lambda: SimpleNamespace(api=api))
        replace(upgrade, "run", lambda argv, **_: f"what {argv[-1]} said\n")

    def _event(self, what: str) -> None:
        self.did.append(what)
        self.at.pop(what, lambda: None)()

    def _put(self, names: Collection[str], spec: dict[str, str]) -> None:
        self.specs.update(dict.fromkeys(names, spec))
        self._event(f"{' '.join(names)} {spec['Image']}")
        for name in ("c1", "c2", "head"):
            self._reconcile(name)

    def _engine_post(self, path: str, spec: dict[str, str]) -> None:
        assert path.endswith("/update?version=7&registryAuthFrom=spec")
        self._put([path.split("/")[2]], spec)

    def _reconcile(self, name: str) -> None:
        for member, service in self.running:
            if member == name and self.members[name] == "active":
                self.running[member, service] = self.specs[service]

    def _services(self) -> list[Any]:
        def remove(name: str) -> None:
            del self.specs[name]
            self._event(f"remove {name}")

        return [
            SimpleNamespace(
                id=name,
                name=f"slurm-stack_{name}",
                attrs={"Spec": spec, "Version": {"Index": 7}},
                reload=lambda: None,
                remove=lambda name=name: remove(name),
            )
            for name, spec in self.specs.items()
        ]

    def _stale_on(self, name: str, services: Collection[str]) -> list[str]:
        found = [(self.running.get((name, service)), self.specs[service]) for service in services]
        return [spec["Image"] for runs, spec in found if runs != spec or (name, spec["Image"]) in self.broken]

    def _wait_until_healthy(self, service: str, *, timeout_s: float) -> None:
        if service in self.specs and (service, self.specs[service]["Image"]) in self.broken:
            raise ClusterError(f"{service} is not healthy within {timeout_s:.0f} s")

    def _members(self) -> dict[str, Any]:
        return {name: {"Spec": {"Availability": availability}} for name, availability in self.members.items()}

    def _set_availability(self, name: str, availability: str) -> None:
        self.members[name] = availability
        self._event(f"{availability} {name}")
        self._reconcile(name)

    def _drain(self, names: list[str], reason: str) -> None:
        for name in names:
            self.nodes[name] = Node(name, "drained", True, reason)
            self._event(f"drain {name}")

    def _resume(self, names: Collection[str]) -> None:
        for name in list(names):
            self.nodes[name] = Node(name, "idle", is_answering=True)
            self._event(f"resume {name}")

    def _wait_until_empty(self, names: list[str], *, timeout_s: float, say: Callable[[str], None]) -> None:
        say("7 (ada)")
        self._event(f"empty {names[0]}")

    def upgrade(self) -> list[str]:
        self.did.clear()
        config: Any = None
        upgrade.roll_out(config, self.state, self.machines, {}, Patience(60, 0), self.said.append)
        return self.did

    def images(self) -> set[str]:
        return {spec["Image"] for spec in itertools.chain(self.specs.values(), self.running.values())}

    def be_interrupted(self, what: str) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        self.at[what] = interrupt

    def be_late(self, what: str) -> None:
        def late() -> None:
            raise ClusterError("waited 60 s in vain: the jobs on c2 to end")

        self.at[what] = late


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def one(name: str) -> list[str]:
    return [f"drain {name}", f"empty {name}", f"stop {name}", f"active {name}", f"resume {name}", f"job on {name}"]


def is_clean(world: World) -> bool:
    """Tell whether nothing is left of an upgrade."""
    return (
        set(world.members.values()) == {"active"}
        and not any(node.is_drained for node in world.nodes.values())
        and not world.state.path(upgrade.RECORD).exists()
    )


def test_slurm_s_parts_go_in_their_order_and_workers_one_by_one_drained_first(world: World) -> None:
    assert world.upgrade() == [
        *("mysql new", "slurmdbd new", "slurmctld new"),
        *("pause c1", "pause c2", "slurmd agent new"),
        *one("c1"),
        *one("c2"),
        *("user-registry new", "userhost new"),
        "tidy",
    ]
    assert world.images() == {"new"}
    assert is_clean(world)
    assert "7 (ada)" in world.said


def test_second_time_there_is_nothing_to_do(world: World) -> None:
    world.upgrade()
    assert world.upgrade() == []
    assert world.said[-1].startswith("nothing to do")


def test_workers_are_left_alone_where_nothing_of_theirs_changes(world: World) -> None:
    world.changing = {"userhost"}
    assert world.upgrade() == ["userhost new", "tidy"]


def test_head_that_is_a_worker_is_never_paused_and_free_of_jobs_before_swarm_is_told(world: World) -> None:
    world.changing = set(stack.WORKER_SERVICES)
    world.machines = [samples.machine("head", "head", "worker"), samples.machine("c1")]
    world.nodes["head"] = Node("head", "idle", is_answering=True)
    world.running |= {("head", service): OLD for service in stack.WORKER_SERVICES}
    del world.running["c2", "slurmd"], world.running["c2", "agent"]
    assert world.upgrade() == [
        *("pause c1", "drain head", "empty head", "slurmd agent new", "resume head", "job on head"),
        *one("c1"),
        "tidy",
    ]
    assert {spec["Image"] for spec in world.running.values()} == {"new"}


def test_node_that_somebody_drained_stays_drained_also_when_it_comes_anew(world: World) -> None:
    world.nodes["c2"] = Node("c2", "drained", True, "kept for later")
    did = world.upgrade()
    assert [line for line in did if line.endswith(" c2")] == [
        "pause c2",
        "empty c2",
        "stop c2",
        "active c2",
    ]
    assert world.nodes["c2"].reason == "kept for later"

    world.specs["agent"] = world.running["c2", "agent"] = OLD
    world.changing = {"agent"}

    def come_anew() -> None:
        world.nodes["c2"] = Node("c2", "idle", is_answering=True)

    world.at["stop c2"] = come_anew
    world.upgrade()
    assert world.nodes["c2"] == Node("c2", "drained", True, "kept for later")


def test_worker_that_somebody_paused_is_left_as_it_is(world: World) -> None:
    world.members["c2"] = "pause"
    assert not [line for line in world.upgrade() if "c2" in line]
    assert world.members["c2"] == "pause"
    assert any("c2 is left alone" in line for line in world.said)


@pytest.mark.parametrize(
    "what", ["slurmctld new", "pause c2", "slurmd agent new", "empty c1", "stop c2", "active c2", "userhost new"]
)
def test_interrupted_upgrade_goes_on_and_drains_nothing_meanwhile(world: World, what: str) -> None:
    world.be_interrupted(what)
    with pytest.raises(KeyboardInterrupt):
        world.upgrade()
    assert not any(node.is_drained for node in world.nodes.values())
    assert upgrade.is_under_way(world.state)
    world.upgrade()
    assert world.images() == {"new"}
    assert is_clean(world)


def test_what_a_killed_upgrade_drained_takes_jobs_again(world: World) -> None:
    world.be_interrupted("active c2")
    with pytest.raises(KeyboardInterrupt):
        world.upgrade()
    world.nodes["c1"] = Node("c1", "drained", True, stack.DRAIN_REASON)
    world.upgrade()
    assert is_clean(world)


def test_jobs_that_do_not_end_in_time_go_on_and_so_does_the_upgrade_later(world: World) -> None:
    world.be_late("empty c2")
    with pytest.raises(ClusterError, match=r"c2 takes jobs again.*\n→ --drain-minutes"):
        world.upgrade()
    assert not any(node.is_drained for node in world.nodes.values())
    assert world.running["c2", "slurmd"] == OLD
    assert world.upgrade() == [*one("c2"), "user-registry new", "userhost new", "tidy"]
    assert is_clean(world)


def test_all_goes_back_drained_first_when_a_worker_does_not_come_up(world: World) -> None:
    world.broken = {("c2", "new")}
    with pytest.raises(ClusterError) as caught:
        world.upgrade()
    assert "c2 did not come up: waited 0 s in vain: slurmd and agent to be healthy on c2" in caught.value.message
    assert "exit status 1" in caught.value.message
    assert str(world.state.path(upgrade.LOG)) in caught.value.message
    assert "what task said" in world.state.path(upgrade.LOG).read_text()
    back = world.did[world.did.index("stop c2") + 2 :]
    assert back == [
        *("pause c1", "pause c2", "slurmd old", "agent old"),
        *one("c1"),
        *one("c2"),
        *("slurmctld old", "slurmdbd old", "mysql old"),
    ]
    assert world.images() == {"old"}
    assert is_clean(world)


def test_all_goes_back_when_a_service_of_the_head_does_not_come_up(world: World) -> None:
    world.broken = {("userhost", "new")}
    with pytest.raises(ClusterError, match=r"userhost did not come up: userhost is not healthy"):
        world.upgrade()
    assert world.images() == {"old"}
    assert is_clean(world)


def test_service_that_was_not_there_before_goes_again(world: World) -> None:
    del world.specs["user-registry"]
    world.broken = {("userhost", "new")}
    with pytest.raises(ClusterError, match="userhost did not come up"):
        world.upgrade()
    assert "user-registry" not in world.specs


def test_where_the_way_back_fails_too_both_are_said_and_it_goes_on_from_there(world: World) -> None:
    world.broken = {("c2", "new"), ("c2", "old")}
    with pytest.raises(ClusterError, match=r"(?s)c2 did not come up.*not all went back: c2 did not come up"):
        world.upgrade()
    assert upgrade.is_under_way(world.state)
    assert world.nodes["c2"].is_drained, "it shall take no jobs"
    world.broken = set()
    world.upgrade()
    assert world.images() == {"new"}
    assert is_clean(world)


def test_record_of_a_cluster_that_is_no_more_is_of_no_use(world: World) -> None:
    world.state.write_json(upgrade.RECORD, {"services": {"another": {}}, "paused": ["gone"]})
    assert not upgrade.is_under_way(world.state)
    upgrade.forget(world.state)
    assert world.did == []
    assert not world.state.path(upgrade.RECORD).exists()
