"""Roll new images out to a running cluster: the head's services one by one, then worker by worker, each free of jobs.

Swarm's own rolling update knows nothing of jobs: it chooses the next machine itself, and asks nobody before it stops a
container there. So the workers are paused in the swarm, where what runs goes on and nothing is replaced; then Swarm is
told the new services; then one worker after the other is drained in Slurm, waited for, relieved of its old containers
and made active again, upon which Swarm starts the new ones. Active without that, it would start the new ones beside the
old. The services keep their names and stay global, which two sets of them with labels would not allow. The price: until
its turn has come, a container on a paused worker that ends is not started again.

What ran before is written down at the beginning (`RECORD`), so an upgrade that was interrupted goes on, or back, from
wherever it was.
"""

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from docker.models.services import Service

from cfiddle_cluster import engine, readiness, services, slurm, stack, swarm
from cfiddle_cluster.commands import docker_cli, run
from cfiddle_cluster.config import STACK, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.slurm import Node
from cfiddle_cluster.state import State
from cfiddle_cluster.wait import wait_until

RECORD = "upgrade.json"
"""The file of the state that says, while an upgrade is under way, what each service was and which workers it paused."""
LOG = "upgrade.log"
"""The file of the state that keeps what was said where something did not come up."""
LOG_LINES = 200
LOG_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Patience:
    """How long an upgrade waits.

    Attributes:
        drain_s: seconds for the jobs of one worker to end.
        start_s: seconds for what was replaced to be healthy.
    """

    drain_s: float = stack.DRAIN_TIMEOUT_S
    start_s: float = stack.START_TIMEOUT_S


class DidNotComeUp(ClusterError):
    """Something new did not come up.

    Attributes:
        where: the worker, or the head's service.
        services: those of which the log tells why.
        node_id: the member of the swarm that it was on; empty for the head.
    """

    def __init__(self, where: str, services: Collection[str], node_id: str, why: str) -> None:
        super().__init__(f"{where} did not come up: {why}")
        self.where = where
        self.services = services
        self.node_id = node_id


def is_under_way(state: State) -> bool:
    """Tell whether an upgrade of the services that are here was begun and has not ended."""
    known = state.read_json(RECORD, None)
    return known is not None and any(service.id in known["services"] for service in services.services())


def roll_out(
    config: Config,
    state: State,
    machines: Sequence[Machine],
    references: dict[str, str],
    patience: Patience,
    say: Callable[[str], None],
) -> None:
    """Bring the services to what the checkout describes, one after the other, and all back if one does not come up.

    Args:
        config: the administrator's settings.
        state: where it is written down what ran before.
        machines: the head and all workers.
        references: for each image, by its short name, what the machines' engines know it by.
        patience: how long to wait.
        say: is told what happens.

    Raises:
        ClusterError: something did not come up, and all is as it was; or jobs did not end in time.
    """
    values = stack.values_of(config, state, references)
    changing = stack.changed(values)
    if not changing and not is_under_way(state):
        say("nothing to do: the services run what this checkout describes")
        return
    before = _begin(state)
    rolling = _Rolling(state, machines, patience, say)
    try:
        rolling.roll(stack.STAGES, changing, lambda names: stack.put(config, state, values, names))
    except DidNotComeUp as failure:
        log = _keep_log(state, failure)
        say(f"{failure.message.partition(chr(10))[0]}; all goes back")
        try:
            rolling.roll(reversed(stack.STAGES), _others_than(before), lambda names: _put_back(machines, before, names))
        except ClusterError as error:
            raise ClusterError(
                f"{failure.message}\nits log: {log}\nand not all went back: {error.message}", error.remedy
            ) from failure
        forget(state)
        raise ClusterError(
            f"{failure.message}\nits log: {log}\nall runs what ran before",
            "mend what the log says, or return to the checkout of before: ./invoke up would deploy what failed",
        ) from failure
    forget(state)
    stack.remove_unused(values)


def forget(state: State) -> None:
    """End an upgrade as far as it has got: the workers that it paused are Swarm's again."""
    known = state.read_json(RECORD, None)
    if known is None:
        return
    members = swarm.nodes()
    for node_id in known["paused"]:
        if node_id in members and members[node_id]["Spec"]["Availability"] == "pause":
            swarm.set_availability(node_id, "active")
    state.path(RECORD).unlink()


