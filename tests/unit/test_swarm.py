"""Who joins the swarm, who sees the token, whose labels change, and what is refused before anything is done."""

from types import SimpleNamespace
from typing import Any

import pytest
from docker.errors import APIError

from cfiddle_cluster import swarm
from cfiddle_cluster.config import Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import State
from samples import config, machine

TOKEN = "SWMTKN-1-secret"
NUMBERS = {"head.lab": "10.0.0.1", "addr-lab": "10.0.0.7", "self": "127.0.1.1"}
"""What names stand for."""


class Member:
    """A machine with an engine that knows whether it is in a swarm."""

    def __init__(self, engine: "FakeEngine", name: str, *, node: str = "", simulated: bool = True) -> None:
        self.name, self.addr, self.simulated = name, f"addr-{name}", simulated
        self.roles = frozenset({"worker"})
        self.info: dict[str, Any] = {"SecurityOptions": ["name=seccomp"]}
        self.node, self.state_ = node, "inactive"
        self.did: list[tuple[str, Any]] = []
        self.refusal = ""
        self.is_manager = False
        self._engine = engine

    def engine_get(self, path: str) -> dict[str, Any]:
        assert path == "/info"
        state = "active" if self.node else self.state_
        return self.info | {
            "Swarm": {"LocalNodeState": state, "NodeID": self.node, "ControlAvailable": self.is_manager}
        }

    def engine_post(self, path: str, body: Any = None, timeout_s: float = 0) -> None:
        self.did.append((path, body))
        if self.refusal and path == "/swarm/join":
            self.state_ = "error"
            raise ClusterError(self.refusal)
        if path == "/swarm/join":
            if self.state_ != "inactive" or self.node:
                raise ClusterError("This node is already part of a swarm")
            self.node = f"node-{self.name}"
            self._engine.add_node(self.name, self.node)
        else:
            self.node, self.state_ = "", "inactive"


class FakeEngine:
    """The head's engine: a swarm's members, their labels, and its tokens."""

    def __init__(self) -> None:
        self.api = self.swarm = self
        self.bridges: list[str] = []
        self.networks = SimpleNamespace(list=self._networks)
        self.is_manager = True
        self.address = "10.0.0.1"
        self.local_state, self.node = "active", "head-1"
        self.options: dict[str, Any] = {}
        self.members: list[dict[str, Any]] = []
        self.rotated: list[str] = []
        self.heartbeat_ns = 5 * 10**9
        self.left = False
        self.init_error = ""
        self.updates: list[str] = []

    def add_node(self, name: str, node_id: str, state: str = "ready", **labels: str) -> None:
        self.members.append(
            {
                "ID": node_id,
                "CreatedAt": str(len(self.members)),
                "Version": {"Index": 1},
                "Spec": {"Role": "worker", "Availability": "active", "Labels": dict(labels)},
                "Status": {"State": state, "Addr": f"addr-{name}"},
                "Description": {"Hostname": name},
            }
        )

    def info(self) -> dict[str, Any]:
        swarm = {"ControlAvailable": self.is_manager, "LocalNodeState": self.local_state, "NodeID": self.node}
        swarm["NodeAddr"] = self.address
        return self.options | {"Swarm": swarm}

    def init(self, **addresses: str) -> None:
        assert self.local_state == "inactive"
        if self.init_error:
            raise APIError(self.init_error, explanation=self.init_error)
        self.addresses, self.is_manager = addresses, True

    def leave(self, force: bool) -> None:
        self.left, self.is_manager, self.local_state, self.node = force, False, "inactive", ""

    def _networks(self, names: list[str]) -> list[Any]:
        assert names == ["^docker_gwbridge$"]
        return [SimpleNamespace(remove=lambda name=name: self.bridges.remove(name)) for name in self.bridges]

    def nodes(self) -> list[dict[str, Any]]:
        return self.members

    def inspect_swarm(self) -> dict[str, Any]:
        if not self.is_manager:
            raise APIError("This node is not a swarm manager", response=SimpleNamespace(status_code=503))
        spec = {"Name": "default", "Dispatcher": {"HeartbeatPeriod": self.heartbeat_ns}}
        return {"ID": "swarm-1", "JoinTokens": {"Worker": TOKEN}, "Version": {"Index": 7}, "Spec": spec}

    def update_swarm(self, version: int, swarm_spec: Any, rotate_worker_token: bool = False) -> None:
        assert version == 7
        self.heartbeat_ns = swarm_spec["Dispatcher"]["HeartbeatPeriod"]
        if rotate_worker_token:
            self.rotated.append(swarm_spec["Name"])

    def update_node(self, node_id: str, _version: int, spec: Any) -> None:
        self.updates.append(node_id)
        next(node for node in self.members if node["ID"] == node_id)["Spec"] = spec

    def remove_node(self, node_id: str, force: bool) -> None:
        assert force
        self.members = [node for node in self.members if node["ID"] != node_id]

    def labels(self, name: str) -> dict[str, str]:
        return next(dict(node["Spec"]["Labels"]) for node in self.members if node["Description"]["Hostname"] == name)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(swarm.engine, "client", lambda: fake)
    monkeypatch.setattr(swarm, "JOIN_TIMEOUT_S", 1)
    monkeypatch.setattr(swarm, "resolved", lambda addr: NUMBERS.get(addr, addr))
    return fake


