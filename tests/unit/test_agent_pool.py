"""The pool's decisions, with sandboxes that only say what was done to them; and when a machine counts as quiet."""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent import duty, wire
from agent.engine import EngineError
from agent.grants import Grant, Grants
from agent.policy import Limits, Profile
from agent.pool import Pool
from agent.quiet import Quiet
from agent.sandboxes import Abandoned, State
from live import wait_until

LIMITS = Limits(10, 256, 64, "job", 128, 16, 64, 1000, 4)


class Sandbox:
    """What the pool sees of a sandbox: it boots when `boots` is set."""

    def __init__(self, maker: "Sandboxes", profile: Profile, limits: Limits, cpus: str) -> None:
        self.container = os.urandom(32).hex()
        self.profile, self.limits, self.cpus = profile, limits, cpus
        self.state = State.MADE
        self.connection, self.process = socket.socketpair()
        self.said: list[str] = []
        self.asked: State | None = None
        self._maker = maker

    def start(self) -> None:
        self.said.append("started")
        if self._maker.problem:
            raise self._maker.problem

    def wait_until(self, wanted: State, *, timeout_s: float, wake: int) -> bool:
        self.asked = wanted
        if self.state is State.MADE:
            ready, _, _ = select.select([wake, self._maker.boots], [], [], timeout_s)
            if wake in ready:
                return False
            self.state = State.CONNECTED
        if wanted is State.READY:
            ready, _, _ = select.select([wake, self._maker.prepares], [], [], timeout_s)
            if wake in ready:
                return False
            self.state = State.READY
        return True

    def is_well(self) -> bool:
        self.connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.connection.recv(1)
            return False
        return self.state is State.READY

    def freeze(self) -> None:
        self.said.append("frozen")

    def thaw(self) -> None:
        self.said.append("thawed")

    def lower(self, limits: Limits, cpus: str) -> None:
        self.limits, self.cpus = limits, cpus


class Sandboxes:
    """Makes such sandboxes; they boot, and prepare themselves, as soon as `boot` was called."""

    def __init__(self) -> None:
        self.made: list[Sandbox] = []
        self.made_at: list[float] = []
        self.destroyed: list[Sandbox] = []
        self.problem: Exception | None = None
        self.boots, self._boot = os.pipe()
        self.prepares, self._prepare = os.pipe()

    def boot(self, *, prepare: bool = True) -> None:
        os.write(self._boot, b"x")
        if prepare:
            os.write(self._prepare, b"x")

    def create(self, profile: Profile, limits: Limits, *, cpus: str) -> Sandbox:
        self.made_at.append(time.monotonic())
        self.made.append(Sandbox(self, profile, limits, cpus))
        return self.made[-1]

    def destroy(self, sandbox: Sandbox) -> None:
        sandbox.state = State.GONE
        self.destroyed.append(sandbox)


