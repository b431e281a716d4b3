"""Users' containers on a worker, over an engine that only keeps states: who may have which, and each is in a job."""

import itertools
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent import containers, wire
from agent.container_policy import ContainerPolicy
from agent.container_shape import Owner, Wanted, configuration, limits
from agent.containers import Containers
from agent.engine import EngineError
from agent.gpus import Gpu
from agent.grants import Grant
from agent.wire import Refused
from live import wait_until

ME, OTHER, JOB = 2001, 2002, 7
POLICY = ContainerPolicy(
    images={"my_task_image": "sha256:1"}, per_user=3, disk_mb=10, cpus=1, memory_mb=64, processes=99
)
ASKED = {"job": JOB, "user": "me", "name": "a", "image": "my_task_image", "ports": 0, "again": False}
GRANT = Grant(ME, "", (1, 2, 3), 2, 512)

GOLDEN = (Path(__file__).parent / "golden-container.json").read_text()


class FakeGrants:
    def __init__(self) -> None:
        self.known: dict[int, Grant] = {}

    def find(self, job: int) -> Grant | None:
        return self.known.get(job)


class FakeEngine:
    """Keeps containers and their states; `fails` is what calls come to, `on` what they do first."""

    def __init__(self) -> None:
        self.there: dict[str, dict[str, Any]] = {}
        self.updated: list[tuple[str, dict[str, Any]]] = []
        self.stopped: queue.Queue[str] = queue.Queue()
        self.fails: dict[str, EngineError] = {}
        self.on: dict[str, Callable[[], object]] = {}
        self._numbers = itertools.count(1)
        self._endings: dict[str, list[socket.socket]] = {}

    def _does(self, call: str) -> None:
        if held := self.on.get(call):
            held()
        if error := self.fails.get(call):
            raise error

    def create(self, name: str, configuration: dict[str, Any]) -> str:
        self._does("create")
        if name in {found["Name"] for found in self.there.values()}:
            raise EngineError(409, "in use")
        identifier = f"{next(self._numbers):064x}"
        self.there[identifier] = {"Name": name, "Status": "created", "SizeRw": 0, "Configuration": configuration}
        return identifier

    def start(self, container: str) -> None:
        self._does("start")
        self.there[container]["Status"] = "running"

    def update(self, container: str, limits: dict[str, Any]) -> None:
        self.updated.append((container, limits))

    def inspect(self, container: str) -> dict[str, Any]:
        for identifier, found in self.there.items():
            if container in (identifier, found["Name"]):
                labels = found["Configuration"].get("Labels")
                state = {"Running": found["Status"] == "running"}
                return {
                    "Id": identifier,
                    "State": state,
                    "Config": {"Labels": labels},
                    "Created": "2024-02-15T02:59:35Z",
                }
        raise EngineError(404, "no such container")

    def stop(self, container: str, *, grace_s: int) -> None:
        self._does("stop")
        self.end(container, 137)
        self.stopped.put(container)

    def remove(self, container: str) -> None:
        del self.there[container]

    def ending(self, container: str) -> "FakeEnding":
        ours, theirs = socket.socketpair()
        self._endings.setdefault(container, []).append(ours)
        if self.there[container]["Status"] != "running":
            ours.close()
        return FakeEnding(theirs, lambda: self.there[container]["Code"])

    def end(self, container: str, code: int) -> None:
        if self.there[container]["Status"] == "running":
            self.there[container] |= {"Status": "exited", "Code": code}
        for ending in self._endings.pop(container, []):
            ending.close()

    def listed(self, *labels: str, sizes: bool = False) -> list[dict[str, Any]]:
        self._does("listed")
        found = []
        for identifier, container in list(self.there.items()):
            has = container["Configuration"]["Labels"] or {}
            if all(has.get(label.partition("=")[0], "") == (label.partition("=")[2] or "1") for label in labels):
                known = {
                    "Id": identifier,
                    "Labels": has,
                    "State": container["Status"],
                    "Image": "i",
                    "ImageID": "sha256:1",
                }
                found.append(known | ({"SizeRw": container["SizeRw"]} if sizes else {}))
        return found


