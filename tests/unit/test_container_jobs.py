"""cminfo, cmrun and cmkill, with stand-ins that say what Slurm 24.11 was recorded to say."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from container_manager import job_settings, jobs
from container_manager.cmrun import cmrun
from container_manager.errors import ContainerError
from live import wait_until
from stand_ins import SRC, program

F, R = "\x1f", "\x1e"


def _record(line: str, end: str) -> str:
    return line.replace("|", F) + end


SINFO = "".join(
    _record(line, f"{R}\n")
    for line in (
        "c1|mixed|1/1/0/2|24105|512|(null)|(null)|none",
        "c1|mixed|1/1/0/2|24105|512|(null)|(null)|none",
        "c2|idle*|0/2/0/2|24105|0|gpu:a100:2(S:0),shard:4|gpu:a100:1(IDX:0),shard:0|Not responding",
    )
)
SQUEUE = "".join(
    _record(line, f"{R}\n")
    for line in (
        "51|RUNNING|0|cpu=3,mem=1.50G,node=2,billing=3,gres/gpu=1,gres/gpu:a100=1|c[1-2]|0:01|1:00:00|None|sleeper",
        "187|PENDING|1|cpu=1,mem=512M,node=1,billing=1||0:00|1:00:00|BeginTime|sh",
        "12_[4-999]|PENDING|0|cpu=1,mem=512M,node=1,billing=1||0:00|1:00:00|Resources|a\nb",
    )
)
SACCT = "".join(
    _record(line, f"{F}\n")
    for line in (
        "50|FAILED|0|cpu=1,mem=512M|c2|00:00:00|01:00:00|7:0|2026-11-26T04:18:50|failing",
        "176|TIMEOUT|0|cpu=1,mem=512M|c1|00:01:05|00:01:00|0:15|2026-11-26T04:34:10|sleep",
        "12_0|CANCELLED by 1000|0|cpu=1,mem=512M|None assigned|00:10:05|01:00:00|0:0|2026-11-26T04:04:10|a\nb",
        "187|NODE_FAIL|2|cpu=1,mem=512M|c2|00:00:05|1-01:00:00|0:0|2026-11-26T04:33:29|sh",
    )
)

Slurm = Callable[..., Path]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Return what puts stand-ins for Slurm's commands into the PATH, with what each prints and its exit status.

    What it returns in turn is the file where the stand-in notes its arguments.
    """
    directory = tmp_path / "slurm"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")

    def make(name: str, stdout: str = "", stderr: str = "", status: int = 0) -> Path:
        asked = tmp_path / name
        (directory / f"{name}.said").write_text(stdout)
        noted, said = shlex.quote(str(asked)), shlex.quote(str(directory / f"{name}.said"))
        text = f"printf '%s\\0' \"$@\" >>{noted}; env >{noted}.env; cat {said}; "
        program(directory, name, f"{text}printf %s {shlex.quote(stderr)} >&2; exit {status}")
        return asked

    return make


@pytest.fixture
def cluster(slurm: Slurm) -> Slurm:
    """Return a cluster with two nodes, three jobs in the queue, and four that have ended."""
    slurm("sinfo", SINFO)
    slurm("squeue", SQUEUE)
    slurm("sacct", SACCT)
    return slurm


