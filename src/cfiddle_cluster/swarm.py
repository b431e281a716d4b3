"""The swarm: the head's engine manages it, every other machine is a worker of it, labels say what runs where."""

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from docker.errors import APIError

from cfiddle_cluster import engine
from cfiddle_cluster.config import CLUSTER, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import EngineError, Machine, on_each, resolved
from cfiddle_cluster.services import is_manager
from cfiddle_cluster.state import State
from cfiddle_cluster.wait import PATIENCE, wait_until, wait_until_none

PORT = 2377
PORTS = {PORT: "tcp", 7946: "tcp and udp", 4789: "udp"}
"""What members of a swarm reach each other at; the first one managers alone."""
BRIDGE = "docker_gwbridge"
"""The network that an engine makes when it first joins a swarm, and never takes away."""
JOIN_TIMEOUT_S = 60
HEARTBEAT_S = 15
"""How often members tell the manager that they are there; after three times as long they are given up, and what runs
there is stopped when they come back. At Swarm's own 5 s half a minute without a network ended all jobs of a worker."""
TELL_TIMEOUT_S = 10
MADE_BY_US = "swarm.json"
"""The file of the state that says which swarm `up` made, and so `down` may leave."""
JOINED = "joined.json"
"""The file of the state that has the ids of the members whom we let join, and so may make leave."""

# RFC 1123, section 2.1; slurm.conf(5) and a swarm's DNS want no more.
_NODE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_LEAVE = "/swarm/leave?force=true"
_SERVICE_NAMES = frozenset({"localhost", "mysql", "slurmdbd", "slurmctld", "slurmd", "agent", "userhost"})


def refuse_other_address(config: Config) -> None:
    """Make sure that a swarm which is there already has `HEAD_ADDR` for its manager.

    Raises:
        ClusterError: it has another one, which cannot be changed: its members know it by that.
    """
    if not engine.is_running() or not is_manager():
        return
    address = str(engine.client().info()["Swarm"]["NodeAddr"])
    if address not in (config.head_addr, resolved(config.head_addr)):
        raise ClusterError(
            f"this machine's swarm is at {address}, and HEAD_ADDR is {config.head_addr}",
            f"set HEAD_ADDR={address} in config.sh; or ./invoke down, which leaves a swarm that ./invoke up made",
        )


def ensure_swarm(config: Config, state: State) -> None:
    """Have the head's engine manage a swarm, made at `HEAD_ADDR` unless there is one.

    Raises:
        ClusterError: the head belongs to somebody else's swarm as a worker, or has not that address.
    """
    client = engine.client()
    info = client.info()
    _refuse([("this machine", *fault) for fault in engine_faults(info)])
    swarm = info["Swarm"]
    if swarm["ControlAvailable"]:
        if _is_ours(state):
            _ensure_heartbeat()
        return
    if _is_member(swarm):
        raise ClusterError(
            f"this machine's engine belongs to a swarm that it does not manage (state: {swarm['LocalNodeState']})",
            "docker swarm leave, if that swarm can do without it; then ./invoke up",
        )
    if swarm["LocalNodeState"] != "inactive":
        client.swarm.leave(force=True)
    # An engine takes no name here.
    address = resolved(config.head_addr)
    if address != config.head_addr and address.startswith("127."):
        raise ClusterError(
            f"HEAD_ADDR is {config.head_addr}, which is {address} on this machine, where no worker reaches it",
            "set HEAD_ADDR in config.sh to the address, in digits, at which workers reach this machine",
        )
    had_bridge = bool(client.networks.list(names=[f"^{BRIDGE}$"]))
    try:
        client.swarm.init(advertise_addr=address, listen_addr=f"0.0.0.0:{PORT}")
    except APIError as error:
        raise ClusterError(
            f"the swarm cannot be made at {config.head_addr}: {error.explanation}",
            "HEAD_ADDR in config.sh must be an address of this machine, and port 2377 must be free",
        ) from error
    state.write_json(MADE_BY_US, {"id": _cluster_id(), "had_bridge": had_bridge})
    _ensure_heartbeat()