class FakeEnding:
    def __init__(self, connection: socket.socket, status: Callable[[], int]) -> None:
        self._connection = connection
        self.status = status
        self.fileno = connection.fileno

    def close(self) -> None:
        self._connection.close()


class Step:
    """A step of a job that asks for a container and stays."""

    def __init__(self, kept: Containers, uid: int, request: dict[str, Any]) -> None:
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.settimeout(10)
        self.refusal: Refused | None = None

        def hold() -> None:
            try:
                kept.hold(theirs, uid, request)
            except Refused as refused:
                self.refusal = refused
            theirs.close()

        self.thread = threading.Thread(target=hold, daemon=True)
        self.thread.start()

    def hears(self) -> dict[str, Any]:
        return wire.receive(self.connection)[0]

    def refused(self) -> str:
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert self.refusal, "it was not refused"
        return self.refusal.code

    def end(self) -> None:
        self.connection.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    found = FakeEngine()
    yield found
    found.on["listed"] = threading.Event().wait  # what looks after containers all the time rests from now on


@pytest.fixture
def grants() -> FakeGrants:
    found = FakeGrants()
    found.known[JOB] = GRANT
    return found


class Homes:
    """A directory whose entries have the owners that they shall have, whoever runs this."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.owners = {"me": ME, "other": OTHER}
        for user in self.owners:
            (root / user).mkdir()

    def __truediv__(self, name: str) -> Any:
        def lstat() -> SimpleNamespace:
            mode = (self.root / name).lstat().st_mode
            return SimpleNamespace(st_uid=self.owners.get(name, ME), st_gid=100, st_mode=mode)

        return SimpleNamespace(lstat=lstat)


@pytest.fixture
def homes(tmp_path: Path) -> Homes:
    return Homes(tmp_path)


class Quiet:
    """In the place of what knows whether something is measured: `lasts` says for how long nothing has been."""

    lasts: float | None = 1.0

    def lasted_s(self) -> float | None:
        return self.lasts

    def lease(self, job: int, grant: Grant) -> Any:
        return threading.RLock()


@pytest.fixture
def make(
    engine: FakeEngine, grants: FakeGrants, homes: Homes, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Containers]:
    monkeypatch.setattr(containers, "_ADOPTION_S", 3600)
    monkeypatch.setattr(containers, "_SWEEP_S", 0.02)
    monkeypatch.setattr(containers, "_DISK_LOOK_S", 0.02)
    monkeypatch.setattr(containers, "_DISK_GLANCE_S", 0.02)
    monkeypatch.setattr(containers, "_LOOK_S", 0.05)

    def make() -> Containers:
        return Containers(
            engine,  # type: ignore[arg-type]
            POLICY,
            grants=grants,  # type: ignore[arg-type]
            quiet=Quiet(),  # type: ignore[arg-type]
            homes=homes,  # type: ignore[arg-type]
            home_options=lambda name: {"type": "none", "o": "bind", "device": f"/srv/{name}"},
            network="cfiddle-users",
            own_image="sha256:2",
        )

    return make


@pytest.fixture
def kept(make: Callable[[], Containers]) -> Containers:
    return make()


@pytest.fixture
def ask(kept: Containers) -> Iterator[Callable[..., Step]]:
    """Return what asks for a container from a step of a job."""
    steps: list[Step] = []

    def ask(*, uid: int = ME, **fields: Any) -> Step:
        steps.append(Step(kept, uid, ASKED | fields))
        return steps[-1]

    yield ask
    for step in steps:
        step.end()


def _create(kept: Containers, name: str, *, uid: int = ME, user: str = "me", image: str = "my_task_image") -> str:
    return kept.create(uid, user=user, name=name, image=image)


def _code(function: Callable[..., object], *args: Any, **fields: Any) -> str:
    with pytest.raises(Refused) as caught:
        function(*args, **fields)
    return caught.value.code


def _shape_of(user: str, *, home: dict[str, str]) -> dict[str, Any]:
    wanted = Wanted(Owner(1, 1, user), "a", "i", "sha256:1")
    return configuration(wanted, policy=POLICY, grant=None, home=home, network="n")


def _status(engine: FakeEngine, container: str) -> str:
    return str(engine.there[container]["Status"])


# --- what the engine is asked for ------------------------------------------------------------------------------------


def test_shape_of_a_container_is_the_golden_one() -> None:
    home = {"type": "nfs", "o": "addr=10.0.0.1", "device": ":/homes/ada"}
    cards = [Gpu(0, "NVIDIA H200", "GPU-1")]
    shape = Wanted(Owner(2001, 100, "ada"), "a.b-", "my_task_image", "sha256:1", ports=[25000], gpus=cards)
    wanted = configuration(shape, policy=POLICY, grant=GRANT, home=home, network="cfiddle-users")
    assert json.dumps(wanted, indent=1, sort_keys=True) + "\n" == GOLDEN


def test_container_that_is_in_no_job_yet_gets_its_limits_with_the_job(
    kept: Containers, engine: FakeEngine, ask: Callable[..., Step]
) -> None:
    container = _create(kept, "a")
    assert "Memory" not in engine.there[container]["Configuration"]["HostConfig"]
    assert ask().hears() == {"type": "running", "container": container}
    assert engine.updated == [(container, {"Memory": 2**29, "MemorySwap": 2**29, "NanoCpus": 2 * 10**9})]


@pytest.mark.parametrize(("user", "homes"), [("me", ["/home/me"]), ("zoe", ["/home/zoe", "/home/me"])])
def test_home_is_there_by_the_user_s_name_and_by_everybody_s_once_each(user: str, homes: list[str]) -> None:
    wanted = _shape_of(user, home={})
    assert [mount["Target"] for mount in wanted["HostConfig"]["Mounts"]] == homes
    assert f"HOME=/home/{user}" in wanted["Env"]


def test_what_a_grant_does_not_say_is_no_limit() -> None:
    assert limits(Grant(ME, "", (1, 2, 3))) == {}


def test_other_options_of_a_home_are_another_volume() -> None:
    def source(device: str) -> str:
        return str(_shape_of("me", home={"device": device})["HostConfig"]["Mounts"][0]["Source"])

    assert source("/a/me") == source("/a/me") != source("/b/me")


# --- whose it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["other", "root", "", "../me", "me/", "ME", "me\n", "link", "file", "m" * 33])
def test_home_must_be_one_s_own_directory(kept: Containers, engine: FakeEngine, homes: Homes, user: str) -> None:
    (homes.root / "link").symlink_to(homes.root / "me")
    (homes.root / "file").touch()
    assert _code(_create, kept, "a", user=user) == "user"
    assert not engine.there


def test_containers_of_others_are_not_there(kept: Containers, engine: FakeEngine) -> None:
    container = _create(kept, "a")
    for verb in (kept.stop, kept.delete, kept.inspected):
        assert _code(verb, OTHER, "a") == "name"
    assert _code(kept.execute, OTHER, "a", ["sh"], terminal=False, mark="m") == "name"
    assert kept.listed(OTHER) == []
    [mine] = kept.listed(ME)
    assert (mine["name"], mine["id"], mine["status"], mine["job"]) == ("a", container, "created", None)
    assert kept.listed(0) == [mine]
    assert kept.inspected(0, f"u{ME}.a")["Id"] == container


def test_name_may_be_that_of_another_user_s(kept: Containers, engine: FakeEngine) -> None:
    assert _create(kept, "a") != _create(kept, "a", uid=OTHER, user="other")
    assert {found["Name"] for found in engine.there.values()} == {f"u{ME}.a", f"u{OTHER}.a"}


@pytest.mark.parametrize("labels", [None, {}, {"cfiddle.container": "1", "cfiddle.uid": str(OTHER)}])
def test_what_is_called_so_and_is_no_container_of_the_user_s_is_not_touched(
    kept: Containers, engine: FakeEngine, labels: dict[str, str] | None
) -> None:
    engine.create(f"u{ME}.a", {"Labels": labels})
    assert _code(kept.stop, ME, "a") == "name"
    assert _code(kept.delete, ME, "a") == "name"


@pytest.mark.parametrize("labels", [None, {}])
def test_administrator_reaches_users_containers_alone(
    kept: Containers, engine: FakeEngine, labels: dict[str, str] | None
) -> None:
    engine.create(f"u{ME}.a", {"Labels": labels})
    assert _code(kept.stop, 0, f"u{ME}.a") == "name"


# --- create, stop, delete --------------------------------------------------------------------------------------------


def test_image_must_be_one_of_the_policy_s(kept: Containers) -> None:
    with pytest.raises(Refused, match=r"there is no image 'debian\\n'") as caught:
        _create(kept, "a", image="debian\n")
    assert caught.value.code == "image"


@pytest.mark.parametrize(("status", "code"), [(409, "name"), (404, "image")])
def test_what_the_engine_refuses_is_said(kept: Containers, engine: FakeEngine, status: int, code: str) -> None:
    engine.fails["create"] = EngineError(status, "no")
    assert _code(_create, kept, "a") == code


def test_share_of_a_user_is_never_exceeded_however_many_ask_at_once(kept: Containers, engine: FakeEngine) -> None:
    engine.on["create"] = lambda: time.sleep(0.1)  # a slow engine, so that all are asked before the first has done it
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(_create, kept, f"n{number}") for number in range(8)]
    assert len(engine.there) <= POLICY.per_user
    refused = [ended for ended in (one.exception() for one in asked) if ended]
    assert {error.code for error in refused if isinstance(error, Refused)} == {"share"}
    assert len(refused) == 8 - len(engine.there)


def test_share_can_be_used_up(kept: Containers) -> None:
    for name in "abc":
        _create(kept, name)
    assert _code(_create, kept, "d") == "share"
    kept.delete(ME, "b")
    _create(kept, "d")


def test_container_that_runs_is_not_deleted(kept: Containers, engine: FakeEngine, ask: Callable[..., Step]) -> None:
    container = _create(kept, "a")
    ask().hears()
    assert _code(kept.delete, ME, "a") == "running"
    kept.stop(ME, "a")
    wait_until(lambda: kept.listed(ME)[0]["job"] is None, timeout_s=5, what="it is in no job")
    kept.delete(ME, "a")
    assert container not in engine.there


def test_what_is_busy_is_waited_for(kept: Containers, engine: FakeEngine) -> None:
    held, free = threading.Event(), threading.Event()
    engine.on["create"] = lambda: (held.set(), free.wait(10))
    creating = threading.Thread(target=_create, args=(kept, "a"))
    creating.start()
    assert held.wait(10)
    deleting = threading.Thread(target=kept.delete, args=(ME, "a"))
    deleting.start()
    deleting.join(0.1)
    assert deleting.is_alive()
    free.set()
    creating.join(10)
    deleting.join(10)
    assert not engine.there


# --- in a job --------------------------------------------------------------------------------------------------------


def test_container_is_made_runs_and_ends_with_its_status(
    kept: Containers, engine: FakeEngine, ask: Callable[..., Step]
) -> None:
    step = ask()
    container = step.hears()["container"]
    assert engine.there[container]["Configuration"]["HostConfig"]["Memory"] == 2**29
    assert kept.outcome(ME, JOB, timeout_s=1) == container
    assert kept.outcome(0, JOB, timeout_s=1) == container
    assert _code(kept.outcome, OTHER, JOB, timeout_s=0) == "job"
    assert kept.listed(ME)[0]["job"] == JOB
    engine.end(container, 3)
    assert step.hears() == {"type": "ended", "status": 3, "reason": ""}
    assert kept.listed(ME)[0]["job"] is None


def test_container_that_its_owner_stops_ends_well(
    kept: Containers, engine: FakeEngine, ask: Callable[..., Step]
) -> None:
    step = ask()
    step.hears()
    kept.stop(ME, "a")
    assert step.hears() == {"type": "ended", "status": 0, "reason": "stopped"}


def test_container_that_is_stopped_while_it_starts_does_not_run(
    kept: Containers, engine: FakeEngine, ask: Callable[..., Step]
) -> None:
    container = _create(kept, "a")
    engine.on["start"] = lambda: kept.stop(ME, "a")
    step = ask()
    assert step.hears()["type"] == "running"
    assert step.hears() == {"type": "ended", "status": 0, "reason": "stopped"}
    assert _status(engine, container) == "exited"


def test_container_is_stopped_when_its_step_goes_away(engine: FakeEngine, ask: Callable[..., Step]) -> None:
    step = ask()
    container = step.hears()["container"]
    step.end()
    assert _status(engine, container) == "exited"


@pytest.mark.parametrize("after", [None, GRANT._replace(stamp=(4, 5, 6))])
def test_container_is_stopped_when_its_job_ends(
    engine: FakeEngine, grants: FakeGrants, ask: Callable[..., Step], after: Grant | None
) -> None:
    step = ask()
    container = step.hears()["container"]
    if after:
        grants.known[JOB] = after
    else:
        del grants.known[JOB]
    assert step.hears() == {"type": "ended", "status": None, "reason": "the job ended"}
    assert _status(engine, container) == "exited"


@pytest.mark.parametrize("request_", [{"job": JOB + 1}, {"uid": OTHER}, {"uid": 0}])
def test_no_job_no_container(engine: FakeEngine, ask: Callable[..., Step], request_: dict[str, Any]) -> None:
    assert ask(**request_).refused() == "job"
    assert not engine.there


def test_refusal_is_known_to_whoever_asks_what_became_of_the_job(kept: Containers, ask: Callable[..., Step]) -> None:
    assert ask(image="debian").refused() == "image"
    assert _code(kept.outcome, ME, JOB, timeout_s=0) == "image"


def test_outcome_that_is_not_known_yet_is_waited_for(kept: Containers, ask: Callable[..., Step]) -> None:
    assert kept.outcome(ME, JOB, timeout_s=0) is None
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(kept.outcome, ME, JOB, timeout_s=10)
        assert ask().hears()["container"] == found.result(timeout=10)


def test_job_has_one_container(kept: Containers, engine: FakeEngine, ask: Callable[..., Step]) -> None:
    first = ask()
    first.hears()
    assert ask(name="b").refused() == "job"
    assert [found["Name"] for found in engine.there.values() if found["Status"] == "running"] == [f"u{ME}.a"]


def test_container_is_in_one_job(engine: FakeEngine, grants: FakeGrants, ask: Callable[..., Step]) -> None:
    grants.known[8] = GRANT
    container = ask().hears()["container"]
    assert ask(job=8).refused() == "running"
    assert _status(engine, container) == "running"


def test_container_that_must_be_there_is_not_made(engine: FakeEngine, ask: Callable[..., Step]) -> None:
    assert ask(image="").refused() == "name"
    assert ask(again=True).refused() == "name"
    assert not engine.there


def test_engine_that_fails_is_heard_and_the_next_start_is_free(
    kept: Containers, engine: FakeEngine, ask: Callable[..., Step]
) -> None:
    engine.fails["start"] = EngineError(500, "no room for it")
    assert ask().refused() == "engine"
    with pytest.raises(Refused, match="no room for it"):
        kept.outcome(ME, JOB, timeout_s=0)
    engine.fails.clear()
    assert ask().hears()["type"] == "running"


# --- another agent before --------------------------------------------------------------------------------------------


def test_container_of_an_earlier_agent_is_adopted(
    engine: FakeEngine, ask: Callable[..., Step], kept: Containers
) -> None:
    container = _create(kept, "a")
    engine.start(container)
    assert ask().refused() == "running", "only a step that had it may have it again"
    assert ask(again=True).hears() == {"type": "running", "container": container}
    assert _status(engine, container) == "running"
    assert engine.stopped.empty()


def test_container_that_runs_in_no_job_is_stopped(
    make: Callable[[], Containers], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make()
    container, idle = _create(first, "a"), _create(first, "b")
    engine.start(container)
    monkeypatch.setattr(containers, "_ADOPTION_S", 0)
    engine.fails["listed"] = EngineError(0, "it restarts")
    make()
    assert engine.stopped.empty()
    del engine.fails["listed"]
    assert engine.stopped.get(timeout=10) == container
    assert _status(engine, idle) == "created"


def test_engine_is_left_alone_while_something_is_measured(
    make: Callable[[], Containers], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_ADOPTION_S", 0)
    kept = make()
    container = _create(kept, "a")
    wait_until(lambda: not kept._unsure, timeout_s=10, what="the sweep of the start is over")
    monkeypatch.setattr(Quiet, "lasts", None)
    time.sleep(0.1)
    engine.on["listed"] = lambda: pytest.fail("it was asked")
    engine.start(container)
    time.sleep(0.3)
    assert engine.stopped.empty()
    del engine.on["listed"]
    monkeypatch.setattr(Quiet, "lasts", 0.0)
    assert engine.stopped.get(timeout=10) == container


def test_container_that_could_not_be_stopped_is_looked_for_also_while_something_is_measured(
    make: Callable[[], Containers], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_ADOPTION_S", 0)
    kept = make()
    step = Step(kept, ME, ASKED)
    container = step.hears()["container"]
    monkeypatch.setattr(Quiet, "lasts", None)
    engine.fails["stop"] = EngineError(0, "it restarts")
    step.end()
    assert _status(engine, container) == "running"
    del engine.fails["stop"]
    assert engine.stopped.get(timeout=10) == container


def test_container_in_a_job_is_not_swept(
    make: Callable[[], Containers], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_ADOPTION_S", 0)
    kept = make()
    step = Step(kept, ME, ASKED)
    container = step.hears()["container"]
    stray = _create(kept, "b")
    engine.start(stray)
    assert engine.stopped.get(timeout=10) == stray
    assert _status(engine, container) == "running"
    step.end()


# --- the disk --------------------------------------------------------------------------------------------------------


def test_who_has_written_too_much_is_stopped_and_starts_nothing(
    kept: Containers, engine: FakeEngine, ask: Callable[..., Step]
) -> None:
    full = _create(kept, "full")
    step = ask()
    container = step.hears()["container"]
    engine.there[full]["SizeRw"] = 6 * 2**20
    engine.there[container]["SizeRw"] = 5 * 2**20
    assert step.hears()["type"] == "ended"
    assert _status(engine, container) == "exited"
    assert ask().refused() == "disk"
    assert _code(_create, kept, "more") == "disk"
    kept.delete(ME, "full")
    assert ask().hears()["type"] == "running"


def test_disk_that_gets_full_fast_is_looked_at_before_it_is_time(
    make: Callable[[], Containers], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_mb = 1000.0
    monkeypatch.setattr(containers, "_DISK_LOOK_S", 3600)
    monkeypatch.setattr(containers, "_free_mb", lambda: free_mb)
    full = _create(make(), "full")
    kept = make()
    wait_until(lambda: kept._written_mb == {ME: 0}, timeout_s=5, what="the one time that it is looked")
    engine.there[full]["SizeRw"] = 11 * 2**20
    free_mb -= 11
    wait_until(lambda: _code_or_none(kept, ME) == "disk", timeout_s=5, what="it has been looked")


def test_disk_is_looked_at_also_beside_a_job_that_holds_no_container(
    engine: FakeEngine, ask: Callable[..., Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    container = ask().hears()["container"]
    monkeypatch.setattr(Quiet, "lasts", None)
    engine.there[container]["SizeRw"] = 11 * 2**20
    assert engine.stopped.get(timeout=10) == container


def test_who_deletes_something_that_is_small_has_still_written_too_much(kept: Containers, engine: FakeEngine) -> None:
    full, _ = _create(kept, "full"), _create(kept, "small")
    engine.there[full]["SizeRw"] = 11 * 2**20
    wait_until(lambda: _code_or_none(kept, ME) == "disk", timeout_s=5, what="it is too much")
    kept._measure_disk = lambda: None  # type: ignore[method-assign]
    kept.delete(ME, "small")
    assert _code_or_none(kept, ME) == "disk"


def test_what_others_have_written_counts_for_nobody_else(
    kept: Containers, engine: FakeEngine, ask: Callable[..., Step]
) -> None:
    full = _create(kept, "full", uid=OTHER, user="other")
    engine.there[full]["SizeRw"] = 2**40
    container = ask().hears()["container"]
    wait_until(lambda: _code_or_none(kept, OTHER) == "disk", timeout_s=5, what="the other has too much")
    assert _status(engine, container) == "running"


def _code_or_none(kept: Containers, uid: int) -> str | None:
    try:
        kept._check_disk(uid)
    except Refused as refused:
        return refused.code
    return None
