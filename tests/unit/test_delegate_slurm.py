"""The way through srun, with a stand-in that only runs what follows `--`: what is asked of Slurm and told of its end.

What real Slurm does is tested on the cluster.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from delegate_function import (
    ConfigurationError,
    DelegateFunctionException,
    HopFailed,
    JobCancelled,
    JobError,
    JobRejected,
    JobTimeout,
    LimitExceeded,
    NodeFailed,
    SlurmDelegate,
    SubprocessDelegate,
    TestClass,
    lease,
    slurm,
)
from live import wait_until
from stand_ins import hop_program, program


@pytest.fixture
def bin_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory that is searched for programs first."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


@pytest.fixture
def hop(tmp_path: Path) -> str:
    return hop_program(tmp_path)


RUN = 'while [[ $1 != -- ]]; do shift; done; shift; export SLURM_JOB_ID=17; exec "$@"'


def test_a_call_runs_in_the_job_and_its_number_is_known(bin_directory: Path, hop: str) -> None:
    program(bin_directory, "srun", f'printf "%s\\n" "$@" > {bin_directory}/argv; {RUN}')
    delegate = SlurmDelegate(delegate_executable_path=hop, partition="shared", time="0:30", memory_mb=100, cpus=2)
    thing = TestClass()
    delegate.invoke(thing, "set_value", 3)
    assert thing._value == 3
    assert delegate.last_call is not None
    assert delegate.last_call.job_id == "17"
    argv = (bin_directory / "argv").read_text().split("\n")[:-1]
    assert argv[-2:] == ["--", hop]
    assert {"--nodes=1", "--partition=shared", "--time=0:30", "--mem=100", "--cpus-per-task=2"} <= set(argv)


def until_the_end(ended: Path) -> str:
    """Return a script that passes the task's input on, its end late, and writes down in which order things end."""
    return (
        f'ended={ended}; trap "echo TERM >>$ended" TERM; while [[ $1 != -- ]]; do shift; done; shift; '
        '{ cat; sleep 0.2; echo "no more input" >>$ended; } | { "$@"; echo "the task ended with $?" >>$ended; }'
    )


IN_ORDER = ["no more input", "the task ended with 0"]


@pytest.mark.parametrize("is_relayed", [False, True])
def test_a_task_ends_when_its_caller_has_nothing_more_to_send(
    bin_directory: Path, hop: str, tmp_path: Path, is_relayed: bool
) -> None:
    ended = tmp_path / "ended"
    program(bin_directory, "srun", until_the_end(ended))
    delegate = SlurmDelegate(delegate_executable_path=hop)
    (SubprocessDelegate(delegate) if is_relayed else delegate).invoke(TestClass(), "hello")
    wait_until(lambda: ended.exists() and "the task" in ended.read_text(), timeout_s=5, what="the task has ended")
    assert ended.read_text().splitlines() == IN_ORDER