def _ensure_heartbeat() -> None:
    api = engine.client().api
    swarm = api.inspect_swarm()
    period_ns = int(HEARTBEAT_S * PATIENCE) * 10**9
    if swarm["Spec"]["Dispatcher"]["HeartbeatPeriod"] != period_ns:
        swarm["Spec"]["Dispatcher"]["HeartbeatPeriod"] = period_ns
        api.update_swarm(swarm["Version"]["Index"], swarm_spec=swarm["Spec"])


def ensure_joined(config: Config, state: State, machines: Iterable[Machine]) -> None:
    """Have every machine be a member of the head's swarm. The token is sent in a request's body and rotated afterwards.

    Raises:
        ClusterError: a machine is in another swarm or cannot reach the head, or two have the same name.
    """
    machines = list(machines)
    _refuse(name_faults([(machine.name, machine.addr) for machine in machines]))
    machines = [machine for machine in machines if "head" not in machine.roles]
    answers = on_each(machines, lambda machine: machine.engine_get("/info"))
    for machine, info in zip(machines, answers, strict=True):
        _refuse([(machine.name, *fault) for fault in engine_faults(info)])
    ids = {str(node["ID"]) for node in nodes().values()}
    ours = set(state.read_json(JOINED, []))
    missing = []
    for machine, swarm in zip(machines, [info["Swarm"] for info in answers], strict=True):
        if swarm["NodeID"] in ids:
            continue
        is_simulated = machine.simulated and not swarm.get("ControlAvailable")
        if _is_member(swarm) and not (is_simulated or swarm["NodeID"] in ours):
            raise ClusterError(
                f"{machine.name} ({machine.addr}) belongs to another swarm",
                "if that swarm can do without it, run there: docker swarm leave --force; then ./invoke up",
            )
        missing.append(machine)
        if swarm["LocalNodeState"] != "inactive":
            # Of a swarm of ours that is no more, or an attempt to join that failed.
            machine.engine_post(_LEAVE)
    if missing:
        _let_join(config, state, missing)
    _remove_forgotten({machine.name for machine in machines})
    wait_until_none(
        lambda: [machine.name for machine in machines if not _is_ready(machine)],
        timeout_s=JOIN_TIMEOUT_S,
        what="{} to be ready in the swarm",
        remedy="docker node ls shows their state; ports 2377, 7946 and 4789 must be open between the machines",
    )


def ensure_labels(head: Machine, machines: Iterable[Machine]) -> None:
    """Give every machine the labels of its roles: `slurm_role` for people, the others to place services by."""
    for machine in {head, *machines}:
        node = node_of(machine)
        if node is None:
            raise ClusterError(f"{machine.name} is not in the swarm", "./invoke swarm")
        wanted = {"slurm_role": "head_node" if "head" in machine.roles else "worker", "cfiddle.cluster": CLUSTER}
        wanted |= {f"slurm_{role}": "true" for role in machine.roles}
        _set_labels(node, wanted)


def nodes() -> dict[str, dict[str, Any]]:
    """Return the swarm's members by their id, as the engine describes them; none where there is no swarm."""
    if not is_manager():
        return {}
    return {str(node["ID"]): node for node in engine.client().api.nodes()}


def node_of(machine: Machine) -> dict[str, Any] | None:
    """Return a machine as the swarm knows it; of several with its name the one that is ready, or the newest."""
    named = [node for node in nodes().values() if node["Description"].get("Hostname") == machine.name]
    named.sort(key=lambda node: (node["Status"]["State"] == "ready", str(node["CreatedAt"])))
    return named[-1] if named else None


def _is_ready(machine: Machine) -> bool:
    node = node_of(machine)
    return node is not None and node["Status"]["State"] == "ready"


def worker_names() -> list[str]:
    """Return the names of the swarm's members that carry the label of a worker."""
    return sorted(name for name, labels in _labels() if labels.get("slurm_worker") == "true")


def former_worker_names() -> list[str]:
    """Return the names of the members that `unlabel_worker` has made ready to leave."""
    return sorted(
        name for name, labels in _labels() if labels.get("slurm_role") == "worker" and "slurm_worker" not in labels
    )


def is_ready(name: str) -> bool:
    """Tell whether Swarm reaches a member of that name."""
    return any(node["Status"]["State"] == "ready" for node in _named(name))


def address_of(name: str) -> str:
    """Return the address at which the swarm saw a member last; empty if there is none of that name."""
    return next((str(node["Status"].get("Addr", "")) for node in _named(name)), "")


