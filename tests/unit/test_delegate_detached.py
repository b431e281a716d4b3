"""Detached calls, with stand-ins for Slurm's commands that run batch jobs here."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from delegate_function import (
    BaseDelegate,
    CallNotSent,
    ConfigurationError,
    Executor,
    HopFailed,
    JobCancelled,
    JobError,
    JobRejected,
    NodeFailed,
    RemoteError,
    RemoteTraceback,
    ResultNotReturned,
    SlurmDelegate,
    SubprocessDelegate,
    TemporaryDirectoryDelegate,
    batches,
    detached,
    frames,
)
from delegate_function.conversation import Exchange
from live import wait_until
from stand_ins import SRC, program

SBATCH = """
cd "$(dirname "$0")"
touch called
while [[ -e held ]]; do sleep 0.05; done
printf '%s\\n' "$@" "" >>sbatch.arguments
script=$(mktemp script.XXXX)
cat >"$script"
for argument; do
    case $argument in
        --array=*) tasks=${argument#--array=0-}; tasks=${tasks%\\%*} ;;
        --output=*) log=${argument#*=} ;;
    esac
done
id=$((100 + $(ls | grep -c ^script)))
for task in $(seq 0 ${tasks:-0}); do
    name=$id
    number=$id
    [[ -z $tasks ]] || { name=${id}_$task; number=$id$task; export SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$task; }
    touch "job.$name"
    file=${log//%%/@}; file=${file/\\%a/$task}
    SLURM_JOB_ID=$number setsid sh -c "echo \\$\\$ >job.$name; sh $script; rm -f job.$name" >>"${file//@/%}" 2>&1 &
done
echo "$id"
"""
SQUEUE = """
cd "$(dirname "$0")"
shopt -s nullglob
for job in job.*; do echo "${job#job.} RUNNING"; done
"""
SCANCEL = """
cd "$(dirname "$0")"
echo "$1" >>cancelled
kill -9 -- "-$(cat "job.$1")"
rm "job.$1"
"""
EXECUTABLE = """#!{python} -I
import sys; sys.path.insert(0, {src!r})
from delegate_function.__main__ import main
main()
"""


def square(number: int) -> int:
    return number * number


def speak(text: str) -> str:
    print(text)
    print("and", text, file=sys.stderr)
    return text.upper()


def fail() -> None:
    raise LookupError("here")


def nap(path: Path, seconds: float = 60) -> int:
    print("begun", flush=True)
    (path / str(os.getpid())).touch()
    time.sleep(seconds)
    return os.getpid()


def flood(megabytes: int) -> int:
    for _ in range(megabytes):
        os.write(1, b"x" * 1024**2)
    return megabytes


class Slurm:
    """What the stand-ins were asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        program(directory, "sbatch", SBATCH)
        program(directory, "squeue", SQUEUE)
        program(directory, "scancel", SCANCEL)
        program(directory, "scontrol", "exit 1")
        program(directory, "sacct", "exit 1")

    @property
    def submitted(self) -> list[list[str]]:
        """The arguments of each sbatch."""
        text = (self.directory / "sbatch.arguments").read_text()
        return [call.split("\n") for call in text.split("\n\n")[:-1]]

    @property
    def cancelled(self) -> list[str]:
        file = self.directory / "cancelled"
        return file.read_text().split() if file.exists() else []

    def hold(self) -> None:
        """Let sbatch take its time, until it is released."""
        (self.directory / "called").unlink(missing_ok=True)
        (self.directory / "held").touch()

    def wait_until_called(self) -> None:
        wait_until((self.directory / "called").exists, timeout_s=20, what="sbatch is called")

    def release(self) -> None:
        (self.directory / "held").unlink()

    def end(self, job: str, state: str) -> None:
        """End a job, of which the controller then says this."""
        program(self.directory, "scontrol", f"echo JobState={state} Reason=None NodeList=c1")
        os.killpg(int((self.directory / f"job.{job}").read_text()), signal.SIGKILL)
        (self.directory / f"job.{job}").unlink()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    directory, home = tmp_path / "bin", tmp_path / "ho me%a"
    directory.mkdir()
    home.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(batches, "_ASK_S", 0.3)
    return Slurm(directory)


@pytest.fixture
def chain(slurm: Slurm, tmp_path: Path) -> BaseDelegate:
    file = tmp_path / "run"
    file.write_text(EXECUTABLE.format(python=sys.executable, src=str(SRC)))
    file.chmod(0o755)
    return SlurmDelegate(delegate_executable_path=str(file), partition="shared")


@pytest.fixture
def executor(chain: BaseDelegate) -> Executor:
    return Executor(chain, detached=True, max_workers=3)


@pytest.fixture
def naps(tmp_path: Path) -> Path:
    path = tmp_path / "naps"
    path.mkdir()
    return path


def shelf() -> Path:
    return Path.home() / ".delegate_function/detached"


def asleep(naps: Path) -> list[int]:
    return [int(file.name) for file in naps.iterdir()]


def test_code_that_is_not_trusted_returns_data_also_to_who_reattaches(
    chain: BaseDelegate, capfd: pytest.CaptureFixture[str]
) -> None:
    executor = Executor(chain, detached=True, results="data")
    futures = [executor.submit(speak, "\x1b[1mword"), executor.submit(fail), executor.submit(set)]
    again = [Executor.reattach(future.job_id) for future in futures]
    for spoken, failed, unsent in (futures, again):
        assert spoken.result(20) == "\x1b[1MWORD"
        with pytest.raises(RemoteError, match="LookupError: here"):
            failed.result(20)
        with pytest.raises(ResultNotReturned, match="result is a set"):
            unsent.result(20)
    assert capfd.readouterr() == ("word\n" * 2, "and word\n" * 2)


def test_value_output_and_what_is_known_come_back(
    executor: Executor, slurm: Slurm, capfd: pytest.CaptureFixture[str]
) -> None:
    future = executor.submit(speak, "word")
    assert future.result(20) == "WORD"
    assert capfd.readouterr() == ("word\n", "and word\n")
    assert future.call is not None
    assert future.call.job_id == "101"
    assert future.call.where.startswith("hop 1 of 1 (batch job on ")
    assert future.call.usage["wall_s"] > 0
    assert 0 < future.call.seconds < 20
    [arguments] = slurm.submitted
    assert {"--parsable", "--requeue", "--open-mode=append", "--nodes=1", "--partition=shared"} <= set(arguments)
    assert not any(argument.startswith("--array") for argument in arguments)


def test_exception_comes_with_its_traceback(executor: Executor) -> None:
    future = executor.submit(fail)
    with pytest.raises(LookupError, match="here") as raised:
        future.result(20)
    assert isinstance(raised.value.__cause__, RemoteTraceback)


def test_what_lies_in_the_home_is_its_user_s_alone(executor: Executor) -> None:
    old = os.umask(0)
    try:
        executor.submit(square, 2).result(20)
    finally:
        os.umask(old)
    [directory] = shelf().iterdir()
    for path in (shelf().parent, shelf(), directory):
        assert path.stat().st_mode & 0o777 == 0o700
    assert {file.name for file in directory.iterdir()} == {"job", "calls", "0.result", "0.log"}
    assert all(file.stat().st_mode & 0o077 == 0 for file in directory.iterdir() if file.name != "0.log")


def _submit_as_one_and_four(executor: Executor, slurm: Slurm) -> list[Any]:
    slurm.hold()
    futures = [executor.submit(square, 0)]
    slurm.wait_until_called()
    futures += [executor.submit(square, number) for number in range(1, 5)]
    slurm.release()
    return futures


def test_calls_that_come_meanwhile_are_one_array(executor: Executor, slurm: Slurm) -> None:
    futures = _submit_as_one_and_four(executor, slurm)
    assert [future.result(20) for future in futures] == [0, 1, 4, 9, 16]
    assert len(slurm.submitted) == 2
    assert "--array=0-3%3" in slurm.submitted[1]
    assert [future.job_id for future in futures] == ["101", "102_0", "102_1", "102_2", "102_3"]


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from delegate_function import Executor, SlurmDelegate
from test_delegate_detached import nap
future = Executor(SlurmDelegate(delegate_executable_path=sys.argv[3]), detached=True).submit(nap, Path(sys.argv[2]), 2)
print(future.job_id, flush=True)
future.result()
"""


def _python(program: str, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(SRC), str(Path(__file__).parents[1])])
    return subprocess.Popen(
        [sys.executable, "-c", program, str(Path(__file__).parent), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_call_outlives_its_caller(chain: BaseDelegate, naps: Path, tmp_path: Path) -> None:
    with _python(KILLED, str(naps), str(tmp_path / "run")) as caller:
        assert caller.stdout
        job = caller.stdout.readline().strip()
        [process] = wait_until(lambda: asleep(naps), timeout_s=20, what="it runs")
        caller.kill()
    future = Executor.reattach(job)
    assert not future.done()
    assert future.job_id == job
    assert future.result(20) == process
    assert Executor.reattach(int(job)).result(5) == process, "it stays"


def test_end_of_the_interpreter_does_not_keep_a_call_from_slurm(
    chain: BaseDelegate, slurm: Slurm, naps: Path, tmp_path: Path
) -> None:
    program(slurm.directory, "sbatch", f"sleep 0.5\n{SBATCH}")
    leaves = KILLED.replace("print(future.job_id, flush=True)\nfuture.result()", "")
    with _python(leaves, str(naps), str(tmp_path / "run")) as caller:
        assert caller.wait(20) == 0
    [call] = Executor.detached_calls()
    assert (call.function, call.state) == ("nap", "RUNNING")
    assert Executor.reattach(call.job_id).result(20)


def test_job_whose_caller_was_killed_before_it_knew_the_number_is_found(
    executor: Executor, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = executor.submit(square, 5)
    assert future.result(20) == 25
    [directory] = shelf().iterdir()
    assert (directory / "job").read_text() == "101"
    (directory / "job").unlink()
    monkeypatch.setenv("SLURM_JOB_ID", "101")
    detached.main([str(directory)])
    assert Executor.reattach(101).result(5) == 25


@pytest.mark.parametrize(
    ("state", "kind"), [("CANCELLED", JobCancelled), ("NODE_FAIL", NodeFailed), ("FAILED", JobError)]
)
def test_vanished_job_is_told_with_what_slurm_knows(
    executor: Executor, slurm: Slurm, naps: Path, state: str, kind: type[JobError]
) -> None:
    future = executor.submit(nap, naps)
    partial = "*/0.partial.*"
    wait_until(
        lambda: any(b"begun" in file.read_bytes() for file in shelf().glob(partial)), timeout_s=20, what="it runs"
    )
    wait_until(future.running, timeout_s=5, what="it is known to run")
    slurm.end("101", state)
    error = future.exception(10)
    assert type(error) is kind
    assert error.details["job_id"] == "101"
    assert error.output_tail == "begun"


def test_job_that_cannot_do_its_work_is_told_with_its_log(executor: Executor, slurm: Slurm) -> None:
    program(slurm.directory, "scontrol", "echo JobState=FAILED Reason=NonZeroExitCode NodeList=c1")
    program(slurm.directory, "sbatch", SBATCH.replace("sh $script;", "echo no Python here;"))
    with pytest.raises(JobError, match=r"(?s)FAILED.*no Python here"):
        executor.submit(square, 2).result(10)


def test_job_of_which_nobody_knows_anything_is_told(executor: Executor, slurm: Slurm) -> None:
    program(slurm.directory, "sbatch", SBATCH.replace("sh $script;", ""))
    with pytest.raises(JobError, match="knows nothing"):
        executor.submit(square, 2).result(10)


def test_silent_slurm_is_asked_again(executor: Executor, slurm: Slurm, naps: Path) -> None:
    program(slurm.directory, "squeue", "exit 1")
    future = executor.submit(nap, naps, 2)
    assert future.result(20)


def test_cancel_ends_the_job(executor: Executor, slurm: Slurm, naps: Path) -> None:
    future = executor.submit(nap, naps)
    [process] = wait_until(lambda: asleep(naps), timeout_s=20, what="it runs")
    assert future.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    wait_until(lambda: slurm.cancelled == ["101"], timeout_s=5, what="the job is cancelled")
    wait_until(lambda: not Path(f"/proc/{process}").exists(), timeout_s=3, what="the call is gone")


def test_cancel_does_not_wait_for_slurm(executor: Executor, slurm: Slurm, naps: Path) -> None:
    future = executor.submit(nap, naps)
    wait_until(lambda: asleep(naps), timeout_s=20, what="it runs")
    program(slurm.directory, "scancel", f"sleep 1\n{SCANCEL}")
    started = time.monotonic()
    assert future.cancel()
    assert time.monotonic() - started < 0.5
    wait_until(lambda: slurm.cancelled == ["101"], timeout_s=5, what="the job is cancelled")


def test_end_of_the_interpreter_does_not_keep_a_job_from_being_cancelled(
    chain: BaseDelegate, slurm: Slurm, naps: Path, tmp_path: Path
) -> None:
    program(slurm.directory, "scancel", f"sleep 0.5\n{SCANCEL}")
    cancels = KILLED.replace("print(future.job_id, flush=True)\nfuture.result()", "future.job_id\nfuture.cancel()")
    with _python(cancels, str(naps), str(tmp_path / "run")) as caller:
        assert caller.wait(20) == 0
    assert slurm.cancelled == ["101"]


def test_job_that_cannot_be_cancelled_fails_no_other_call(
    executor: Executor, slurm: Slurm, naps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("delegate_function.slurm._QUERY_S", 0.2)
    program(slurm.directory, "scancel", "exec sleep 20")
    called, held = slurm.directory / "array.called", slurm.directory / "array.held"
    held.touch()
    waits = f"if [[ $* == *--array* ]]; then touch {called}; while [[ -e {held} ]]; do sleep 0.05; done; fi"
    program(slurm.directory, "sbatch", f"{waits}\n{SBATCH}")
    slurm.hold()
    first = executor.submit(square, 1)
    slurm.wait_until_called()
    cancelled, other = executor.submit(nap, naps, 1), executor.submit(square, 3)
    slurm.release()
    wait_until(called.exists, timeout_s=20, what="the two are submitted")
    assert cancelled.cancel()
    held.unlink()
    assert [first.result(20), other.result(20)] == [1, 9]


def test_cancel_while_the_job_is_submitted(executor: Executor, slurm: Slurm, naps: Path) -> None:
    slurm.hold()
    first = executor.submit(nap, naps)
    slurm.wait_until_called()
    second = executor.submit(square, 2)
    assert first.cancel()
    assert second.cancel()
    slurm.release()
    executor.shutdown()
    assert slurm.cancelled == ["101"]
    assert len(slurm.submitted) == 1, "the second one never was"


def test_partial_file_that_is_broken_fails_its_call_alone_with_what_it_has(
    executor: Executor, slurm: Slurm, naps: Path
) -> None:
    lost, other = executor.submit(nap, naps), executor.submit(nap, naps, 3)
    wait_until(lambda: len(asleep(naps)) == 2, timeout_s=20, what="both run")
    directory = shelf() / lost.record.directory
    [partial] = directory.glob(f"{lost.record.number}.partial.*")
    wait_until(lambda: b"begun" in partial.read_bytes(), timeout_s=20, what="it speaks")
    with partial.open("ab") as file:
        file.write(bytes(1000))
    slurm.end(lost.job_id, "NODE_FAIL")
    error = lost.exception(10)
    assert type(error) is NodeFailed
    assert error.output_tail == "begun"
    assert other.result(20)


def test_what_cannot_be_looked_for_fails_its_call_alone(
    executor: Executor, naps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = batches.shelf.names

    def some(directory: str) -> list[str]:
        if directory == bad.record.directory:
            raise ValueError("broken")
        return names(directory)

    bad = executor.submit(nap, naps, 1)
    assert bad.job_id
    good = executor.submit(nap, naps, 1)
    assert good.job_id
    monkeypatch.setattr(batches.shelf, "names", some)
    with pytest.raises(ValueError, match="broken"):
        bad.result(10)
    assert good.result(20)


def test_submission_that_is_removed_meanwhile_is_in_nobody_s_way(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir = os.listdir

    def late(path: Any) -> list[str]:
        return [*listdir(path), "removed"] if isinstance(path, int) else listdir(path)

    monkeypatch.setattr(os, "listdir", late)
    assert executor.submit(square, 3).result(20) == 9


def test_rejected_job_leaves_nothing(executor: Executor, slurm: Slurm) -> None:
    program(slurm.directory, "sbatch", "echo 'sbatch: error: invalid partition specified: shared' >&2; exit 1")
    future = executor.submit(square, 2)
    with pytest.raises(JobRejected, match="invalid partition"):
        future.result(10)
    with pytest.raises(JobRejected):
        assert future.job_id
    assert list(shelf().iterdir()) == []


def test_what_cannot_be_pickled_is_said_and_the_others_go(executor: Executor) -> None:
    bad, good = executor.submit(square, (number for number in ())), executor.submit(square, 3)  # type: ignore[arg-type]
    assert good.result(20) == 9
    with pytest.raises(CallNotSent, match="cannot be pickled"):
        bad.result(10)


@pytest.mark.parametrize("name", [".delegate_function", ".delegate_function/detached"])
@pytest.mark.parametrize("wrong", ["link", "mode"])
def test_directory_that_is_not_the_user_s_alone_is_not_used(
    executor: Executor, slurm: Slurm, name: str, wrong: str, tmp_path: Path
) -> None:
    shelf().parent.mkdir(mode=0o700)
    shelf().mkdir(mode=0o700)
    path = Path.home() / name
    if wrong == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.chmod(0o711)
    with pytest.raises(CallNotSent, match="link" if wrong == "link" else "mode 0711"):
        executor.submit(square, 2).result(10)
    assert not (slurm.directory / "sbatch.arguments").exists()


def test_result_that_is_a_link_is_not_read(executor: Executor, tmp_path: Path) -> None:
    executor.submit(square, 2).result(20)
    [directory] = shelf().iterdir()
    (directory / "0.result").rename(tmp_path / "elsewhere")
    (directory / "0.result").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HopFailed, match="is a link"):
        Executor.reattach(101).result(5)


def test_broken_result_is_told(executor: Executor) -> None:
    executor.submit(square, 2).result(20)
    [file] = shelf().glob("*/0.result")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(HopFailed, match="without its end"):
        Executor.reattach(101).result(5)


def test_job_that_runs_again_makes_the_call_again_until_there_is_a_result(
    executor: Executor, slurm: Slurm, naps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = executor.submit(nap, naps, 1)
    wait_until(lambda: asleep(naps), timeout_s=20, what="it runs")
    [directory] = shelf().iterdir()
    pid = int((slurm.directory / "job.101").read_text())
    os.killpg(pid, signal.SIGKILL)  # the job stays in the queue
    assert not (directory / "0.result").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "101")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for _ in range(2):
        detached.main([str(directory)])
    assert future.result(5) in asleep(naps)
    assert len(asleep(naps)) == 2


def test_output_is_bounded(executor: Executor, capfd: pytest.CaptureFixture[str]) -> None:
    assert executor.submit(flood, 20).result(40) == 20
    out, err = capfd.readouterr()
    assert len(out) == 16 * 1024**2
    assert "16 MB were kept" in err


RESULT = frames.encode_json(frames.RESULT, {"parts": []})


@pytest.mark.parametrize(
    "sent",
    [
        [RESULT, RESULT],
        [RESULT, *[frames.encode(frames.DATA, bytes(1000))] * 11],
        [RESULT, *[frames.encode(frames.DATA)] * 2000],
    ],
)
def test_call_that_sends_more_than_a_result_is_ended(sent: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(detached, "_MOST", 10_000)
    monkeypatch.setattr(Exchange, "cancel", lambda exchange: ended.append(exchange))
    exchange = Exchange({"hop": 1}, iter(()), None)
    decoder = frames.Decoder()
    decoder.feed(b"".join(sent) + frames.encode(frames.END))
    for frame in decoder:
        exchange.events.put(frame)
    *written, last = detached._heard(exchange, "here")
    assert ended == [exchange]
    assert len(b"".join(written)) <= 10_000
    assert written.count(RESULT) == 1
    assert last.startswith(frames.ERROR)
    assert b"more than a result" in last


def test_large_values_come_whole(executor: Executor) -> None:
    data = os.urandom(5_000_000)
    assert executor.submit(bytes.hex, data).result(40) == data.hex()


def test_calls_are_listed_and_forgotten(executor: Executor, slurm: Slurm, naps: Path) -> None:
    assert Executor.detached_calls() == []
    done, running = executor.submit(square, 2), executor.submit(nap, naps)
    assert done.result(20) == 4
    wait_until(lambda: asleep(naps), timeout_s=20, what="it runs")
    states = {call.function: (call.state, call.job_id) for call in Executor.detached_calls()}
    assert [states["square"][0], states["nap"][0]] == ["DONE", "RUNNING"]
    with pytest.raises(ConfigurationError, match="cancel it first"):
        Executor.forget(states["nap"][1])
    running.cancel()
    wait_until(lambda: slurm.cancelled, timeout_s=5, what="the job is cancelled")
    wait_until(lambda: not list(slurm.directory.glob("job.*")), timeout_s=5, what="no job is left")
    for _, job in states.values():
        Executor.forget(job)
    assert list(shelf().iterdir()) == []
    with pytest.raises(ConfigurationError, match=f"no detached call of job {states['nap'][1]}"):
        Executor.reattach(states["nap"][1])


def test_task_of_an_array_is_forgotten_alone(executor: Executor, slurm: Slurm) -> None:
    concurrent.futures.wait(_submit_as_one_and_four(executor, slurm), 40)
    with pytest.raises(ConfigurationError, match=r"its calls are 102_0 to 102_3"):
        Executor.reattach(102)
    Executor.forget("102_1")
    assert sorted(call.job_id for call in Executor.detached_calls()) == ["101", "102_0", "102_2", "102_3"]


def test_old_calls_are_removed(executor: Executor) -> None:
    executor.submit(square, 2).result(20)
    [old] = shelf().iterdir()
    os.utime(old, (0, time.time() - 31 * 24 * 3600))
    executor.submit(square, 3).result(20)
    assert len(list(shelf().iterdir())) == 1
    assert not old.exists()


def test_shutdown_waits_for_the_calls(chain: BaseDelegate, naps: Path) -> None:
    with Executor(chain, detached=True) as executor:
        future = executor.submit(nap, naps, 0.5)
    assert future.done()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 1)


def test_interrupt_leaves_the_jobs_alone(chain: BaseDelegate, slurm: Slurm, naps: Path) -> None:
    executor = Executor(chain, detached=True)
    future = executor.submit(nap, naps, 1)
    with pytest.raises(KeyboardInterrupt), executor:
        raise KeyboardInterrupt
    assert not future.done()
    assert future.result(20)
    assert slurm.cancelled == []


def test_forked_process_submits_nothing(executor: Executor, slurm: Slurm) -> None:
    slurm.hold()
    future = executor.submit(square, 3)
    slurm.wait_until_called()
    child = os.fork()
    if child == 0:
        try:
            executor.submit(square, 1)
        except RuntimeError as error:
            os._exit(7 if "forked" in str(error) else 1)
        os._exit(2)
    _, status = os.waitpid(child, 0)
    slurm.release()
    assert os.waitstatus_to_exitcode(status) == 7
    assert future.result(20) == 9


def test_job_s_program_opens_no_pickle() -> None:
    program = f"import sys; sys.path.insert(0, {str(SRC)!r}); import delegate_function.detached; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True).stdout
    assert "delegate_function.detached" in loaded.split()
    assert not {"pickle", "cloudpickle", "delegate_function.inside"} & set(loaded.split())


@pytest.mark.parametrize("wrong", [SubprocessDelegate(), TemporaryDirectoryDelegate(SlurmDelegate())])
def test_detached_call_needs_a_job(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="begins with SlurmDelegate"):
        Executor(wrong, detached=True)


@pytest.mark.parametrize("job", ["", "x", "-1", "1;2", "1_", True, "../1", "1 2"])
def test_what_is_no_job_is_refused(job: Any, slurm: Slurm) -> None:
    with pytest.raises(ConfigurationError, match="no number of a job"):
        Executor.reattach(job)