@pytest.fixture
def settings(tmp_path: Any) -> Config:
    return config(tmp_path)


@pytest.fixture
def state(tmp_path: Any) -> State:
    return State(tmp_path)


# --- the head --------------------------------------------------------------------------------------------------------


def test_swarm_is_made_at_the_head_s_address_and_remembered(engine: FakeEngine, settings: Config, state: State) -> None:
    engine.leave(force=False)
    swarm.ensure_swarm(settings, state)
    assert engine.addresses == {"advertise_addr": "10.0.0.1", "listen_addr": "0.0.0.0:2377"}
    assert state.read_json(swarm.MADE_BY_US, None) == {"id": "swarm-1", "had_bridge": False}
    engine.bridges.append("docker_gwbridge")
    swarm.leave(state)
    assert engine.left
    assert engine.bridges == []
    assert not state.path(swarm.MADE_BY_US).exists()


def test_swarm_of_a_head_that_has_a_name_is_made_at_its_address(engine: FakeEngine, state: State) -> None:
    engine.leave(force=False)
    swarm.ensure_swarm(config(state.directory, HEAD_ADDR="head.lab"), state)
    assert engine.addresses["advertise_addr"] == "10.0.0.1"


def test_name_that_only_this_machine_reaches_itself_by_is_refused(engine: FakeEngine, state: State) -> None:
    """Debian has its own name at 127.0.1.1 in /etc/hosts."""
    engine.leave(force=False)
    with pytest.raises(ClusterError, match=r"HEAD_ADDR is self, which is 127\.0\.1\.1 on this machine"):
        swarm.ensure_swarm(config(state.directory, HEAD_ADDR="self"), state)
    assert not engine.is_manager
    swarm.ensure_swarm(config(state.directory, HEAD_ADDR="127.0.0.1"), state)
    assert engine.is_manager