def unlabel_worker(name: str) -> None:
    """Let no worker service run on a machine any longer; to people it is a worker until it has left."""
    for node in _named(name):
        labels = {key: value for key, value in (node["Spec"].get("Labels") or {}).items() if key != "slurm_worker"}
        # Of a member that is paused Swarm takes nothing away.
        _update(node, Labels=labels, Availability="active")


def set_availability(node_id: str, availability: str) -> None:
    """Have Swarm start and replace containers on a member (`active`), or leave alone what runs there (`pause`)."""
    _update(nodes()[node_id], Availability=availability)


def tell(act: Callable[[], object], what: str) -> None:
    """Change something of the swarm's, again where Swarm has noted something else of it since it was looked at.

    Args:
        act: looks at the present version, and changes that.
        what: what it is, for the error.

    Raises:
        ClusterError: it has not come through in time.
    """

    def is_told() -> bool:
        try:
            act()
        except (APIError, EngineError) as error:
            if "update out of sequence" in str(error):
                return False
            raise
        return True

    wait_until(is_told, timeout_s=TELL_TIMEOUT_S, what=f"Swarm to take {what}")


def remove_node(state: State, name: str, machine: Machine | None = None) -> None:
    """Take a machine out of the swarm, unless it was a member before we came; a lost one (None) is forgotten."""
    if machine is not None:
        if "head" in machine.roles:
            return
        release(state, machine)
    joined = state.read_json(JOINED, [])
    for node in _named(name):
        is_ours = machine is None or machine.simulated or node["ID"] in joined
        if is_ours and node["Spec"]["Role"] != "manager":
            engine.client().api.remove_node(node["ID"], force=True)


def release(state: State, machine: Machine) -> None:
    """Have a machine leave the swarm if we let it join; who is in it for reasons of their own, or in another, stays."""
    swarm = machine.engine_get("/info")["Swarm"]
    if swarm["NodeID"] and (machine.simulated or swarm["NodeID"] in state.read_json(JOINED, [])):
        machine.engine_post(_LEAVE)


def leave(state: State) -> None:
    """Have the head leave the swarm if `up` made it; labels and members that the cluster gave it go in any case."""
    if not is_manager():
        return
    if _is_ours(state):
        engine.client().swarm.leave(force=True)
        if not state.read_json(MADE_BY_US, {}).get("had_bridge", True):
            for network in engine.client().networks.list(names=[f"^{BRIDGE}$"]):
                network.remove()
        state.path(MADE_BY_US).unlink(missing_ok=True)
        return
    for node in nodes().values():
        labels = node["Spec"].get("Labels") or {}
        if labels.get("cfiddle.cluster") == CLUSTER:
            mine = ("cfiddle.cluster", "slurm_role", "slurm_head", "slurm_worker")
            _update(node, Labels={key: value for key, value in labels.items() if key not in mine})


def _is_ours(state: State) -> bool:
    made = state.read_json(MADE_BY_US, None)
    return bool(made) and made.get("id") == _cluster_id()


def _cluster_id() -> str:
    return str(engine.client().api.inspect_swarm()["ID"])


def _labels() -> list[tuple[str, dict[str, str]]]:
    """Return each member's name and labels."""
    return [(str(node["Description"].get("Hostname")), node["Spec"].get("Labels") or {}) for node in nodes().values()]


def _named(name: str) -> list[dict[str, Any]]:
    return [node for node in nodes().values() if node["Description"].get("Hostname") == name]


def _remove_forgotten(names: set[str]) -> None:
    """Remove members that are down and whose machine has joined anew under the same name."""
    for name in names:
        named = _named(name)
        if any(node["Status"]["State"] == "ready" for node in named):
            for node in named:
                if node["Status"]["State"] == "down":
                    engine.client().api.remove_node(node["ID"], force=True)