def _command(
    name: str, *arguments: str, before: str = "", cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Be the command, in a process that runs the statement `before` first."""
    argv = [sys.executable, "-c", f"from container_manager import {name}\n{before}\n{name}.main()", *arguments]
    env = {**os.environ, "PYTHONPATH": str(SRC), **env}
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, cwd=cwd, env=env)


# what Slurm says


def test_nodes_stand_once_with_what_is_in_use(cluster: Slurm) -> None:
    first, second = jobs.nodes()
    assert first == jobs.Node("c1", "mixed", 2, 1, 24105, 512, 0, 0, "")
    assert (second.gpus, second.gpus_in_use, second.reason) == (2, 1, "Not responding")
    assert first.takes_jobs
    assert not second.takes_jobs, "it does not answer"


def test_queue_is_read_whatever_is_in_a_name(cluster: Slurm) -> None:
    running, again, array = jobs.queued()
    assert (running.cpus, running.memory_mb, running.gpus, running.nodes, running.tries) == (3, 1536, 1, "c[1-2]", 1)
    assert (again.tries, again.reason) == (2, "BeginTime")
    assert (array.id, array.name) == ("12_[4-999]", "a\nb")


def test_ended_jobs_say_how(cluster: Slurm) -> None:
    said = {job.id: (job.state, job.reason, job.elapsed) for job in jobs.ended()}
    assert said == {
        "176": ("timeout", "over its time of 1:00", "1:05"),
        "187": ("node_fail", "its node died", "0:05"),
        "50": ("failed", "exit status 7", "0:00"),
        "12_0": ("cancelled", "", "10:05"),
    }
    assert [job.id for job in jobs.ended()] == ["176", "187", "50", "12_0"], "the last one first"


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("0:01", 1),
        ("10:30", 11),
        ("2:00:00", 120),
        ("1-0", 1440),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("1-0:0:1", 1441),
    ],
)
def test_times_are_whole_minutes(text: str, minutes: int) -> None:
    assert jobs.minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "0:0", "-1", "x", "1:2:3:4", "1.5", "1 0", "٣", "99999999", "1-", "1\n"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"time|year"):
        jobs.minutes(text)


# cminfo


def test_table_has_all_and_fits(cluster: Slurm) -> None:
    done = _command("cminfo")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.stdout
    words = [line.split() for line in lines]
    assert ["c1", "mixed", "1/2", "0.5/23.5", "0/0"] in words
    assert ["all", "nodes", "1/4", "0.5/47.1", "1/2"] in words
    assert "2nd try" in done.stdout and "over its time of 1:00" in " ".join(done.stdout.split())
    assert "a?b" in done.stdout, "a name is one line's"


def test_json_is_one_line_with_everything(cluster: Slurm) -> None:
    found = json.loads(_command("cminfo", "--json").stdout)
    assert (len(found["nodes"]), len(found["jobs"]), len(found["ended"])) == (2, 3, 4)
    in_use = {"cpus_in_use": 1, "memory_mb_in_use": 512, "gpus_in_use": 1}
    assert found["total"] == {"nodes": 2, "cpus": 4, "memory_mb": 48210, "gpus": 2, **in_use}


def test_many_waiting_jobs_are_counted_not_listed(cluster: Slurm) -> None:
    line = "{}|PENDING|0|cpu=1,mem=512M,node=1,billing=1||0:00|1:00:00|Priority|many"
    cluster("squeue", "".join(_record(line.format(number), f"{R}\n") for number in range(1000, 2000)))
    few, all_ = _command("cminfo").stdout, _command("cminfo", "--all").stdout
    assert few.count(" pending ") == 20
    assert "980 more wait: cminfo --all" in few
    assert all_.count(" pending ") == 1000
    assert "more wait" not in all_


def test_cluster_is_shown_while_the_accounting_is_away(cluster: Slurm) -> None:
    cluster("sacct", "", "sacct: error: slurmdbd: Connection refused\n", 1)
    done = _command("cminfo")
    assert done.returncode == 0
    assert "sleeper" in done.stdout
    assert "ended jobs are not shown: sacct: slurmdbd: Connection refused" in " ".join(done.stdout.split())


def test_away_slurm_is_one_line(cluster: Slurm) -> None:
    cluster("sinfo", "", "slurm_load_partitions: Unable to contact slurm controller (connect failure)\n", 1)
    done = _command("cminfo")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: sinfo: Unable to contact slurm controller (connect failure)\n"


def test_without_slurm_it_says_where_to_go(slurm: Slurm) -> None:
    done = _command("cminfo")
    assert (done.returncode, done.stderr) == (
        1,
        "error: there is no sinfo here\n→ run it on the cluster's users' node\n",
    )


def test_watching_ends_with_an_interruption(cluster: Slurm) -> None:
    argv = [sys.executable, "-u", "-c", "from container_manager.cminfo import main; main()", "--watch", "--json"]
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        assert process.stdout and process.stderr
        looks = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""
    assert looks[0] == looks[1]


@pytest.mark.parametrize("name", ["cminfo", "cmrun", "cmkill"])
def test_help_comes_before_anything_heavy_is_imported(name: str) -> None:
    text = "import atexit, sys; atexit.register(lambda: print(*sys.modules))"
    done = _command(name, "--help", before=text)
    assert "Usage: " in done.stdout
    assert not {"rich", "yaml", "docker", "numpy"} & set(done.stdout.split())


# cmkill


@pytest.mark.parametrize(
    "text", ["word", "0", "-5", "1.5", "", "99999999999999", "--name", "../x", "1;2", "١٢", "x" * 300, "1_"]
)
def test_what_is_no_number_of_a_job_is_refused_unasked(slurm: Slurm, text: str) -> None:
    asked = slurm("scancel")
    done = _command("cmkill", "--", text)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {text!r} is no number of a job\n")
    assert not asked.exists()


@pytest.mark.parametrize(
    ("said", "recorded", "message"),
    [
        ("Access/permission denied", "", "is not yours"),
        ("Invalid job id specified", "", "there is no job 9 of yours"),
        ("Invalid job id specified", "COMPLETED|0:0|c1|01:00:00|0\n", "has ended already: completed"),
        (
            "Job/step already completing or completed",
            "CANCELLED by 1|0:0|c1|1:0|0\n",
            "has ended already: cancelled by 1",
        ),
        ("Unable to contact slurm controller", "", "could not be ended: Kill job error"),
    ],
)
def test_why_a_job_cannot_be_ended(slurm: Slurm, said: str, recorded: str, message: str) -> None:
    slurm("scancel", "", f"scancel: Terminating job 9\nscancel: error: Kill job error on job id 9: {said}\n")
    slurm("sacct", recorded)
    done = _command("cmkill", "9")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr.splitlines()[0]


def test_each_of_several_jobs_is_tried(slurm: Slurm) -> None:
    asked = slurm("scancel", "", "scancel: Terminating job\n")
    done = _command("cmkill", "12", "word", "13_4")
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'word'")
    assert asked.read_text().split("\0")[:-1] == ["--verbose", "12", "--verbose", "13_4"]


# cmrun


@pytest.fixture
def submitting(slurm: Slurm) -> Path:
    """Return where sbatch notes what it was asked; the cluster has two nodes of two CPUs."""
    two = "".join(_record(f"c{n}|idle|0/2/0/2|24105|0|(null)|(null)|none", f"{R}\n") for n in (1, 2))
    slurm("sinfo")
    directory = Path(slurm("scancel").parent, "slurm")
    program(
        directory,
        "sinfo",
        "case $* in *--format=%R*) echo shared; echo normal;; *--format=%l*) echo 8:00:00;; "
        f"*) printf %s {shlex.quote(two)};; esac",
    )
    return slurm("sbatch", "63\n")


@pytest.fixture
def at_home(tmp_path: Path) -> Path:
    """Return a working directory that is on the home's file system, as far as cmrun can see."""
    directory = tmp_path / "work"
    directory.mkdir()
    return directory


def _cmrun(*arguments: str, cwd: Path, home: Path) -> subprocess.CompletedProcess[str]:
    shared = "import pathlib; cmrun._mount = lambda path: pathlib.Path('/')"
    others = {"SBATCH_PARTITION": "normal", "SLURM_JOB_ID": "1"}
    return _command("cmrun", *arguments, before=shared, cwd=cwd, HOME=str(home), **others)


def test_command_arrives_unchanged_and_the_number_is_printed(submitting: Path, at_home: Path, tmp_path: Path) -> None:
    command = ["/bin/odd name", "", "-x", "--wait", "a\nb\r\n", "'\"`$(id)\\", "ö"]
    done = _cmrun("-n", "2", "-p", "2", "--retries", "3", "--time", "1:30:00", *command, cwd=at_home, home=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "63\n", "")
    asked = submitting.read_bytes().decode().split("\0")[:-1]
    script = next(place for place, part in enumerate(asked) if part.endswith("job.sh"))
    assert asked[script + 1 :] == ["3", "none", *command]
    options = asked[:script]
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--partition=shared", "--requeue", "--time=90"} <= set(
        options
    )
    assert "--job-name=odd name" in options
    assert "SBATCH_PARTITION" not in Path(f"{submitting}.env").read_text(), "it would count for more than the settings"
    assert (at_home / "cmlogs").is_dir()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["-n", "3", "true"], 1, "error: 3 nodes cannot be had: the partition shared has c1 with 2 CPUs, c2 with"),
        (["-p", "3", "true"], 1, "error: 1 node with 3 CPUs each cannot be had"),
        (["--time", "9:00:00", "true"], 1, "error: 540 minutes are too long: in shared a job may take 480"),
        (["--partition", "nope", "true"], 1, "error: there is no partition 'nope'\n→ there are shared, normal"),
        (["--partition", "-x", "true"], 2, "'-x' is no name of a partition"),
        (["--time", "0", "true"], 2, "0 is no time at all"),
        (["-n", "0", "true"], 2, "0 is not in the range"),
        (["-n", "two", "true"], 2, "'two' is not a valid integer"),
        (["-p", "-1", "true"], 2, "-1 is not in the range"),
        (["-n", "9" * 30, "true"], 2, "is not in the range"),
        (["--retries", "-1", "true"], 2, "-1 is not in the range"),
        ([], 2, "Missing argument 'COMMAND...'"),
        ([""], 2, "the command is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_made(
    submitting: Path, at_home: Path, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    done = _cmrun(*arguments, cwd=at_home, home=tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert not submitting.exists()
    assert not (at_home / "cmlogs").exists()


def test_directory_that_slurm_would_take_for_a_pattern(submitting: Path, at_home: Path, tmp_path: Path) -> None:
    directory = at_home / "100 %j"
    directory.mkdir()
    assert _cmrun("true", cwd=directory, home=tmp_path).returncode == 0
    assert f"--output={at_home}/100 %%j/cmlogs/%j.log" in submitting.read_text().split("\0")
    directory = at_home / "a\\b"
    directory.mkdir()
    done = _cmrun("true", cwd=directory, home=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "it has a backslash" in done.stderr


def test_logs_that_cannot_be_made_are_refused(submitting: Path, at_home: Path, tmp_path: Path) -> None:
    (at_home / "cmlogs").write_text("")
    done = _cmrun("true", cwd=at_home, home=tmp_path)
    assert done.returncode == 1
    assert "cmlogs is no directory" in done.stderr
    assert not submitting.exists()


def test_settings_count_where_the_command_line_says_nothing(submitting: Path, at_home: Path, tmp_path: Path) -> None:
    settings = tmp_path / ".config" / "cfiddle" / "cmrun.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text("nodes: 2\nclones: 2\ntime: 1:30\npartition: normal\nretries: 1\n")
    assert _cmrun("-p", "1", "true", cwd=at_home, home=tmp_path).returncode == 0
    options = submitting.read_text().split("\0")
    expected = {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--time=2", "--partition=normal", "--requeue"}
    assert expected <= set(options)
    assert _cmrun("--help", cwd=at_home, home=tmp_path).returncode == 0


def test_the_users_settings_go_before_the_administrators(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("nodes: 2\nclones: 2\n")
    (tmp_path / "b").write_text("nodes: 3\n")
    files = [str(tmp_path / name) for name in ("a", "b", "missing")]
    assert job_settings.read(cmrun.params, files) == {"nodes": 3, "clones": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node: 2", "unknown key 'node'\n→ known are nodes, clones, partition, time, retries, mpi"),
        ("wait: true", "unknown key 'wait'"),
        ("nodes: none", "nodes: 'none' is not a valid integer"),
        ("nodes: 0", "nodes: 0 is not in the range"),
        ("time: later", "time: 'later' is no time"),
        ("- nodes", "each line must be `KEY: VALUE`"),
        ("nodes: [1]", "each line must be `KEY: VALUE`"),
        ("nodes: {", "is no YAML"),
        ("nodes: !!python/object/apply:os.system [id]", "each line must be"),
        ("a: &a [1]\nb: *a", "each line must be"),
    ],
)
def test_wrong_settings_are_named_with_their_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "cmrun.yaml"
    file.write_text(text)
    with pytest.raises(ContainerError) as caught:
        job_settings.read(cmrun.params, [str(file)])
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)


def test_settings_that_are_empty_say_nothing(tmp_path: Path) -> None:
    file = tmp_path / "cmrun.yaml"
    file.write_text("# nodes: 2\n")
    assert job_settings.read(cmrun.params, [str(file)]) == {}


# the batch job


def _batch(directory: Path, *arguments: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "SLURM_JOB_ID": "63", "SLURM_JOB_NODELIST": "c[1-2]", "SLURM_RESTART_COUNT": str(restarts)}
    argv = ["bash", str(SRC / "container_manager" / "job.sh"), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, cwd=directory, env=env)


def test_batch_job_starts_the_clones_and_ends_with_their_status(slurm: Slurm, tmp_path: Path) -> None:
    asked, updated = slurm("srun", status=3), slurm("scontrol")
    done = _batch(tmp_path, "2", "none", "echo", "a b", "")
    assert done.returncode == 3
    assert [line.partition("job ")[2] for line in done.stdout.splitlines()] == [
        "63: try 1 of 3 on c[1-2]",
        "63: ended with exit status 3",
    ]
    argv = asked.read_text().split("\0")[:-1]
    assert argv[argv.index("--") :] == ["--", "echo", "a b", ""]
    assert {"--mpi=none", "--output=cmlogs/%j.%t.out", "--error=cmlogs/%j.%t.err", "--open-mode=append"} <= set(argv)
    assert not updated.exists(), "Slurm may try again"


def test_last_try_is_the_last(slurm: Slurm, tmp_path: Path) -> None:
    asked, updated = slurm("srun"), slurm("scontrol")
    done = _batch(tmp_path, "2", "pmix", "true", restarts=2)
    assert done.returncode == 0
    assert "its node died" in done.stdout and "try 3 of 3" in done.stdout
    assert updated.read_text().split("\0")[:-1] == ["update", "JobId=63", "Requeue=0"]
    assert {"--mpi=pmix", "--kill-on-bad-exit=1"} <= set(asked.read_text().split("\0"))


def test_try_too_many_ends_itself_where_slurm_could_not_be_told(slurm: Slurm, tmp_path: Path) -> None:
    asked = slurm("srun")
    slurm("scontrol", "", "slurm_update error: Unable to contact slurm controller\n", 1)
    assert _batch(tmp_path, "2", "none", "true", restarts=2).returncode == 0
    asked.unlink()
    done = _batch(tmp_path, "2", "none", "true", restarts=3)
    assert done.returncode == 1
    assert "not tried again: 3 of 3 tries are used up" in done.stdout
    assert not asked.exists()


# waiting


def _shown(state: str, exit_code: str = "0:0", restarts: int = 0) -> str:
    return (
        f"JobId=63 JobName=sh JobState={state} Reason=None Restarts={restarts} ExitCode={exit_code} TimeLimit=00:01:00"
    )


@pytest.mark.parametrize(
    ("states", "status", "said"),
    [
        ([_shown("PENDING"), _shown("RUNNING"), _shown("COMPLETED")], 0, ""),
        ([_shown("RUNNING"), _shown("COMPLETING"), _shown("FAILED", "3:0")], 3, "job 63: exit status 3\n"),
        ([_shown("FAILED", "0:9")], 137, "job 63: killed by signal 9\n"),
        ([_shown("TIMEOUT", "0:15")], 124, "job 63: over its time of 1:00\n"),
        ([_shown("CANCELLED", "0:15")], 1, "job 63: cancelled\n"),
        (
            [_shown("RUNNING"), _shown("PENDING", restarts=1), _shown("NODE_FAIL", "0:1", restarts=1)],
            1,
            "job 63: its node died; 2nd try\njob 63: its node died, 2nd try\n",
        ),
    ],
)
def test_waiting_ends_as_the_job_does(
    submitting: Path, at_home: Path, tmp_path: Path, slurm: Slurm, states: list[str], status: int, said: str
) -> None:
    slurm("srun")
    answers = tmp_path / "answers"
    answers.write_text("\n".join(states) + "\n")
    shift = f"head -n 1 {answers}; sed -i '1{{$!d}}' {answers}"
    program(tmp_path / "slurm", "scontrol", shift)
    done = _cmrun("--wait", "true", cwd=at_home, home=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (status, "63\n", said)
    assert answers.read_text() == states[-1] + "\n", "it waited for the end"


@pytest.mark.parametrize(
    ("number", "status", "killed"),
    [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, False), (signal.SIGHUP, 129, False)],
)
def test_ctrl_c_ends_the_job_and_nothing_else_does(
    submitting: Path, at_home: Path, tmp_path: Path, slurm: Slurm, number: signal.Signals, status: int, killed: bool
) -> None:
    slurm("scontrol", _shown("RUNNING"))
    program(tmp_path / "slurm", "srun", f"touch {tmp_path}/hanging; exec sleep 60")
    asked = slurm("scancel", "", "scancel: Terminating job 63\n")
    text = (
        "import pathlib, signal; [signal.signal(n, signal.SIG_DFL) for n in (1, 2, 15)]; "
        "from container_manager import cmrun; cmrun._mount = lambda path: pathlib.Path('/'); cmrun.main()"
    )
    argv = [sys.executable, "-c", text, "--wait", "true"]
    env = {**os.environ, "PYTHONPATH": str(SRC), "HOME": str(tmp_path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, cwd=at_home, env=env) as process:
        wait_until(lambda: (tmp_path / "hanging").exists(), timeout_s=20, what="it waits")
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    assert process.returncode == status
    assert said == f"interrupted: job 63 {'was ended' if killed else 'goes on'}\n"
    assert asked.exists() == killed