@pytest.mark.parametrize("patience", [1, 12])
def test_members_of_a_swarm_of_ours_are_missed_after_more_than_half_a_minute(
    engine: FakeEngine, settings: Config, state: State, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    monkeypatch.setattr(swarm, "PATIENCE", patience)
    swarm.ensure_swarm(settings, state)
    assert engine.heartbeat_ns == 5 * 10**9, "somebody else's swarm stays as it is"
    engine.leave(force=False)
    swarm.ensure_swarm(settings, state)
    assert 3 * engine.heartbeat_ns > 30 * 10**9 * patience
    engine.heartbeat_ns = 5 * 10**9
    swarm.ensure_swarm(settings, state)
    assert engine.heartbeat_ns == 15 * 10**9 * patience, "also one that was made before"


def test_bridge_that_was_there_before_the_swarm_stays(engine: FakeEngine, settings: Config, state: State) -> None:
    engine.leave(force=False)
    engine.bridges.append("docker_gwbridge")
    swarm.ensure_swarm(settings, state)
    swarm.leave(state)
    assert engine.left
    assert engine.bridges == ["docker_gwbridge"]


def test_swarm_that_was_there_before_is_used_and_not_left(engine: FakeEngine, settings: Config, state: State) -> None:
    engine.add_node(
        "c1", "1", slurm_worker="true", slurm_role="worker", theirs="kept", **{"cfiddle.cluster": "cfiddle"}
    )
    engine.add_node("other", "2", slurm_head="theirs")
    swarm.ensure_swarm(settings, state)
    swarm.leave(state)
    assert not engine.left
    assert engine.labels("c1") == {"theirs": "kept"}
    assert engine.labels("other") == {"slurm_head": "theirs"}


def test_head_that_is_somebody_else_s_worker_is_refused(engine: FakeEngine, settings: Config, state: State) -> None:
    engine.is_manager = False
    with pytest.raises(ClusterError, match="a swarm that it does not manage") as caught:
        swarm.ensure_swarm(settings, state)
    assert "docker swarm leave" in caught.value.remedy


def test_address_that_the_head_has_not_is_told(engine: FakeEngine, settings: Config, state: State) -> None:
    engine.leave(force=False)
    engine.init_error = "must specify a listening address that exists"
    with pytest.raises(ClusterError, match=r"cannot be made at 10\.0\.0\.1: must specify") as caught:
        swarm.ensure_swarm(settings, state)
    assert "HEAD_ADDR" in caught.value.remedy
    assert not state.path(swarm.MADE_BY_US).exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"LiveRestoreEnabled": True}, "live-restore"),
        ({"SecurityOptions": ["name=seccomp,profile=default", "name=userns"]}, "userns-remap"),
        ({"SecurityOptions": ["name=rootless"]}, "rootless"),
    ],
)
def test_engine_that_the_cluster_cannot_be_with_is_refused(
    engine: FakeEngine, settings: Config, state: State, options: dict[str, Any], what: str
) -> None:
    worker = Member(engine, "c1")
    worker.info = options
    with pytest.raises(ClusterError, match=f"c1: .*{what}") as caught:
        swarm.ensure_joined(settings, state, [worker])  # type: ignore[list-item]
    assert caught.value.remedy
    assert worker.did == []
    engine.options = options
    with pytest.raises(ClusterError, match=f"this machine: .*{what}"):
        swarm.ensure_swarm(settings, state)


def test_ordinary_engine_has_no_fault() -> None:
    assert (
        swarm.engine_faults({"SecurityOptions": ["name=apparmor", "name=seccomp,profile=default", "name=cgroupns"]})
        == []
    )
    assert swarm.engine_faults({"SecurityOptions": None, "LiveRestoreEnabled": False}) == []


# --- joining ---------------------------------------------------------------------------------------------------------


def _join(settings: Config, state: State, *members: Member) -> None:
    swarm.ensure_joined(settings, state, members)  # type: ignore[arg-type]


def test_machines_join_with_a_token_that_is_worth_nothing_afterwards(
    engine: FakeEngine, settings: Config, state: State
) -> None:
    members = [Member(engine, "c1"), Member(engine, "c2")]
    _join(settings, state, *members)
    for member in members:
        ((path, body),) = member.did
        assert path == "/swarm/join"
        assert body == {
            "ListenAddr": "0.0.0.0:2377",
            "AdvertiseAddr": member.addr,
            "RemoteAddrs": ["10.0.0.1:2377"],
            "JoinToken": TOKEN,
        }
    assert engine.rotated == ["default"]


def test_machines_that_have_names_join_by_their_addresses(engine: FakeEngine, state: State) -> None:
    member = Member(engine, "lab")
    _join(config(state.directory, HEAD_ADDR="head.lab"), state, member)
    ((_path, body),) = member.did
    assert (body["AdvertiseAddr"], body["RemoteAddrs"]) == ("10.0.0.7", ["10.0.0.1:2377"])


def test_member_joins_no_second_time_and_no_token_is_rotated(
    engine: FakeEngine, settings: Config, state: State
) -> None:
    member = Member(engine, "c1")
    _join(settings, state, member)
    _join(settings, state, member)
    assert len(member.did) == 1
    assert len(engine.rotated) == 1


