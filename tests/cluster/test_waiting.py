"""What a person sees in a terminal while their call waits for busy workers, and how Ctrl-C ends it."""

import re
import time
from collections.abc import Iterator

import pytest

from live import PATIENCE, LiveCluster, wait_until
from terminal import Terminal

OTHER = "test_user2"
CANCELLED_WITHIN_S = 2.0

PROGRAM = """
import time
from delegate_function import SandboxDelegate, SlurmDelegate, progress

class Steps:
    def run(self):
        for step in range(40):
            progress(step, 40)
            time.sleep(0.1)
        print("the end")

try:
    SlurmDelegate(SandboxDelegate()).invoke(Steps(), "run")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.fixture
def busy(cluster: LiveCluster) -> Iterator[list[int]]:
    """Let another user's jobs have all workers, and two more of them wait; return those that run."""
    running = [cluster.sbatch("sleep 300", OTHER, "-t", "10", "-w", worker) for worker in cluster.workers]
    for job in running:
        cluster.wait_until_runs(job)
    for _ in range(2):
        cluster.sbatch("true", OTHER, "-t", "10")
    yield running
    cluster.user(f"scancel -u {OTHER}", OTHER)


@pytest.fixture
def terminal(cluster: LiveCluster) -> Iterator[Terminal]:
    argv = cluster.exec_as_user("jovyan", ["python3", "-c", PROGRAM], {"TERM": "xterm"})
    argv[2:3] = ["-it"]
    program = Terminal(argv)
    yield program
    program.kill()


def _own_jobs(cluster: LiveCluster) -> str:
    return cluster.slurm("squeue -h -u jovyan -o '%i %T'")


def test_waiting_call_shows_its_place_and_start_then_its_progress_then_nothing(
    cluster: LiveCluster, busy: list[int], terminal: Terminal
) -> None:
    job, _ = wait_until(lambda: _own_jobs(cluster).split(), timeout_s=30, what="the call's job waits")
    terminal.wait_for(rf"job {job} waits: [123](st|nd|rd) of 3\b")
    # Slurm plans ahead every ten seconds.
    terminal.wait_for(rf"job {job} waits: [123](st|nd|rd) of 3, should start at \d\d:\d\d \(in \d+ min\)", timeout_s=40)
    cluster.user(f"scancel {' '.join(map(str, busy))}", OTHER).ok()
    terminal.wait_for(rf"job {job} runs on ({'|'.join(cluster.workers)}) \(\d+ s\), \d+ of 40", timeout_s=40)
    assert terminal.end() == "the end\n"


@pytest.mark.parametrize("runs", [False, True], ids=["waits", "runs"])
def test_ctrl_c_cancels_the_job(cluster: LiveCluster, busy: list[int], terminal: Terminal, runs: bool) -> None:
    if runs:
        cluster.user(f"scancel -u {OTHER}", OTHER).ok()
    terminal.wait_for(r"job \d+ runs" if runs else r"job \d+ waits: ", timeout_s=40)
    terminal.press(b"\x03")
    began = time.monotonic()
    wait_until(
        lambda: "RUNNING" not in (jobs := _own_jobs(cluster)) and "PENDING" not in jobs, timeout_s=20, what="end"
    )
    assert time.monotonic() - began < CANCELLED_WITHIN_S * PATIENCE
    assert re.fullmatch(r"(\^C)?interrupted\n", terminal.end())