class Machine:
    """A pool of three, its grants, and who waits for a sandbox."""

    def __init__(self, directory: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
        self.directory = directory
        self.grants = Grants(directory, owner=os.getuid())
        self.quiet = Quiet(self.grants)
        self.sandboxes = Sandboxes()
        self.profile = profile
        self.waiter, self.caller = socket.socketpair()
        self.pool = Pool(self.sandboxes, self.grants, self.quiet, [profile])  # type: ignore[arg-type]

    def grant(self, job: int) -> None:
        (self.directory / f".{job}").write_text("2001")
        (self.directory / f".{job}").rename(self.directory / str(job))

    def revoke(self, job: int) -> None:
        (self.directory / str(job)).unlink()

    def take(self, *, job: int = 1, limits: Limits = LIMITS, becomes: State = State.SERVING) -> Any:
        """Have a call served, and return the sandbox that it had."""
        grant = self.grants.find(job) or Grant(2001, "", (0, 0, 0))
        call = {"waiter": self.waiter, "job": job, "grant": grant}
        with self.pool.sandbox(self.profile, limits, cpus="", **call) as sandbox:  # type: ignore[arg-type]
            sandbox.state = becomes
        return sandbox

    def wait_until_full(self) -> None:
        def full() -> bool:
            return sum(sandbox.state is State.READY for sandbox in self.sandboxes.made) == self.profile.pool

        self.wait_for("all that shall wait do", full)

    def wait_for(self, what: str, ready: Any) -> None:
        wait_until(ready, timeout_s=5, interval_s=0.005, what=what)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(tmp_path, Profile("default", "image", ("python3",), LIMITS, pool=3), monkeypatch)
    yield made
    made.pool.close()
    made.sandboxes.boot()


def test_it_is_filled_by_as_many_at_once_as_there_are_cpus(machine: Machine) -> None:
    machine.wait_for("two are made", lambda: len(machine.sandboxes.made) == 2)
    machine.sandboxes.boot()
    machine.wait_until_full()
    assert len(machine.sandboxes.made) == 3
    assert len({machine.take().container for _ in range(3)}) == 3
    machine.wait_until_full()
    assert len(machine.sandboxes.made) == 6


def test_nothing_is_made_while_a_job_is_there(machine: Machine) -> None:
    machine.sandboxes.boot()
    machine.wait_until_full()
    machine.grant(7)
    taken = [machine.take(job=7) for _ in range(3)]
    assert {*machine.sandboxes.made} == {*taken}
    made_for_a_call = machine.take(job=7)
    assert {*machine.sandboxes.made} == {*taken, made_for_a_call}
    machine.revoke(7)
    machine.wait_until_full()
    assert len(machine.sandboxes.made) == 7


def test_what_is_half_made_stands_still_and_goes_on(machine: Machine) -> None:
    machine.wait_for("both started", lambda: [s.said for s in machine.sandboxes.made] == [["started"]] * 2)
    machine.grant(7)
    machine.wait_for("both frozen", lambda: all(s.said == ["started", "frozen"] for s in machine.sandboxes.made))
    machine.sandboxes.boot()
    taken = machine.take(job=7)
    assert taken.said == ["started", "frozen", "thawed"]
    [other] = {*machine.sandboxes.made} - {taken}
    assert other.said == ["started", "frozen"]
    machine.revoke(7)
    machine.wait_for("the other goes on", lambda: other.said == ["started", "frozen", "thawed"])
    machine.wait_until_full()


def test_a_call_that_begins_makes_the_others_stand_still(machine: Machine) -> None:
    machine.wait_for("both started", lambda: [s.said for s in machine.sandboxes.made] == [["started"]] * 2)
    with machine.quiet.broken():
        machine.wait_for("both frozen", lambda: all("frozen" in s.said for s in machine.sandboxes.made))
    machine.wait_for("both go on", lambda: all("thawed" in s.said for s in machine.sandboxes.made))


def test_within_a_lease_only_a_call_that_is_served_breaks_the_quiet(machine: Machine) -> None:
    machine.sandboxes.boot()
    machine.wait_until_full()
    machine.grant(7)
    grant = machine.grants.find(7)
    assert grant
    with machine.quiet.lease(7, grant):
        call = {"waiter": machine.waiter, "job": 7, "grant": grant}
        with machine.pool.sandbox(machine.profile, LIMITS, cpus="", **call):  # type: ignore[arg-type]
            assert machine.quiet.lasted_s() is None
        assert machine.quiet.lasted_s() is not None
        machine.wait_until_full()


@pytest.fixture
def used_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Sandbox]]:
    """Have the pool used up by the calls of a lease, job 7, that follow each other at once; return what they had."""
    machine.sandboxes.boot()
    machine.wait_until_full()
    machine.grant(7)
    grant = machine.grants.find(7)
    assert grant
    monkeypatch.setattr("agent.pool._SETTLE_S", 60)
    with machine.quiet.lease(7, grant):
        yield [machine.take(job=7, becomes=State.SERVED) for _ in range(3)]


ASKED = LIMITS.lowered(1, 128)
"""What a call asks for, so that what is made for it can be told from what is made beside it."""


def _slow_engine(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, *, own: Callable[[], bool], beside: Callable[[], bool]
) -> None:
    """Have the engine be done with the sandbox of the call that waits, and with others, when that is so."""
    starts = Sandbox.start

    def slow(sandbox: Sandbox) -> None:
        starts(sandbox)
        machine.wait_for("the engine is done", own if sandbox.limits == ASKED else beside)

    monkeypatch.setattr(Sandbox, "start", slow)