def engine_faults(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what an engine has set that the cluster cannot be with, and how to mend it.

    Args:
        info: what the engine says of itself.
    """
    options = {part for option in info.get("SecurityOptions") or [] for part in str(option).split(",")}
    restart = "then restart that engine"
    faults = []
    if info.get("LiveRestoreEnabled"):
        faults.append(
            ("its engine has live-restore, which Swarm refuses", f"take live-restore out of daemon.json, {restart}")
        )
    if "name=userns" in options:
        faults.append(
            (
                "its engine has userns-remap: a sandbox's caller could not be told by uid",
                f"take userns-remap out of daemon.json, {restart}",
            )
        )
    if "name=rootless" in options:
        faults.append(("its engine is a rootless one, which has no overlay networks", "install Docker Engine for root"))
    return faults


def name_faults(machines: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Return which names of machines, each with its address, cannot be a node's, why, and how to mend it."""
    machines = list(machines)
    mend = "give it another name: hostnamectl hostname NAME"
    faults = []
    for name in sorted({name for name, _addr in machines}):
        addresses = [addr for other, addr in machines if other == name]
        if len(addresses) > 1:
            faults.append(
                (name, f"{' and '.join(addresses)} are both named {name}; a node has its machine's name", mend)
            )
        if not _NODE_NAME.fullmatch(name):
            faults.append((name, f"{name!r} cannot be a node's name: letters, digits and hyphens only", mend))
        elif name in _SERVICE_NAMES:
            faults.append((name, f"{name} is the name of one of the cluster's services, and cannot be a node's", mend))
    return faults


def _refuse(faults: Iterable[tuple[str, str, str]]) -> None:
    faults = list(faults)
    if faults:
        raise ClusterError("\n".join(f"{where}: {what}" for where, what, _mend in faults), faults[0][2])


def _is_member(swarm: Mapping[str, Any]) -> bool:
    # An engine whose attempt to join failed is in state `error`, and keeps trying, but has no id yet.
    return bool(swarm["NodeID"]) or swarm["LocalNodeState"] not in ("inactive", "pending", "error")


def _let_join(config: Config, state: State, machines: Iterable[Machine]) -> None:
    api = engine.client().api
    token = str(api.inspect_swarm()["JoinTokens"]["Worker"])
    try:
        on_each(machines, lambda machine: _join(config, state, machine, token))
    except ClusterError:
        if _is_ours(state) and len(nodes()) == 1:
            # Nobody could join: made at an address that is not the head's, it would stay there.
            leave(state)
        raise
    finally:
        if is_manager():
            # A rotation sends the whole specification, or what is not in it falls back to its default.
            swarm = api.inspect_swarm()
            api.update_swarm(swarm["Version"]["Index"], swarm_spec=swarm["Spec"], rotate_worker_token=True)


_joined = threading.Lock()


def _join(config: Config, state: State, machine: Machine, token: str) -> None:
    body = {
        "ListenAddr": f"0.0.0.0:{PORT}",
        "AdvertiseAddr": resolved(machine.addr),
        "RemoteAddrs": [f"{resolved(config.head_addr)}:{PORT}"],
        "JoinToken": token,
    }
    try:
        machine.engine_post("/swarm/join", body, timeout_s=JOIN_TIMEOUT_S)
    except ClusterError as error:
        with suppress(ClusterError):
            # It would go on trying.
            machine.engine_post(_LEAVE)
        message = error.message.replace(token, "…")
        raise ClusterError(
            f"{machine.name} cannot join the swarm at {config.head_addr}: {message}",
            f"HEAD_ADDR in config.sh must be the head's address as {machine.name} sees it, with port {PORT} open",
        ) from None
    if not machine.simulated:
        node = str(machine.engine_get("/info")["Swarm"]["NodeID"])
        with _joined:
            state.write_json(JOINED, [*state.read_json(JOINED, []), node])


def _set_labels(node: Mapping[str, Any], wanted: Mapping[str, str]) -> None:
    labels = dict(node["Spec"].get("Labels") or {})
    roles = {"slurm_role", "slurm_head", "slurm_worker"}
    updated = {key: value for key, value in labels.items() if key not in roles} | dict(wanted)
    if updated != labels:
        _update(node, Labels=updated)


def _update(node: Mapping[str, Any], **changed: Any) -> None:
    """Change parts of a member's specification."""

    def act() -> None:
        now = nodes()[node["ID"]]
        engine.client().api.update_node(node["ID"], now["Version"]["Index"], {**now["Spec"], **changed})

    tell(act, f"a change of {node['Description'].get('Hostname', node['ID'])}")