def test_a_lease_that_ends_by_itself_lets_its_task_end(bin_directory: Path, hop: str, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    program(bin_directory, "srun", until_the_end(ended))
    with lease(SlurmDelegate(delegate_executable_path=hop), idle_s=0.2) as held:
        held.invoke(TestClass(), "hello")
        wait_until(lambda: held.is_over, timeout_s=5, what="the lease is over")
    assert ended.read_text().splitlines() == IN_ORDER


def test_settings_of_the_callers_shell_do_not_reach_srun(
    bin_directory: Path, hop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(bin_directory, "srun", f"env > {bin_directory}/env; {RUN}")
    for name in ("SLURM_LABELIO", "SLURM_UNBUFFEREDIO", "SRUN_DEBUG", "SLURM_JOB_ID", "SLURM_STDOUTMODE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    SlurmDelegate(delegate_executable_path=hop).invoke(TestClass(), "hello")
    found = [line for line in (bin_directory / "env").read_text().splitlines() if line.startswith(("SLURM", "SRUN"))]
    assert found == ["SLURM_CONF=/etc/slurm.conf"]


@pytest.mark.parametrize(
    "options",
    [
        {"partition": "--uid=0"},
        {"partition": "a b"},
        {"partition": "a\nb"},
        {"partition": "a\0"},
        {"partition": "a;b"},
        {"partition": "../x"},
        {"time": "-1"},
        {"time": True},
        {"cpus": 0},
        {"memory_mb": "10G --uid=0"},
        {"job_name": "é"},
        {"nodes": 2},
        {"uid": "root"},
        {"delegate_executable_path": "--version"},
        {"delegate_executable_path": ""},
    ],
)
def test_nothing_is_smuggled_into_sruns_command_line(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        SlurmDelegate(**options)


def test_srun_is_never_asked_for_what_changes_the_streams() -> None:
    argv = slurm.srun_argv({"type": "slurm"})
    assert not {"--unbuffered", "-u", "--pty", "--label", "-l"} & set(argv)


ENDS = [
    ("JobState=CANCELLED Reason=None NodeList=c1", "", JobCancelled),
    ("JobState=TIMEOUT Reason=TimeLimit NodeList=c1 TimeLimit=00:01:00", "", JobTimeout),
    ("JobState=NODE_FAIL Reason=None NodeList=c1", "", NodeFailed),
    ("JobState=OUT_OF_MEMORY Reason=None NodeList=c1", "", LimitExceeded),
    (
        "JobState=FAILED Reason=NonZeroExitCode NodeList=c1",
        "srun: error: c1: task 0: Exited with exit code 1",
        JobError,
    ),
    ("", "srun: error: Unable to allocate resources: Invalid partition name specified", JobRejected),
    ("", "srun: Job allocation 17 has been revoked", JobCancelled),
    (
        "JobState=COMPLETING Reason=None NodeList=c1",
        "slurmstepd: error: *** STEP 17.0 ON c1 CANCELLED AT 2026-11-21 ***",
        JobCancelled,
    ),
    ("", "srun: error: Unable to contact slurm controller", HopFailed),
]


@pytest.mark.parametrize(
    ("known", "said", "kind"), ENDS, ids=[f"{kind.__name__}-{n}" for n, (*_, kind) in enumerate(ENDS)]
)
@pytest.mark.parametrize("length", [1, 2])
def test_what_slurm_says_of_a_jobs_end_becomes_a_typed_error(
    bin_directory: Path, known: str, said: str, kind: type[DelegateFunctionException], length: int
) -> None:
    number = "srun: job 17 queued and waiting for resources\n" if known else ""
    program(bin_directory, "srun", f"printf '{number}{said}\\n' >&2; exit 1")
    program(bin_directory, "scontrol", f"echo 'JobId=17 {known}'" if known else "exit 1")
    chain = SlurmDelegate() if length == 1 else SubprocessDelegate(SlurmDelegate())
    with pytest.raises(DelegateFunctionException) as raised:
        chain.invoke(TestClass(), "hello")
    assert type(raised.value) is kind
    assert raised.value.where == f"hop {length} of {length} (slurm)"
    assert said in str(raised.value)
    if known:
        assert raised.value.details["job_id"] == "17"
        assert "queued and waiting" not in str(raised.value)


def test_a_job_whose_srun_was_killed_is_cancelled(bin_directory: Path) -> None:
    program(bin_directory, "srun", "echo 'srun: job 17 queued and waiting for resources' >&2; kill -9 $$")
    program(bin_directory, "scontrol", "echo JobId=17 JobState=RUNNING Reason=None NodeList=c1")
    program(bin_directory, "scancel", f"echo $1 >> {bin_directory}/cancelled")
    with pytest.raises(HopFailed, match=r"killed by signal 9.*job 17 on c1 is RUNNING"):
        SlurmDelegate().invoke(TestClass(), "hello")
    assert (bin_directory / "cancelled").read_text() == "17\n"


def test_a_userhost_without_slurm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HopFailed, match="srun"):
        SlurmDelegate().invoke(TestClass(), "hello")