def test_token_is_rotated_and_shown_to_nobody_when_a_join_fails(
    engine: FakeEngine, settings: Config, state: State
) -> None:
    member = Member(engine, "c1")
    member.refusal = f"the engine of c1 refuses: {TOKEN} is not a valid token"
    with pytest.raises(ClusterError, match="c1 cannot join the swarm at") as caught:
        _join(settings, state, member)
    assert TOKEN not in str(caught.value)
    assert TOKEN not in str(caught.value.__cause__)
    assert engine.rotated
    assert "HEAD_ADDR" in caught.value.remedy


@pytest.mark.parametrize("simulated", [False, True])
def test_machine_of_another_swarm_is_refused(
    engine: FakeEngine, settings: Config, state: State, simulated: bool
) -> None:
    """A simulated machine of ours was never a manager, so one that is has been put into another swarm on purpose."""
    member = Member(engine, "c1", node="elsewhere", simulated=simulated)
    member.is_manager = simulated
    with pytest.raises(ClusterError, match=r"c1 \(addr-c1\) belongs to another swarm"):
        _join(settings, state, member)
    assert member.did == []


def test_simulated_machine_leaves_a_swarm_of_ours_that_is_no_more(
    engine: FakeEngine, settings: Config, state: State
) -> None:
    member = Member(engine, "c1", node="gone")
    _join(settings, state, member)
    assert [path for path, _body in member.did] == ["/swarm/leave?force=true", "/swarm/join"]


@pytest.mark.parametrize("simulated", [False, True])
def test_failed_join_is_not_gone_on_with(engine: FakeEngine, settings: Config, state: State, simulated: bool) -> None:
    member = Member(engine, "c1", simulated=simulated)
    member.refusal = "Timeout was reached. The attempt to join the swarm will continue in the background."
    with pytest.raises(ClusterError, match="cannot join"):
        _join(settings, state, member)
    assert member.did[-1] == ("/swarm/leave?force=true", None)
    assert member.state_ == "inactive"


def test_machine_whose_attempt_to_join_failed_once_joins(engine: FakeEngine, settings: Config, state: State) -> None:
    member = Member(engine, "c1", simulated=False)
    member.state_ = "error"
    _join(settings, state, member)
    assert member.node == "node-c1"


def test_swarm_that_nobody_can_join_does_not_stay(engine: FakeEngine, settings: Config, state: State) -> None:
    """It was made at a wrong HEAD_ADDR; the next `up` makes it at the right one."""
    engine.leave(force=False)
    swarm.ensure_swarm(settings, state)
    engine.add_node("head", "head-1")
    member = Member(engine, "c1")
    member.refusal = "Timeout was reached"
    with pytest.raises(ClusterError):
        _join(settings, state, member)
    assert engine.left
    assert not engine.rotated
    assert not state.path(swarm.MADE_BY_US).exists()


def test_swarm_of_somebody_else_stays_when_nobody_can_join(engine: FakeEngine, settings: Config, state: State) -> None:
    engine.add_node("head", "head-1")
    member = Member(engine, "c1")
    member.refusal = "Timeout was reached"
    with pytest.raises(ClusterError):
        _join(settings, state, member)
    assert not engine.left
    assert engine.rotated


def test_real_machine_of_a_swarm_of_ours_that_is_no_more_joins_the_new_one(
    engine: FakeEngine, settings: Config, state: State
) -> None:
    member = Member(engine, "c1", simulated=False)
    _join(settings, state, member)
    engine.members.clear()
    _join(settings, state, member)
    assert [path for path, _body in member.did] == ["/swarm/join", "/swarm/leave?force=true", "/swarm/join"]