def test_while_a_call_of_a_lease_waits_another_is_made_beside_it_for_the_next(
    machine: Machine, used_up: list[Sandbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    def others() -> list[Sandbox]:
        return [sandbox for sandbox in machine.sandboxes.made[3:] if sandbox.limits != ASKED]

    def is_all_done() -> bool:
        return machine.sandboxes.destroyed == used_up and ["frozen"] in [other.said[1:] for other in others()]

    _slow_engine(monkeypatch, machine, own=is_all_done, beside=lambda: True)
    assert machine.take(job=7, limits=ASKED, becomes=State.SERVED).said == ["started"]
    [beside] = others()
    assert (beside.asked, beside.said) == (State.CONNECTED, ["started", "frozen"]), "imports can wait"
    thaws = Sandbox.thaw
    monkeypatch.setattr(Sandbox, "thaw", lambda sandbox: (thaws(sandbox), time.sleep(0.1)))  # the pool looks meanwhile
    assert machine.take(job=7, becomes=State.SERVED) is beside
    assert beside.said == ["started", "frozen", "thawed"]
    assert others() == [beside], "whoever finds one does not wait for more"
    monkeypatch.setattr("agent.pool._SETTLE_S", 0.02)
    os.eventfd_write(machine.pool._wake, 1)  # it may be asleep for as long as that was before
    machine.wait_until_full()


@pytest.mark.usefixtures("used_up")
def test_a_call_that_waited_begins_when_what_was_begun_beside_it_has_come_to_rest(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()
    _slow_engine(monkeypatch, machine, own=begun.is_set, beside=lambda: begun.set() or ended.is_set())  # type: ignore[func-returns-value]
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(machine.take, job=7, limits=ASKED)
        assert begun.wait(5)
        with pytest.raises(TimeoutError):
            call.result(0.3)
        ended.set()
        assert call.result(0.5).said == ["started"]


def test_a_call_gets_what_it_asked_for(machine: Machine) -> None:
    machine.sandboxes.boot()
    machine.wait_until_full()
    machine.grant(7)
    assert (machine.take(job=7).limits, machine.take(job=7, limits=ASKED).limits) == (LIMITS, ASKED)


def test_whoever_waited_and_left_leaves_an_unused_one(machine: Machine) -> None:
    machine.wait_for("both started", lambda: [s.said for s in machine.sandboxes.made] == [["started"]] * 2)
    machine.caller.close()
    with pytest.raises(Abandoned):
        machine.take()
    machine.sandboxes.boot()
    machine.wait_until_full()
    assert machine.sandboxes.destroyed == []


def test_one_that_is_made_because_a_call_waits_prepares_nothing(machine: Machine) -> None:
    machine.sandboxes.boot()
    machine.wait_until_full()
    machine.grant(7)
    ready = [machine.take(job=7, becomes=State.SERVED) for _ in range(3)]
    assert [sandbox.asked for sandbox in ready] == [State.READY] * 3
    assert machine.take(job=7).asked is State.CONNECTED


def test_a_half_made_one_that_a_call_takes_need_not_be_prepared(machine: Machine) -> None:
    machine.sandboxes.boot(prepare=False)
    machine.wait_for("both are connected", lambda: [s.state for s in machine.sandboxes.made] == [State.CONNECTED] * 2)
    machine.grant(7)
    taken = machine.take(job=7)
    assert taken in machine.sandboxes.made[:2]
    assert taken.asked is State.CONNECTED


def test_one_whose_call_left_before_it_was_prepared_is_not_kept(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    early = machine.sandboxes.create(machine.profile, LIMITS, cpus="")
    early.state = State.CONNECTED
    machine.pool._keep_ready(early)  # type: ignore[arg-type]
    machine.wait_for("it is removed", lambda: machine.sandboxes.destroyed == [early])
    assert caplog.text == "", "it is not taken for one that has died"


def test_a_used_one_is_removed_in_quiet_times_or_with_its_job(machine: Machine) -> None:
    machine.sandboxes.boot()
    machine.wait_until_full()
    machine.grant(7)
    machine.grant(8)
    first, second = (machine.take(job=job, becomes=State.SERVED) for job in (7, 8))
    assert machine.sandboxes.destroyed == []
    machine.revoke(7)
    machine.wait_for("the first is removed", lambda: machine.sandboxes.destroyed == [first])
    grant = machine.grants.find(8)
    assert grant
    with machine.quiet.lease(8, grant):
        machine.wait_for("the second too", lambda: machine.sandboxes.destroyed == [first, second])


def test_no_more_than_so_many_used_ones_wait(machine: Machine) -> None:
    machine.sandboxes.boot()
    machine.grant(7)
    used = [machine.take(job=7, becomes=State.SERVED) for _ in range(12)]
    machine.wait_for("the oldest are removed", lambda: machine.sandboxes.destroyed == used[:4])


def test_what_may_still_run_is_removed_at_once(machine: Machine) -> None:
    machine.sandboxes.boot()
    machine.grant(7)
    sandbox = machine.take(job=7)
    machine.wait_for("it is removed", lambda: machine.sandboxes.destroyed == [sandbox])


def test_what_cannot_be_made_is_said_once_and_tried_ever_less_often(
    machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.pool._FIRST_RETRY_S", 0.02)
    machine.sandboxes.boot()
    machine.wait_until_full()
    machine.sandboxes.problem = EngineError(500, "no space left")
    with caplog.at_level("INFO", "agent"):
        machine.take()
        machine.wait_for("it was tried four times", lambda: len(machine.sandboxes.made) >= 7)
        machine.sandboxes.problem = None
        machine.wait_until_full()
    first, second, third, fourth = machine.sandboxes.made_at[3:7]
    assert second - first >= 0.02
    assert third - second >= 0.04
    assert fourth - third >= 0.08
    said = [record.getMessage() for record in caplog.records]
    assert sum("no space left" in text for text in said) == 1
    assert sum("can be made again" in text for text in said) == 1


def test_a_call_whose_half_made_one_meets_a_fault_of_ours_goes_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    boots = Sandbox.wait_until

    def broken(sandbox: Sandbox, wanted: State, *, timeout_s: float, wake: int) -> bool:
        boots(sandbox, wanted, timeout_s=timeout_s, wake=wake)
        monkeypatch.setattr(Sandbox, "wait_until", boots)
        raise LookupError("a fault")

    machine.wait_for("two are being made", lambda: sum(one.asked is not None for one in machine.sandboxes.made) == 2)
    monkeypatch.setattr(Sandbox, "wait_until", broken)
    threading.Timer(0.1, machine.sandboxes.boot).start()
    assert machine.take().state is not State.GONE
    machine.wait_for("it is said", lambda: "LookupError: a fault" in caplog.text)


def test_a_thread_that_the_agent_cannot_do_without_ends_it_when_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    told: list[int] = []
    before = signal.signal(duty.FAILED, lambda number, _: told.append(number))
    try:
        duty.begin(lambda: [].pop(), "keep")
        wait_until(lambda: told == [duty.FAILED], timeout_s=5, what="it was told")
    finally:
        signal.signal(duty.FAILED, before)
    assert "its thread keep failed" in caplog.text
    assert "IndexError: pop from empty list" in caplog.text


def test_one_that_dies_while_it_waits_is_replaced(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.pool._FIRST_RETRY_S", 0.02)
    machine.sandboxes.boot()
    machine.wait_until_full()
    dead = machine.sandboxes.made[1]
    dead.process.close()
    machine.wait_for("it is removed", lambda: machine.sandboxes.destroyed == [dead])
    machine.wait_until_full()
    assert dead not in [machine.take() for _ in range(3)]


def test_a_machine_is_quiet_without_jobs_and_between_the_calls_of_a_lease(tmp_path: Path) -> None:
    (tmp_path / "garbage").write_text("2001")
    (tmp_path / "9").write_text("no grant")
    grants = Grants(tmp_path, owner=os.getuid())
    quiet = Quiet(grants)
    assert quiet.lasted_s() == 0.0
    assert (quiet.lasted_s() or 0) > 0
    (tmp_path / "7").write_text("2001")
    assert quiet.lasted_s() is None
    grant = grants.find(7)
    assert grant
    with quiet.lease(7, grant):
        assert quiet.lasted_s() == 0.0
        with quiet.broken(), quiet.broken():
            assert quiet.lasted_s() is None
        assert quiet.lasted_s() == 0.0
        with pytest.raises(wire.Refused, match="held already"), quiet.lease(7, grant):
            pass
        (tmp_path / "8").write_text("2001")
        assert quiet.lasted_s() is None, "another job's"
        (tmp_path / "8").unlink()
        (tmp_path / "again").write_text("2001")
        (tmp_path / "again").rename(tmp_path / "7")
        assert quiet.lasted_s() is None, "another grant for the same job"
    assert quiet.lasted_s() is None


def test_who_asks_for_much_waits_while_something_is_measured_and_delays_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace_s = 0.2
    monkeypatch.setattr("agent.quiet._PACE_S", pace_s)
    monkeypatch.setattr("agent.quiet._AT_ONCE", 3)
    quiet = Quiet(Grants(tmp_path, owner=os.getuid()))

    def waited_s(uid: int, times: int) -> float:
        began = time.monotonic()
        with ThreadPoolExecutor(times) as pool:
            list(pool.map(quiet.give_way, [uid] * times))
        return time.monotonic() - began

    assert waited_s(2001, 20) < pace_s, "nothing is measured"
    (tmp_path / "7").write_text("2003")
    assert waited_s(2001, 3) < pace_s, "so much is done at once"
    assert waited_s(2001, 4) >= 3 * pace_s
    assert waited_s(2002, 3) < pace_s, "another has asked for nothing yet"
    time.sleep(3 * pace_s)
    assert waited_s(2001, 3) < pace_s, "who has been at rest may ask again"


def test_a_change_is_announced(tmp_path: Path) -> None:
    quiet = Quiet(Grants(tmp_path, owner=os.getuid()))
    said = threading.Semaphore(0)
    quiet.on_change = said.release  # type: ignore[assignment]
    with quiet.broken():
        assert said.acquire(timeout=1)
    assert said.acquire(timeout=1)
