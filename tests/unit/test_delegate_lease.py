"""Leases, with a stand-in for srun that only runs what follows `--`."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from delegate_function import (
    BaseDelegate,
    CallCancelled,
    ConfigurationError,
    DelegateChain,
    DelegateFunctionException,
    JobRejected,
    JobTimeout,
    Lease,
    LeaseEnded,
    SlurmDelegate,
    SubprocessDelegate,
    TrivialDelegate,
    frames,
    lease,
    slurm,
)
from delegate_function.conversation import Conversation, Exchange
from delegate_function.errors import HopFailed
from live import wait_until
from stand_ins import hop_program, program

RUN = """
printf '%s\\n' "$@" >"$0.arguments"
while [[ $1 != -- ]]; do shift; done
shift
export SLURM_JOB_ID=17
exec "$@"
"""


class Guest:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def note(self, value: Any) -> int:
        self.seen.append(value)
        return os.getpid()

    def parent(self) -> int:
        return os.getppid()

    def nap(self, path: str) -> None:
        Path(path).touch()
        time.sleep(60)

    def shout(self, size: int) -> int:
        print("x" * size)
        return size

    def speak_and_nap(self) -> None:
        print("begun", flush=True)
        time.sleep(0.5)

    def fail(self) -> None:
        raise LookupError("here")

    def crash(self) -> None:
        os._exit(3)

    def interrupt_hop(self) -> None:
        """Do as Slurm does when others wait."""
        os.kill(os.getppid(), 10)
        time.sleep(0.5)


@pytest.fixture
def bin_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    program(directory, "srun", RUN)
    program(directory, "scontrol", "exit 1")
    program(directory, "scancel", f'echo "$@" >>{tmp_path}/cancelled')
    return directory


@pytest.fixture
def chain(bin_directory: Path, tmp_path: Path) -> BaseDelegate:
    return SlurmDelegate(delegate_executable_path=hop_program(tmp_path))


@pytest.fixture
def held(chain: BaseDelegate) -> Iterator[Lease]:
    with lease(chain, seconds=60, idle_s=30) as found:
        yield found


def test_calls_share_a_job_and_have_a_process_each(held: Lease) -> None:
    guest = Guest()
    processes = {held.invoke(guest, "note", number) for number in range(3)}
    assert len(processes) == 3
    assert guest.seen == [0, 1, 2]
    assert len({held.invoke(guest, "parent") for _ in range(3)}) == 1
    assert held.job_id == "17"
    assert held.last_call is not None
    assert [found["job"] for found in held.last_call.hops] == ["17"]


def test_job_is_asked_for_as_a_lease(held: Lease, bin_directory: Path) -> None:
    held.invoke(Guest(), "note", 0)
    arguments = (bin_directory / "srun.arguments").read_text().splitlines()
    assert {"--qos=lease", "--job-name=lease", "--time=3", "--signal=USR1@60"} <= set(arguments)


def test_what_the_chain_says_goes_before(bin_directory: Path, tmp_path: Path) -> None:
    chain = SlurmDelegate(delegate_executable_path=hop_program(tmp_path), qos="mine", time=9)
    with lease(chain, qos=None) as held:
        held.invoke(Guest(), "note", 0)
    assert {"--qos=mine", "--time=9"} <= set((bin_directory / "srun.arguments").read_text().splitlines())


def test_end_of_the_block_gives_the_job_back_without_cancelling_it(chain: BaseDelegate, tmp_path: Path) -> None:
    with lease(chain) as held:
        process = held.invoke(Guest(), "parent")
    assert held.is_over
    assert not Path(f"/proc/{process}").exists()
    assert not (tmp_path / "cancelled").exists()
    with pytest.raises(LeaseEnded, match="given back"):
        held.invoke(Guest(), "note", 0)


def test_errors_of_a_call_leave_the_lease_as_it_is(held: Lease) -> None:
    with pytest.raises(LookupError, match="here"):
        held.invoke(Guest(), "fail")
    with pytest.raises(DelegateFunctionException, match="status 3"):
        held.invoke(Guest(), "crash")
    with pytest.raises(AttributeError):
        held.invoke(Guest(), "nothing")
    assert held.invoke(Guest(), "note", 0)


def test_long_output_of_one_call_is_none_of_the_next_one_s(held: Lease, capsys: pytest.CaptureFixture[str]) -> None:
    for size in (3_000_000, 10, 2_000_000):
        assert held.invoke(Guest(), "shout", size) == size
        assert len(capsys.readouterr().out) == size + 1


def test_cancelled_call_ends_and_the_lease_goes_on(held: Lease, tmp_path: Path) -> None:
    started = tmp_path / "started"
    raised: list[BaseException] = []

    def call() -> None:
        try:
            held.invoke(Guest(), "nap", str(started))
        except DelegateFunctionException as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(started.exists, timeout_s=10, what="the call runs")
    began = time.monotonic()
    held.cancel()
    thread.join(5)
    assert time.monotonic() - began < 2
    assert isinstance(raised[0], CallCancelled)
    assert held.invoke(Guest(), "note", 0)


def test_call_whose_job_still_waits_can_be_cancelled(chain: BaseDelegate, bin_directory: Path) -> None:
    program(bin_directory, "srun", "exec sleep 60")
    held = lease(chain)
    held.start()
    threading.Timer(0.3, held.cancel).start()
    with pytest.raises(CallCancelled, match="before it ran"):
        held.invoke(Guest(), "note", 0)
    assert held.is_over


class Unwilling:
    """A stream whose reader interrupts whoever writes."""

    def write(self, text: str) -> None:
        raise KeyboardInterrupt


def test_interrupted_caller_ends_the_call_alone(held: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Unwilling())
    with pytest.raises(KeyboardInterrupt):
        held.invoke(Guest(), "shout", 10)
    monkeypatch.undo()
    assert held.invoke(Guest(), "note", 0)


def test_caller_interrupted_once_its_call_is_sent_ends_the_call_alone(
    held: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = held.invoke(Guest(), "parent")
    begin = Conversation.begin

    def interrupted(*arguments: Any) -> None:
        begin(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Conversation, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            held.invoke(Guest(), "shout", 10)
    assert held.invoke(Guest(), "parent") == process


def test_caller_interrupted_while_it_ends_a_call_ends_the_lease(held: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    held.invoke(Guest(), "note", 0)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", Unwilling())
        patched.setattr(Conversation, "say", interrupted)
        with pytest.raises(KeyboardInterrupt):
            held.invoke(Guest(), "shout", 10)
    assert held.is_over
    with pytest.raises(LeaseEnded):
        held.invoke(Guest(), "note", 0)


def test_value_of_a_call_that_was_given_up_is_not_the_next_one_s(held: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    held.invoke(Guest(), "note", 0)
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", Unwilling())
        patched.setattr(Exchange, "cancel", lambda exchange: None)
        with pytest.raises(KeyboardInterrupt):
            held.invoke(Guest(), "speak_and_nap")
    with pytest.raises(LeaseEnded, match="given up") as raised:
        held.invoke(Guest(), "note", 0)
    assert raised.value.details["reason"] == "lost"


def test_interrupt_while_a_lease_is_started_leaves_no_job(chain: BaseDelegate, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    held = lease(chain)

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            held.start()
    assert held.is_over


def test_forked_process_has_no_part_in_a_lease(held: Lease) -> None:
    held.invoke(Guest(), "note", 0)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        said = []
        for use in (lambda: held.invoke(Guest(), "note", 0), held.wait):
            try:
                use()
            except RuntimeError as error:
                said.append("forked" in str(error))
        held.cancel()
        held.close()
        os._exit(7 if said == [True, True] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert held.invoke(Guest(), "note", 0)


def test_job_that_cannot_be_taken_away_keeps_nobody_waiting(
    chain: BaseDelegate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(job_id: str) -> None:
        raise HopFailed(f"job {job_id} could not be cancelled")

    monkeypatch.setattr(slurm, "cancel", silent)
    held = lease(chain)
    process = held.invoke(Guest(), "parent")
    raised: list[BaseException] = []

    def call() -> None:
        try:
            held.invoke(Guest(), "nap", str(tmp_path / "started"))
        except HopFailed as error:
            raised.append(error)

    threading.Thread(target=call, daemon=True).start()
    wait_until((tmp_path / "started").exists, timeout_s=10, what="it runs")
    os.kill(process, 9)
    [error] = wait_until(lambda: raised, timeout_s=10, what="it has come to its end")
    assert "cancelled" not in str(error), "what came first is told"
    assert held.is_over


def test_idle_lease_ends(chain: BaseDelegate) -> None:
    with lease(chain, idle_s=0.4) as held:
        held.invoke(Guest(), "note", 0)
        wait_until(lambda: held.is_over, timeout_s=5, what="the lease is over")
        with pytest.raises(LeaseEnded, match=r"idle for 0\.4 s") as raised:
            held.invoke(Guest(), "note", 0)
    assert raised.value.details["reason"] == "idle"


def test_lease_s_time_ends_a_call_and_then_the_lease(chain: BaseDelegate, tmp_path: Path) -> None:
    with lease(chain, seconds=1) as held:
        began = time.monotonic()
        with pytest.raises(JobTimeout, match="the lease's 1 s are up"):
            held.invoke(Guest(), "nap", str(tmp_path / "started"))
        assert time.monotonic() - began < 4
        with pytest.raises(LeaseEnded) as raised:
            held.invoke(Guest(), "note", 0)
    assert raised.value.details["reason"] == "time"


def test_lease_whose_place_is_wanted_before_its_hop_is_ready_ends_after_its_call(
    chain: BaseDelegate, bin_directory: Path, tmp_path: Path
) -> None:
    slow = (tmp_path / "hop").read_text().replace("import sys;", "import sys, time; time.sleep(0.5);")
    (tmp_path / "hop").write_text(slow)
    program(bin_directory, "srun", RUN.replace('exec "$@"', '"$@" <&0 & sleep 0.2; kill -USR1 $!; wait $!'))
    with lease(chain) as held:
        held.invoke(Guest(), "note", 0)
        with pytest.raises(LeaseEnded, match="others wait"):
            held.invoke(Guest(), "note", 0)


def test_lease_whose_place_is_wanted_ends_after_its_call(held: Lease) -> None:
    held.invoke(Guest(), "interrupt_hop")
    with pytest.raises(LeaseEnded, match="others wait") as raised:
        held.invoke(Guest(), "note", 0)
    assert raised.value.details["reason"] == "preempted"


def test_killed_job_ends_the_call_with_an_error_and_the_lease(held: Lease, tmp_path: Path) -> None:
    process = held.invoke(Guest(), "parent")
    started = tmp_path / "started"
    killer = threading.Thread(
        target=lambda: (wait_until(started.exists, timeout_s=10, what="it runs"), os.kill(process, 9))
    )
    killer.start()
    with pytest.raises(DelegateFunctionException) as raised:
        held.invoke(Guest(), "nap", str(started))
    killer.join()
    assert not isinstance(raised.value, LeaseEnded)
    with pytest.raises(LeaseEnded) as after:
        held.invoke(Guest(), "note", 0)
    assert after.value.details["reason"] == "lost"


def test_rejected_job_is_told_as_such_however_often_one_asks(chain: BaseDelegate, bin_directory: Path) -> None:
    program(bin_directory, "srun", "echo 'srun: error: Unable to allocate resources: Invalid qos' >&2; exit 1")
    held = lease(chain)
    for _ in range(2):
        with pytest.raises(JobRejected, match="Invalid qos"):
            held.invoke(Guest(), "note", 0)


def test_silent_caller_loses_its_job(chain: BaseDelegate, tmp_path: Path) -> None:
    held = lease(chain)
    hop_process = held.invoke(Guest(), "parent")
    conversation = held._conversation
    assert conversation is not None
    assert conversation.process is not None
    conversation.process.link._beats = False
    wait_until((tmp_path / "cancelled").exists, timeout_s=frames.SILENCE_S + 3, what="the hop cancels its job")
    wait_until(lambda: not Path(f"/proc/{hop_process}").exists(), timeout_s=5, what="the hop is gone")
    assert (tmp_path / "cancelled").read_text().split() == ["17"]


def test_threads_take_turns(held: Lease) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(held.invoke(Guest(), "note", 0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(set(found)) == 4


@pytest.mark.parametrize("wrong", [TrivialDelegate(), SubprocessDelegate(SlurmDelegate())])
def test_lease_needs_a_job_to_hold(wrong: BaseDelegate) -> None:
    with pytest.raises(ConfigurationError, match="begins with SlurmDelegate"):
        lease(wrong)


@pytest.mark.parametrize("options", [{"seconds": 0}, {"idle_s": -1}, {"seconds": "9"}, {"seconds": float("inf")}])
def test_lease_needs_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="greater than 0"):
        lease(**options)


def test_lease_is_no_part_of_a_chain(chain: BaseDelegate) -> None:
    outer = DelegateChain(TrivialDelegate)(subdelegate=lease(chain))
    with pytest.raises(ConfigurationError, match="no part of a chain"):
        outer.invoke(Guest(), "note", 0)