def test_machine_leaves_only_a_swarm_that_we_let_it_join(engine: FakeEngine, settings: Config, state: State) -> None:
    ours, theirs = Member(engine, "c1", simulated=False), Member(engine, "c2", node="2", simulated=False)
    engine.add_node("c2", "2")
    _join(settings, state, ours, theirs)
    swarm.release(state, ours)  # type: ignore[arg-type]
    swarm.release(state, theirs)  # type: ignore[arg-type]
    assert (ours.node, theirs.node) == ("", "2")
    swarm.remove_node(state, "c2", theirs)  # type: ignore[arg-type]
    assert [node["Description"]["Hostname"] for node in engine.members] == ["c2", "c1"]
    swarm.remove_node(state, "c1", ours)  # type: ignore[arg-type]
    assert [node["Description"]["Hostname"] for node in engine.members] == ["c2"]


def test_former_self_of_a_machine_is_forgotten_and_a_lost_machine_is_not(
    engine: FakeEngine, settings: Config, state: State
) -> None:
    engine.add_node("c1", "old", "down")
    engine.add_node("c9", "lost", "down")
    _join(settings, state, Member(engine, "c1"))
    assert [node["ID"] for node in engine.members] == ["lost", "node-c1"]


def test_machine_that_does_not_become_ready_is_named(engine: FakeEngine, settings: Config, state: State) -> None:
    engine.add_node("c1", "node-c1", "down")
    engine.add_node("c2", "node-c2")
    with pytest.raises(ClusterError, match=": c1 to be ready in the swarm") as caught:
        _join(settings, state, Member(engine, "c2", node="node-c2"), Member(engine, "c1", node="node-c1"))
    assert "2377, 7946 and 4789" in caught.value.remedy


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c1", "worker-12", "A", "7of9", "a" * 63])
def test_ordinary_name_is_a_node_s(name: str) -> None:
    assert swarm.name_faults([(name, "10.0.0.2")]) == []


@pytest.mark.parametrize(
    "name", ["", "c_1", "c[1]", "-c", "c-", "a" * 64, "c1.example.org", "c 1", "slurmctld", "localhost"]
)
def test_name_that_cannot_be_a_node_s_is_refused(engine: FakeEngine, settings: Config, state: State, name: str) -> None:
    member = Member(engine, name)
    with pytest.raises(ClusterError, match="cannot be a node's") as caught:
        _join(settings, state, member)
    assert "hostnamectl" in caught.value.remedy
    assert member.did == []


def test_two_machines_of_one_name_are_refused_the_head_among_them(
    engine: FakeEngine, settings: Config, state: State
) -> None:
    member = Member(engine, "lab")
    with pytest.raises(ClusterError, match="addr-head and addr-lab are both named lab"):
        swarm.ensure_joined(settings, state, [machine("lab", "head", addr="addr-head"), member])  # type: ignore[list-item]
    assert member.did == []


# --- labels, and leaving ---------------------------------------------------------------------------------------------


def test_labels_say_roles_to_people_and_to_services(engine: FakeEngine) -> None:
    for name in ("head", "c1"):
        engine.add_node(name, f"id-{name}", theirs="kept")
    swarm.ensure_labels(machine("head", "head"), [machine("c1")])
    common = {"theirs": "kept", "cfiddle.cluster": "cfiddle"}
    assert engine.labels("head") == common | {"slurm_role": "head_node", "slurm_head": "true"}
    assert engine.labels("c1") == common | {"slurm_role": "worker", "slurm_worker": "true"}
    assert swarm.worker_names() == ["c1"]
    engine.updates.clear()
    swarm.ensure_labels(machine("head", "head"), [machine("c1")])
    assert engine.updates == []


def test_head_that_is_a_worker_too_has_both_labels(engine: FakeEngine) -> None:
    engine.add_node("head", "1")
    swarm.ensure_labels(machine("head", "head", "worker"), [])
    assert {"slurm_head", "slurm_worker"} <= set(engine.labels("head"))


def test_machine_that_is_a_worker_no_longer_loses_the_label(engine: FakeEngine) -> None:
    engine.add_node("head", "1", slurm_worker="true", slurm_head="true")
    swarm.ensure_labels(machine("head", "head"), [])
    assert "slurm_worker" not in engine.labels("head")


def test_machine_outside_the_swarm_gets_no_label(engine: FakeEngine) -> None:
    with pytest.raises(ClusterError, match="c1 is not in the swarm"):
        swarm.ensure_labels(machine("c1", "head"), [])


