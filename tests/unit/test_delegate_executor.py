"""Many calls at once, through real processes and with a stand-in for srun that only runs what follows `--`."""

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from delegate_function import (
    BaseDelegate,
    CallNotSent,
    ConfigurationError,
    DelegateFunctionException,
    Executor,
    JobRejected,
    LeaseEnded,
    RemoteError,
    ResultNotReturned,
    SlurmDelegate,
    SourceCode,
    SubprocessDelegate,
    TrivialDelegate,
    workers,
)
from live import wait_until
from stand_ins import SRC, hop_program, program

RUN = """
echo "$$" >>"$0.jobs"
while [[ $1 != -- ]]; do shift; done
shift
export SLURM_JOB_ID=17
"$@"
status=$?
echo "$$" >>"$0.ended"
exit $status
"""
TRAPPED = """
trap 'echo "$$" >>"$0.ended"; exit 1' TERM
echo "$$" >>"$0.jobs"
sleep 60 & wait
"""


def square(number: int) -> int:
    return number * number


def job() -> int:
    """Return the process that stands for the job."""
    return os.getppid()


def nap(path: Path, seconds: float = 60) -> int:
    (path / str(os.getpid())).touch()
    time.sleep(seconds)
    return os.getppid()


def fail(error: BaseException) -> None:
    raise error


def end_job(path: Path) -> None:
    """Do as Slurm does to a job that is cancelled."""
    path.touch()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def make_way() -> int:
    """Do as Slurm does to a lease for whose node others wait."""
    os.kill(os.getppid(), signal.SIGUSR1)
    time.sleep(0.3)
    return os.getppid()


