"""Simulated machines: their CPUs, rights, names and addresses, and what is made anew when."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from docker.errors import APIError

from cfiddle_cluster import simulated
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import State
from samples import config

KEY = "ssh-ed25519 AAAA root@c1\n"


class FakeContainer:
    """A simulated machine as the engine tells of it."""

    def __init__(self, engine: "FakeEngine", machine: str, status: str = "running", **settings: Any) -> None:
        self.name = f"cfiddle-machine-{machine}"
        self.labels = {"cfiddle.machine": machine}
        self.status = status
        self.settings = settings
        mounts = [{"Destination": mount["Target"]} for mount in settings.get("mounts", ())]
        health = {"Health": {"Status": "healthy"}}
        self.attrs: dict[str, Any] = {"HostConfig": {"CpusetCpus": ""}, "Mounts": mounts, "State": health}
        self.attrs["Config"] = {"Image": settings.get("image")}
        self.commands: list[list[str]] = []
        self._engine = engine

    def start(self) -> None:
        self.status = "running"

    def update(self, *, cpuset_cpus: str) -> None:
        self.attrs["HostConfig"]["CpusetCpus"] = cpuset_cpus

    def exec_run(self, argv: list[str]) -> tuple[int, bytes]:
        self.commands.append(argv)
        return 0, KEY.encode()

    def logs(self, tail: int) -> bytes:
        return b"machine: cannot mount"

    def remove(self, force: bool) -> None:
        assert force
        self._engine.machines.remove(self)


class FakeEngine:
    """An engine with containers, volumes and networks, and nothing in them."""

    def __init__(self) -> None:
        self.machines: list[FakeContainer] = []
        self.made_volumes: dict[str, dict[str, str]] = {}
        self.made_networks: dict[str, Any] = {}
        self.network_error = ""
        self.api = SimpleNamespace(_version="1.41")
        self.containers = SimpleNamespace(
            list=lambda all, ignore_removed, filters: list(self.machines), create=self._create, get=self._get
        )
        self.volumes = SimpleNamespace(create=self._create_volume, list=self._volumes)
        self.networks = SimpleNamespace(create=self._create_network, list=self._networks)

    def add(self, *names: str, **settings: Any) -> None:
        self.machines += [FakeContainer(self, name, **settings) for name in names]

    def _create(self, image: str, **settings: Any) -> FakeContainer:
        made = FakeContainer(self, settings["labels"]["cfiddle.machine"], "created", image=image, **settings)
        self.machines.append(made)
        return made

    def _get(self, name: str) -> FakeContainer:
        return next(found for found in self.machines if found.name == name)

    def _create_volume(self, name: str, labels: dict[str, str]) -> None:
        self.made_volumes[name] = labels

    def _volumes(self, filters: dict[str, str]) -> list[Any]:
        label, _, value = filters["label"].partition("=")
        return [
            SimpleNamespace(remove=lambda name=name: self.made_volumes.pop(name))
            for name, labels in self.made_volumes.items()
            if label in labels and value in ("", labels[label])
        ]

    def _create_network(self, name: str, **settings: Any) -> None:
        if self.network_error:
            raise APIError(self.network_error, explanation=self.network_error)
        self.made_networks[name] = settings

    def _networks(self, names: list[str]) -> list[Any]:
        return [
            SimpleNamespace(remove=lambda name=name: self.made_networks.pop(name))
            for name in self.made_networks
            if names == [f"^{name}$"]
        ]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(simulated.engine, "client", lambda: fake)
    monkeypatch.setattr(simulated.os, "sched_getaffinity", lambda _pid: set(range(5)))
    return fake


@pytest.fixture
def state(tmp_path: Path) -> State:
    found = State(tmp_path / "state")
    found.path("ssh").mkdir(parents=True)
    found.path("ssh/id_ed25519.pub").write_text("ssh-ed25519 BBBB cfiddle-cluster\n")
    return found


def _ensure(state: State, *names: str, **settings: str) -> list[Any]:
    return simulated.ensure_machines(config(state.directory, **settings), state, names, "cfiddle-machine:1")


# --- CPUs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machines", "cpus", "sets"),
    [
        (2, [0, 1, 2], ["1", "2"]),
        (2, list(range(8)), ["1,2,3", "4,5,6"]),
        (1, [4, 6], ["6"]),
        (2, [0, 1], ["", ""]),
        (3, [0], ["", "", ""]),
    ],
)
def test_every_machine_has_cpus_of_its_own_where_there_are_enough(
    machines: int, cpus: list[int], sets: list[str]
) -> None:
    assert simulated.cpu_sets(machines, cpus) == sets


def test_no_cpu_is_given_to_two_machines_and_the_head_keeps_one() -> None:
    for machines, cpus in itertools.product(range(1, 9), range(1, 40)):
        sets = [found.split(",") for found in simulated.cpu_sets(machines, list(range(cpus)))]
        given = [cpu for one in sets for cpu in one if cpu]
        assert len(given) == len(set(given))
        assert "0" not in given
        assert len({len(one) for one in sets}) == 1


# --- rights ----------------------------------------------------------------------------------------------------------


def test_capabilities_are_those_of_the_bounding_set() -> None:
    assert simulated.capabilities("Name:\tx\nCapBnd:\t0000000000000001\n") == ["CHOWN"]
    # include/uapi/linux/capability.h: CAP_NET_ADMIN is 12, CAP_SYS_ADMIN 21, CAP_SYS_RESOURCE 24, CAP_AUDIT_READ 37.
    bits = 1 << 12 | 1 << 21 | 1 << 24 | 1 << 37
    found = simulated.capabilities(f"CapEff:\t0000000000000000\nCapBnd:\t{bits:016x}\n")
    assert found == ["NET_ADMIN", "SYS_ADMIN", "SYS_RESOURCE", "AUDIT_READ"]


def test_capabilities_that_old_engines_do_not_know_are_left_out() -> None:
    every = simulated.capabilities(f"CapBnd:\t{(1 << 41) - 1:016x}\n")
    assert len(every) == 38
    assert not {"PERFMON", "BPF", "CHECKPOINT_RESTORE"} & set(every)


def test_this_process_has_capabilities() -> None:
    assert "CHOWN" in simulated.capabilities(Path("/proc/self/status").read_text())


# --- making ----------------------------------------------------------------------------------------------------------


def test_machine_is_made_with_what_it_needs_and_never_privileged(engine: FakeEngine, state: State) -> None:
    (found,) = _ensure(state, "c1")
    assert (found.name, found.addr, found.simulated) == ("c1", "172.31.240.11", True)
    (made,) = engine.machines
    assert made.status == "running"
    assert made.settings["hostname"] == "c1"
    assert made.settings["image"] == "cfiddle-machine:1"
    assert made.settings["labels"] == {"cfiddle.cluster": "cfiddle", "cfiddle.machine": "c1"}
    assert made.settings["restart_policy"] == {"Name": "unless-stopped"}
    assert not made.settings.get("privileged")
    assert engine.made_volumes == {"cfiddle-machine-c1": made.settings["labels"]}
    network = engine.made_networks["cfiddle-machines"]
    assert network["labels"] == {"cfiddle.cluster": "cfiddle"}
    assert len(network["options"]["com.docker.network.bridge.name"]) <= 15
    targets = {mount["Target"]: mount for mount in made.settings["mounts"]}
    assert targets["/srv/cfiddle-cluster/home"]["Source"] == "/srv/cfiddle-cluster/home"
    assert targets["/etc/ssh/authorized_keys"]["ReadOnly"]
    assert not [mount for mount in targets if "docker.sock" in mount]


def test_machines_that_are_there_stay_as_they_are(engine: FakeEngine, state: State) -> None:
    _ensure(state, "c1", "c2")
    before = list(engine.machines)
    _ensure(state, "c1", "c2")
    assert engine.machines == before


def test_machine_of_an_earlier_image_goes_on_and_that_is_said(engine: FakeEngine, state: State) -> None:
    said: list[str] = []
    _ensure(state, "c1", "c2")
    before = list(engine.machines)
    simulated.ensure_machines(config(state.directory), state, ["c1", "c2", "c3"], "cfiddle-machine:2", said.append)
    assert engine.machines[:2] == before
    assert said == ["c1, c2: of an earlier image; ./invoke down, then ./invoke up, makes them anew"]
    simulated.ensure_machines(config(state.directory), state, ["c3"], "cfiddle-machine:2", said.append)
    assert len(said) == 1


def test_stopped_machine_is_started_and_not_made_anew(engine: FakeEngine, state: State) -> None:
    _ensure(state, "c1")
    (made,) = engine.machines
    made.status = "exited"
    _ensure(state, "c1")
    assert engine.machines == [made]
    assert made.status == "running"


def test_cpus_are_shared_out_anew_when_machines_are_added(engine: FakeEngine, state: State) -> None:
    _ensure(state, "c1")
    assert [found.attrs["HostConfig"]["CpusetCpus"] for found in engine.machines] == ["1,2,3,4"]
    _ensure(state, "c1", "c2")
    assert [found.attrs["HostConfig"]["CpusetCpus"] for found in engine.machines] == ["1,2", "3,4"]


def test_machine_with_other_homes_is_made_anew_and_keeps_its_volume(engine: FakeEngine, state: State) -> None:
    _ensure(state, "c1")
    before = engine.machines[0]
    _ensure(state, "c1", HOME_ROOT="/srv/elsewhere")
    assert engine.machines != [before]
    assert "cfiddle-machine-c1" in engine.made_volumes


def test_machine_that_ended_is_told_with_its_last_words(
    engine: FakeEngine, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeContainer, "start", lambda found: setattr(found, "status", "exited"))
    with pytest.raises(ClusterError, match="c1 ended:\nmachine: cannot mount") as caught:
        _ensure(state, "c1")
    assert "docker rm --force cfiddle-machine-c1" in caught.value.remedy


def test_addresses_that_somebody_else_has_are_told(engine: FakeEngine, state: State) -> None:
    engine.network_error = "Pool overlaps with other one on this address space"
    with pytest.raises(ClusterError, match=r"172\.31\.240\.0/24, cannot be made: Pool overlaps"):
        _ensure(state, "c1")
    assert engine.machines == []


def test_host_keys_come_from_the_engine_and_other_machines_keys_stay(engine: FakeEngine, state: State) -> None:
    state.path("ssh/known_hosts").write_text("10.0.0.9 ssh-ed25519 CCCC\n172.31.240.11 ssh-ed25519 OLD\n")
    _ensure(state, "c1", "c2")
    assert state.path("ssh/known_hosts").read_text().splitlines() == [
        "10.0.0.9 ssh-ed25519 CCCC",
        "172.31.240.11 ssh-ed25519 AAAA",
        "172.31.240.12 ssh-ed25519 AAAA",
    ]


# --- counting and taking away ----------------------------------------------------------------------------------------


def test_machines_are_counted_by_their_numbers(engine: FakeEngine, state: State) -> None:
    engine.add("c10", "c2")
    engine.add("c1", status="exited")
    assert simulated.existing() == ["c1", "c2", "c10"]
    assert [found.addr for found in simulated.workers(state)] == ["172.31.240.11", "172.31.240.12", "172.31.240.20"]


def test_one_machine_goes_with_its_volume_and_no_other(engine: FakeEngine, state: State) -> None:
    _ensure(state, "c1", "c2")
    simulated.remove_machine("c2")
    assert simulated.existing() == ["c1"]
    assert list(engine.made_volumes) == ["cfiddle-machine-c1"]
    simulated.remove_machine("c2")


def test_all_machines_go_and_their_volumes_only_with_purge(engine: FakeEngine, state: State) -> None:
    _ensure(state, "c1", "c2")
    simulated.remove_all(purge=False)
    assert engine.machines == []
    assert engine.made_networks == {}
    assert len(engine.made_volumes) == 2
    simulated.remove_all(purge=True)
    assert engine.made_volumes == {}


def test_running_machine_leaves_the_swarm_before_it_goes(engine: FakeEngine) -> None:
    engine.add("c1")
    engine.add("c2", status="exited")
    running, stopped = engine.machines
    simulated.remove_all(purge=False)
    assert running.commands[0][3:5] == ["swarm", "leave"]
    assert stopped.commands == []
