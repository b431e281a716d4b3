"""`cm task2 --slurm`: the same command, in a job."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from far import needed
from stand_ins import SRC, program

ROOT = SRC.parent
SCRIPTS = ROOT / "images/user/files/etc/skel"


@pytest.fixture
def cm(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return what runs `cm` where only the commands of a directory are found."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "container_manager.cm", *words]
        (tmp_path / "setpriv").exists() or (tmp_path / "setpriv").symlink_to(needed("setpriv", "util-linux"))
        environment = {"PATH": str(tmp_path), "PYTHONPATH": str(SRC), "HOME": str(tmp_path)}
        return subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.parametrize("words", [("task2", "--seed", "3", "--total"), ("task3", "--seed", "5")])
def test_srun_runs_the_same_without_the_option(
    cm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, words: tuple[str, ...]
) -> None:
    program(tmp_path, "srun", 'printf "%s\\n" "$@"; exit 5')
    done = cm(*words[:1], "--slurm", *words[1:])
    said = done.stdout.splitlines()
    assert (said[-len(words) - 1 :], done.returncode) == (["cm", *words], 5)
    assert said[:4] == ["--job-name", words[0], "--partition", "shared"]


TELLS = "trap 'echo told; exit 138' USR1; echo runs; while :; do read -rt 0.1 <> <(:); done"


def test_interruption_reaches_the_job(tmp_path: Path) -> None:
    program(tmp_path, "srun", TELLS)
    argv = [sys.executable, "-m", "container_manager.cm", "task3", "--slurm"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(SRC)}
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("told\n", "interrupted\n")
    assert process.returncode == 130


def test_interruption_reaches_a_job_that_has_just_begun(tmp_path: Path) -> None:
    program(tmp_path, "srun", TELLS.replace("echo runs;", "touch runs;"))
    interrupted = """
import os, pathlib, signal, subprocess, time
from container_manager import in_job, interrupts
class Popen(subprocess.Popen):
    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        while not pathlib.Path("runs").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
in_job.subprocess.Popen = Popen
interrupts.raise_them()
in_job.run_again(["task3"])
"""
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(SRC)}
    argv = [sys.executable, "-c", interrupted]
    done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.stdout == "told\n"
    assert "Interrupted" in done.stderr


def test_no_cluster(cm: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = cm("task2", "--slurm")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: there is no srun here\n→ run it on the cluster's users' node\n"


def test_bad_input_makes_no_job(cm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    program(tmp_path, "srun", "touch ran")
    assert cm("task2", "--slurm", "--size", "2").returncode == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("task", ["task2", "task3"])
def test_script_runs_the_command_with_its_arguments(tmp_path: Path, task: str) -> None:
    program(tmp_path, "cm", 'printf "%s\\n" "$@"')
    argv = [SCRIPTS / f"{task}.sbatch", "--seed", "a b"]
    said = subprocess.run(argv, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=30, check=True)
    assert said.stdout.splitlines() == [task, "--seed", "a b"]