def test_unlabelled_worker_keeps_what_else_it_has(engine: FakeEngine) -> None:
    engine.add_node("c1", "1", slurm_worker="true", theirs="kept")
    swarm.unlabel_worker("c1")
    assert engine.labels("c1") == {"theirs": "kept"}
    swarm.unlabel_worker("nobody")


def test_worker_whose_removal_was_interrupted_is_known(engine: FakeEngine) -> None:
    engine.add_node("head-1", "1")
    engine.add_node("c1", "2")
    swarm.ensure_labels(machine("head-1", "head"), [machine("c1")])
    assert swarm.former_worker_names() == []
    swarm.unlabel_worker("c1")
    assert swarm.worker_names() == []
    assert swarm.former_worker_names() == ["c1"]


def test_member_is_ready_unless_swarm_has_lost_it(engine: FakeEngine) -> None:
    engine.add_node("c1", "1")
    engine.add_node("c2", "2", "down")
    assert swarm.is_ready("c1")
    assert not swarm.is_ready("c2")
    assert not swarm.is_ready("nobody")


def test_paused_worker_that_shall_go_is_swarm_s_to_clear_again(engine: FakeEngine) -> None:
    engine.add_node("c1", "1", slurm_worker="true")
    swarm.set_availability("1", "pause")
    assert engine.members[0]["Spec"]["Availability"] == "pause"
    assert engine.labels("c1") == {"slurm_worker": "true"}
    swarm.unlabel_worker("c1")
    assert engine.members[0]["Spec"]["Availability"] == "active"
    assert engine.labels("c1") == {}


def test_member_of_whom_swarm_has_noted_something_meanwhile_is_changed_all_the_same(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.add_node("c1", "1")
    update_node, refusals = engine.update_node, ["update out of sequence"]

    def update(node_id: str, version: int, spec: Any) -> None:
        if refusals:
            raise APIError("refused", explanation=refusals.pop())
        update_node(node_id, version, spec)

    monkeypatch.setattr(engine, "update_node", update)
    swarm.set_availability("1", "pause")
    assert engine.members[0]["Spec"]["Availability"] == "pause"
    refusals.append("no such node")
    with pytest.raises(APIError, match="no such node"):
        swarm.set_availability("1", "active")


def test_lost_machine_is_forgotten_without_being_asked(engine: FakeEngine, state: State) -> None:
    engine.add_node("c1", "1", "down")
    assert swarm.address_of("c1") == "addr-c1"
    swarm.remove_node(state, "c1")
    assert engine.members == []
    assert swarm.address_of("c1") == ""


def test_machine_that_answers_leaves_before_it_is_forgotten(engine: FakeEngine, state: State) -> None:
    member = Member(engine, "c1", node="1")
    engine.add_node("c1", "1")
    swarm.remove_node(state, "c1", member)  # type: ignore[arg-type]
    assert member.did == [("/swarm/leave?force=true", None)]
    assert engine.members == []


def test_swarm_made_by_somebody_since_is_not_left(engine: FakeEngine, state: State) -> None:
    state.write_json(swarm.MADE_BY_US, {"id": "swarm-0"})
    swarm.leave(state)
    assert not engine.left


def test_machine_without_a_swarm_has_nothing_to_leave(engine: FakeEngine, state: State) -> None:
    engine.is_manager = False
    swarm.leave(state)
    assert not engine.left
    assert swarm.worker_names() == []


def test_swarm_at_another_address_is_refused(
    engine: FakeEngine, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm.engine, "is_running", lambda: True)
    swarm.refuse_other_address(config(tmp_path, HEAD_ADDR="10.0.0.1"))
    with pytest.raises(ClusterError, match=r"at 10\.0\.0\.1, and HEAD_ADDR is 10\.0\.0\.2"):
        swarm.refuse_other_address(config(tmp_path, HEAD_ADDR="10.0.0.2"))
    engine.is_manager = False
    swarm.refuse_other_address(config(tmp_path, HEAD_ADDR="10.0.0.2"))