class Jobs:
    """What the stand-in for srun was asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cancelled = directory / "cancelled"
        program(directory, "scontrol", "exit 1")
        program(directory, "scancel", f'echo "$@" >>{self.cancelled}')
        self.behave(RUN)

    def behave(self, text: str) -> None:
        program(self.directory, "srun", text)

    def _count(self, name: str) -> int:
        file = self.directory / name
        return len(file.read_text().split()) if file.exists() else 0

    @property
    def begun(self) -> int:
        return self._count("srun.jobs")

    @property
    def ended(self) -> int:
        return self._count("srun.ended")


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return Jobs(directory)


@pytest.fixture
def chain(jobs: Jobs, tmp_path: Path) -> BaseDelegate:
    return SlurmDelegate(delegate_executable_path=hop_program(tmp_path))


@pytest.fixture
def naps(tmp_path: Path) -> Path:
    path = tmp_path / "naps"
    path.mkdir()
    return path


@pytest.fixture
def executor(chain: BaseDelegate) -> Iterator[Executor]:
    with Executor(chain, max_workers=2, idle_s=0.5, turn_s=60) as found:
        yield found


def asleep(naps: Path) -> list[int]:
    return [int(file.name) for file in naps.iterdir()]


def is_gone(process: int) -> bool:
    return not Path(f"/proc/{process}").exists()


def test_standard_library_takes_the_futures() -> None:
    async def awaited(executor: Executor) -> int:
        return await asyncio.wrap_future(executor.submit(square, 5))

    with Executor(SubprocessDelegate(), max_workers=2) as executor:
        assert list(executor.map(square, range(4))) == [0, 1, 4, 9]
        futures = [executor.submit(square, number=number) for number in (2, 3)]
        assert sorted(future.result() for future in concurrent.futures.as_completed(futures)) == [4, 9]
        assert concurrent.futures.wait(futures).not_done == set()
        assert asyncio.run(awaited(executor)) == 25
        failing = executor.submit(fail, LookupError("here"))
        assert isinstance(failing.exception(10), LookupError)
        late = executor.submit(time.sleep, 30)
        with pytest.raises(TimeoutError):
            late.result(0.2)
        late.cancel()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 1)


def test_what_is_known_of_a_call_is_its_future_s(executor: Executor) -> None:
    futures = [executor.submit(square, number) for number in range(3)]
    for future in futures:
        future.result(20)
        assert future.call is not None
        assert future.call.job_id == "17"
    assert len({id(future.call) for future in futures}) == 3


def test_many_calls_share_few_jobs(executor: Executor, jobs: Jobs) -> None:
    futures = [executor.submit(job) for _ in range(20)]
    processes = {future.result(30) for future in futures}
    assert 1 <= len(processes) <= 2
    assert jobs.begun == len(processes)


def test_one_call_after_the_other_needs_one_job(executor: Executor, jobs: Jobs) -> None:
    assert len({executor.submit(job).result(20) for _ in range(8)}) == 1
    assert jobs.begun == 1


def test_arguments_do_not_come_back(executor: Executor) -> None:
    class Once:
        def __reduce__(self) -> Any:
            if os.environ.get("SLURM_JOB_ID"):
                raise ValueError("it would travel back")
            return Once, ()

    assert executor.submit(lambda *found: len(found), Once(), Once()).result(20) == 2


def test_running_call_is_cancelled_and_its_job_goes_on(executor: Executor, jobs: Jobs, naps: Path) -> None:
    long = [executor.submit(nap, naps) for _ in range(2)]
    after = [executor.submit(job) for _ in range(3)]
    [first, second] = wait_until(lambda: len(asleep(naps)) == 2 and asleep(naps), timeout_s=20, what="both run")
    assert all(future.running() for future in long)
    assert not any(future.running() for future in after)
    started = time.monotonic()
    assert all(future.cancel() for future in long)
    assert concurrent.futures.wait(long, timeout=0).not_done == set()
    wait_until(lambda: is_gone(first) and is_gone(second), timeout_s=2, what="the calls are gone")
    with pytest.raises(concurrent.futures.CancelledError):
        long[0].result()
    assert all(future.result(20) for future in after)
    assert time.monotonic() - started < 4
    assert jobs.begun == 2


def test_job_of_a_cancelled_call_is_given_back_at_once(chain: BaseDelegate, jobs: Jobs, naps: Path) -> None:
    with Executor(chain, idle_s=60) as executor:
        future = executor.submit(nap, naps)
        wait_until(lambda: asleep(naps), timeout_s=20, what="it runs")
        future.cancel()
        wait_until(lambda: jobs.ended == 1, timeout_s=2, what="the job has ended")
    assert not jobs.cancelled.exists(), "it ended by itself"


def test_call_is_cancelled_before_it_begins(chain: BaseDelegate, jobs: Jobs) -> None:
    jobs.behave(TRAPPED)
    with Executor(chain, max_workers=2) as executor:
        futures = [executor.submit(square, number) for number in range(4)]
        wait_until(lambda: jobs.begun == 2, timeout_s=10, what="two jobs wait")
        assert not futures[0].running()
        for future in futures:
            assert future.cancel()
        wait_until(lambda: jobs.ended == 2, timeout_s=5, what="no job waits any more")


def test_cancel_while_a_call_is_packed(executor: Executor, naps: Path) -> None:
    packing, go_on = threading.Event(), threading.Event()

    class Slow:
        def __reduce__(self) -> Any:
            packing.set()
            go_on.wait(20)
            return nap, (naps, 60)

    future = executor.submit(lambda found: found, Slow())
    assert packing.wait(20)
    assert future.cancel()
    go_on.set()
    assert executor.submit(square, 3).result(10) == 9, "nothing is in its way"


def test_idle_job_is_given_back_and_another_one_asked_for(chain: BaseDelegate, jobs: Jobs) -> None:
    with Executor(chain, idle_s=0.2) as executor:
        first = executor.submit(job).result(20)
        wait_until(lambda: jobs.ended == 1, timeout_s=5, what="the job has ended")
        assert executor.submit(job).result(20) != first
    assert jobs.begun == jobs.ended == 2


def test_others_get_their_turn(chain: BaseDelegate, jobs: Jobs) -> None:
    with Executor(chain, max_workers=1, turn_s=0.3) as executor:
        futures = [executor.submit(time.sleep, 0.2) for _ in range(6)]
        concurrent.futures.wait(futures, 30)
    assert all(future.exception() is None for future in futures)
    assert 3 <= jobs.begun <= 6


def test_call_before_which_a_lease_ended_is_made_in_another(chain: BaseDelegate, jobs: Jobs) -> None:
    with Executor(chain, max_workers=1) as executor:
        futures = [executor.submit(call) for call in (make_way, job, make_way, job)]
        processes = [future.result(30) for future in futures]
    assert len(set(processes)) == 3
    assert jobs.begun == 3


def test_lost_job_fails_its_call_alone(chain: BaseDelegate, jobs: Jobs, tmp_path: Path) -> None:
    with Executor(chain, max_workers=1) as executor:
        lost = executor.submit(end_job, tmp_path / "began")
        others = [executor.submit(square, number) for number in range(3)]
        with pytest.raises(DelegateFunctionException) as raised:
            lost.result(20)
        assert not isinstance(raised.value, LeaseEnded)
        assert [future.result(20) for future in others] == [0, 1, 4]
    assert (tmp_path / "began").exists()
    assert jobs.begun == 2


def test_call_that_raises_as_an_ended_lease_does_is_made_once(executor: Executor, naps: Path) -> None:
    def call(path: Path) -> None:
        (path / str(os.getpid())).touch()
        raise LeaseEnded("not true", reason="lost")

    with pytest.raises(LeaseEnded, match="not true"):
        executor.submit(call, naps).result(20)
    assert len(asleep(naps)) == 1


def test_rejected_job_fails_the_calls_that_wait_and_no_later_one(chain: BaseDelegate, jobs: Jobs) -> None:
    jobs.behave("echo 'srun: error: Unable to allocate resources: Invalid qos' >&2; exit 1")
    with Executor(chain, max_workers=2) as executor:
        futures = [executor.submit(square, number) for number in range(5)]
        for future in futures:
            with pytest.raises(JobRejected, match="Invalid qos"):
                future.result(20)
        jobs.behave(RUN)
        assert executor.submit(square, 4).result(20) == 16


def test_fewer_jobs_than_wanted_make_all_calls_and_it_is_said(chain: BaseDelegate, jobs: Jobs) -> None:
    refused = "echo 'srun: error: Unable to allocate resources: too many' >&2; exit 1"
    jobs.behave(f'mkdir "$0.lock" 2>/dev/null || {{ sleep 0.5; {refused}; }}\n{RUN}')
    with Executor(chain, max_workers=3) as executor:
        futures = [executor.submit(time.sleep, 0.2) for _ in range(9)]
        with pytest.warns(RuntimeWarning, match="(?s)1 at a time.*too many") as warnings:
            concurrent.futures.wait(futures, 30)
    assert all(future.exception() is None for future in futures)
    assert len(warnings) <= 2
    assert jobs.begun == 1


def test_what_cannot_be_pickled_is_said_and_the_next_call_runs(executor: Executor) -> None:
    with pytest.raises(CallNotSent, match="cannot be pickled"):
        executor.submit(square, threading.Lock()).result(20)
    assert executor.submit(square, 2).result(20) == 4


@pytest.mark.parametrize("leased", [True, False])
def test_code_that_is_not_trusted_returns_data(chain: BaseDelegate, leased: bool) -> None:
    source = SourceCode("def pair(x): return x, {'x': [x]}")
    with Executor(chain if leased else SubprocessDelegate(), results="data") as executor:
        assert executor.submit(source.run, "pair", 2).result(20) == (2, {"x": [2]})
        with pytest.raises(RemoteError, match="LookupError: here"):
            executor.submit(fail, LookupError("here")).result(20)
        with pytest.raises(ResultNotReturned, match="result is a set"):
            executor.submit(set).result(20)


def test_shutdown_without_waiting_lets_calls_end(chain: BaseDelegate, naps: Path) -> None:
    executor = Executor(chain, max_workers=1)
    first = executor.submit(nap, naps, 0.5)
    second = executor.submit(square, 2)
    wait_until(lambda: asleep(naps), timeout_s=20, what="the first one runs")
    executor.shutdown(wait=False, cancel_futures=True)
    assert second.cancelled()
    assert first.result(20)


def test_interrupt_within_the_block_cancels_all(chain: BaseDelegate, jobs: Jobs, naps: Path) -> None:
    executor = Executor(chain, max_workers=1)
    futures = [executor.submit(nap, naps) for _ in range(3)]
    wait_until(lambda: asleep(naps), timeout_s=20, what="one runs")
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), executor:
        raise KeyboardInterrupt
    assert time.monotonic() - started < 4
    assert all(future.cancelled() for future in futures)
    assert all(is_gone(process) for process in asleep(naps))
    assert jobs.begun == jobs.ended == 1


def test_interrupt_at_the_end_of_the_block_cancels_all(chain: BaseDelegate, jobs: Jobs, naps: Path) -> None:
    def interrupt() -> None:
        wait_until(lambda: asleep(naps), timeout_s=20, what="one runs")
        os.kill(os.getpid(), signal.SIGINT)

    executor = Executor(chain, max_workers=1)
    futures = [executor.submit(nap, naps) for _ in range(3)]
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt), executor:
        pass
    assert all(future.cancelled() for future in futures)
    assert all(is_gone(process) for process in asleep(naps))
    assert jobs.begun == jobs.ended == 1


class Fleeting(workers.Unleased):
    """A lease that is over as soon as it has begun, as long as some are left to be so."""

    left = 0

    def __init__(self, delegate: BaseDelegate) -> None:
        super().__init__(delegate)
        self._is_over = type(self).left > 0
        type(self).left -= 1

    @property
    def is_over(self) -> bool:
        return self._is_over

    def wait(self) -> None:
        if self._is_over:
            raise LeaseEnded("others wait", reason="preempted")

    def call(self, *arguments: Any, **options: Any) -> Any:
        self.wait()
        return super().call(*arguments, **options)


@pytest.mark.parametrize(("left", "is_made"), [(3, True), (1000, False)])
def test_lease_that_ends_before_it_is_used_is_followed_by_another(
    left: int, is_made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fleeting, "left", left)
    way = workers.Workers(lambda: Fleeting(TrivialDelegate()), 1, results="pickle", idle_s=0.1)
    future = way.add(square, (3,), {})
    if is_made:
        assert future.result(10) == 9
    else:
        assert isinstance(future.exception(10), LeaseEnded)
        assert Fleeting.left == left - workers._FRUITLESS
    way.finish(wait=True, cancel=False)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_would_end_a_process_ends_no_worker(error: BaseException) -> None:
    with Executor(TrivialDelegate(), max_workers=1) as executor:
        assert executor.submit(fail, error).exception(10) is error
        assert executor.submit(square, 2).result(10) == 4


def test_call_in_this_process_cannot_be_cancelled_once_it_runs() -> None:
    going, go_on = threading.Event(), threading.Event()
    with Executor(TrivialDelegate(), max_workers=1) as executor:
        future = executor.submit(lambda: (going.set(), go_on.wait(20)))
        assert going.wait(10)
        assert not future.cancel()
        go_on.set()
        assert future.result(10) == (None, True)


EXIT = """
import sys, time
from pathlib import Path
from delegate_function import *
sys.path.insert(0, sys.argv[1])
from test_delegate_executor import nap
chain = SubprocessDelegate() if sys.argv[3] == "process" else SlurmDelegate(delegate_executable_path=sys.argv[3])
executor = Executor(chain, max_workers=2)
futures = [executor.submit(nap, Path(sys.argv[2])) for _ in range(3)]
while len(list(Path(sys.argv[2]).iterdir())) < 2:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("way", ["process", "job"])
def test_end_of_the_interpreter_ends_the_calls(way: str, chain: BaseDelegate, naps: Path, tmp_path: Path) -> None:
    where = "process" if way == "process" else str(tmp_path / "hop")
    argv = [sys.executable, "-c", EXIT, str(Path(__file__).parent), str(naps), where]
    path = os.pathsep.join([str(SRC), str(Path(__file__).parents[1])])
    done = subprocess.run(
        argv, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(asleep(naps)) == 2
    wait_until(lambda: all(map(is_gone, asleep(naps))), timeout_s=2, what="the calls are gone")


def test_forked_process_has_no_part_in_it(executor: Executor, naps: Path) -> None:
    future = executor.submit(nap, naps, 1)
    wait_until(lambda: asleep(naps), timeout_s=20, what="it runs")
    child = os.fork()
    if child == 0:
        try:
            executor.submit(square, 1)
        except RuntimeError as error:
            workers._abandon_all()  # as at the end of an interpreter
            os._exit(7 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert future.result(20)


@pytest.mark.parametrize(
    "options",
    [
        {"max_workers": 0},
        {"max_workers": 1.5},
        {"idle_s": -1},
        {"turn_s": float("inf")},
        {"seconds": True},
        {"results": "yaml"},
        {"results": "data", "delegate": TrivialDelegate()},
        {"delegate": SubprocessDelegate(interactive=True)},
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Executor(**options)