def _begin(state: State) -> dict[str, Any]:
    """Return each service's specification of before the upgrade, also where that was begun earlier."""
    if not is_under_way(state):
        found = {str(service.id): service.attrs["Spec"] for service in services.services()}
        state.write_json(RECORD, {"services": found, "paused": []})
    before: dict[str, Any] = state.read_json(RECORD, None)["services"]
    return before


def _others_than(before: dict[str, Any]) -> set[str]:
    return {
        str(service.name).removeprefix(f"{STACK}_")
        for service in services.services()
        if before.get(str(service.id)) != service.attrs["Spec"]
    }


def _put_back(machines: Iterable[Machine], before: dict[str, Any], names: Collection[str]) -> None:
    """Tell Swarm that the named services shall be what they were; those that were not there go."""
    head = next(machine for machine in machines if "head" in machine.roles)

    def put_back(service: Service) -> None:
        service.reload()
        path = f"/services/{service.id}/update?version={service.attrs['Version']['Index']}&registryAuthFrom=spec"
        head.engine_post(path, before[str(service.id)])

    for service in services.services():
        if str(service.name).removeprefix(f"{STACK}_") not in names:
            continue
        if service.id in before:
            swarm.tell(partial(put_back, service), f"what {service.name} was before")
        else:
            service.remove()


@dataclass(frozen=True)
class _Rolling:
    """The way there or back, stage by stage."""

    state: State
    machines: Sequence[Machine]
    patience: Patience
    say: Callable[[str], None]

    def roll(
        self,
        stages: Iterable[Sequence[str]],
        changing: Collection[str],
        put: Callable[[Collection[str]], None],
    ) -> None:
        """Replace what is to change, and on the workers also what has not been replaced so far.

        Raises:
            DidNotComeUp: something was not healthy in time.
            ClusterError: jobs did not end in time.
        """
        for stage in stages:
            names = [name for name in stage if name in changing]
            if stage == stack.WORKER_SERVICES:
                self._replace_on_workers(names, put)
            elif names:
                self._replace_on_head(names[0], put)
        # Also what an upgrade drained that was killed.
        stack.resume()

    def _replace_on_head(self, service: str, put: Callable[[Collection[str]], None]) -> None:
        began = time.monotonic()
        put([service])
        try:
            services.wait_until_healthy(service, timeout_s=self.patience.start_s)
        except ClusterError as error:
            raise DidNotComeUp(service, [service], "", error.message) from error
        self.say(f"{service} is up to date ({time.monotonic() - began:.1f} s)")

    def _replace_on_workers(self, names: Collection[str], put: Callable[[Collection[str]], None]) -> None:
        workers = [machine for machine in self.machines if "worker" in machine.roles]
        others = [machine for machine in workers if "head" not in machine.roles]
        if names:
            self._pause(others)
        # The head is not paused: its own services would not be started again. It is free of jobs before Swarm is told.
        is_replaced = False
        for head in [machine for machine in workers if machine not in others]:
            if names or self._stale_on(head):
                self._replace(head, lambda: put(names) if names else None)
                is_replaced = True
        if names and not is_replaced:
            put(names)
        for machine in others:
            node_id = _member(machine)
            is_active = swarm.nodes()[node_id]["Spec"]["Availability"] == "active"
            if not is_active and node_id not in self.state.read_json(RECORD, None)["paused"]:
                self.say(f"{machine.name} is left alone: somebody else has paused or drained it in the swarm")
            elif self._stale_on(machine):
                self._replace(machine, partial(self._renew, machine))
            elif not is_active:
                swarm.set_availability(node_id, "active")

    def _pause(self, machines: Iterable[Machine]) -> None:
        known = self.state.read_json(RECORD, None)
        members = swarm.nodes()
        ids = [_member(machine) for machine in machines]
        active = [node_id for node_id in ids if members[node_id]["Spec"]["Availability"] == "active"]
        self.state.write_json(RECORD, {**known, "paused": sorted({*known["paused"], *active})})
        for node_id in active:
            swarm.set_availability(node_id, "pause")

    def _stale_on(self, machine: Machine) -> list[str]:
        return services.stale_on(_member(machine), stack.WORKER_SERVICES)

    def _renew(self, machine: Machine) -> None:
        stack.stop_worker_services(machine)
        swarm.set_availability(_member(machine), "active")

    def _replace(self, machine: Machine, act: Callable[[], None]) -> None:
        """Free a worker of jobs, replace its services, and see that jobs run there again."""
        began = time.monotonic()
        with self._free_of_jobs(machine.name) as is_drained_by_others:
            try:
                act()
                self._wait_until_up(machine)
            except ClusterError as error:
                raise self._failure(machine, error) from error
        if not is_drained_by_others:
            try:
                readiness.wait_until_ready([machine])
            except ClusterError as error:
                raise self._failure(machine, error) from error
        self.say(f"{machine.name} is up to date ({time.monotonic() - began:.1f} s)")

    def _wait_until_up(self, machine: Machine) -> None:
        node_id, name = _member(machine), machine.name
        wait_until(
            lambda: not services.stale_on(node_id, stack.WORKER_SERVICES),
            timeout_s=self.patience.start_s,
            interval_s=0.5,
            what=f"{' and '.join(stack.WORKER_SERVICES)} to be healthy on {name}",
        )
        wait_until(
            lambda: _node(name).is_answering,
            timeout_s=self.patience.start_s,
            interval_s=0.5,
            what=f"{name} to answer slurmctld",
        )

    @contextmanager
    def _free_of_jobs(self, name: str) -> Iterator[bool]:
        """Have no job on a worker meanwhile; yield whether somebody else has drained it, and keeps it so."""
        node = _node(name)
        is_theirs = node.is_drained and node.reason != stack.DRAIN_REASON
        if node.is_answering and not is_theirs:
            slurm.drain([name], stack.DRAIN_REASON)
        try:
            self._wait_until_empty(name)
            yield is_theirs
        except DidNotComeUp:
            # It shall take no job before it has gone back.
            raise
        except BaseException:
            self._resume(name)
            raise
        self._resume(name)
        if is_theirs and not _node(name).is_drained:
            # A node whose settings have changed comes to Slurm anew.
            slurm.drain([name], node.reason)

    def _resume(self, name: str) -> None:
        if _node(name).reason == stack.DRAIN_REASON:
            slurm.resume([name])

    def _wait_until_empty(self, name: str) -> None:
        drain_s = self.patience.drain_s
        try:
            slurm.wait_until_empty([name], timeout_s=drain_s, say=self.say)
        except ClusterError as error:
            raise ClusterError(
                f"{error.message}; {name} takes jobs again, and runs what it ran before",
                "--drain-minutes waits for longer; until then a container that ends on a worker whose turn has not come"
                " is not started again",
            ) from error

    def _failure(self, machine: Machine, error: ClusterError) -> DidNotComeUp:
        node_id = _member(machine)
        endings = [task["Status"].get("Err") for task in _last_tasks(stack.WORKER_SERVICES, node_id)]
        why = "\n".join(dict.fromkeys([error.message, *filter(None, endings)]))
        return DidNotComeUp(machine.name, stack.WORKER_SERVICES, node_id, why)


def _node(name: str) -> Node:
    """Return a worker as Slurm sees it, also one that it does not know."""
    return slurm.nodes().get(name, Node(name, "unknown", is_answering=False))


def _member(machine: Machine) -> str:
    """Return a machine's id in the swarm.

    Raises:
        ClusterError: it is no member.
    """
    node = swarm.node_of(machine)
    if node is None:
        raise ClusterError(f"{machine.name} is not in the swarm", "./invoke up")
    return str(node["ID"])


def _last_tasks(names: Iterable[str], node_id: str) -> list[dict[str, Any]]:
    """Return the newest three tasks of each service, on one member or on any; the latest last."""
    api = engine.client().api
    where = {"node": node_id} if node_id else {}
    of_each = (api.tasks(filters={"service": f"{STACK}_{name}", **where}) for name in names)
    by_age = (sorted(tasks, key=lambda task: str(task["CreatedAt"])) for tasks in of_each)
    return list(itertools.chain.from_iterable(tasks[-3:] for tasks in by_age))


def _keep_log(state: State, failure: DidNotComeUp) -> Path:
    """Write down what the failed containers said, before they are replaced; return the file."""
    parts = [failure.message]
    for task in _last_tasks(failure.services, failure.node_id):
        argv = [docker_cli(), "service", "logs", "--timestamps", "--tail", str(LOG_LINES), str(task["ID"])]
        try:
            said = run(argv, timeout_s=LOG_TIMEOUT_S)
        except ClusterError as error:
            said = f"(its log is not to be had: {error.message})\n"
        parts.append(f"==> {failure.where}, task {task['ID']}, {task['Status']['State']}\n{said}")
    state.write(LOG, "\n".join(parts))
    return state.path(LOG)
