"""Run a hop's process in a Slurm job, and ask Slurm what became of the job.

What a caller sets is checked here and given to srun as `--option=value` in one argument each, so that no value can
become an option of its own.
"""

from __future__ import annotations

import os
import re
import time

from delegate_function.errors import (
    ConfigurationError,
    DelegateFunctionException,
    HopFailed,
    JobCancelled,
    JobError,
    JobRejected,
    JobTimeout,
    LimitExceeded,
    NodeFailed,
)

TYPE_CHECKING = False  # the module `typing` takes longer to load than all that a hop needs
if TYPE_CHECKING:
    from typing import Any

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}"
_LIST = r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]{0,255}"
_NUMBER = r"[1-9][0-9]{0,8}"
OPTIONS = {
    "partition": ("partition", _NAME),
    "time": ("time", r"[0-9][0-9:-]{0,19}"),
    "account": ("account", _NAME),
    "qos": ("qos", _NAME),
    "reservation": ("reservation", _NAME),
    "constraint": ("constraint", r"[A-Za-z0-9_][A-Za-z0-9_.&|-]{0,255}"),
    "nodelist": ("nodelist", _LIST),
    "exclude": ("exclude", _LIST),
    "cpus": ("cpus-per-task", _NUMBER),
    "memory_mb": ("mem", _NUMBER),
    "job_name": ("job-name", _NAME),
}
_UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "SUSPENDED")
_QUERY_S = 5.0
_ENDING_S = 2.0
_SUBMIT_S = 60.0
_SETPRIV = "/usr/bin/setpriv"
_HOP = (
    "import posix, sys; "
    "sys.path.append('/opt/cfiddle') if posix.access('/opt/cfiddle', posix.R_OK) else __import__('site').main(); "
    "from delegate_function.hop import main; main()"
)
"""Where the package lies in the cluster's images; without what `site` does, Python starts in two thirds of the time."""


def checked(options: dict[str, Any]) -> dict[str, str]:
    """Return the options as text; raise ConfigurationError for an unknown one or a value that is not of its shape."""
    found: dict[str, str] = {}
    for name, value in options.items():
        if value is None:
            continue
        if name not in OPTIONS:
            raise ConfigurationError(f"unknown Slurm option {name!r}; known are {', '.join(OPTIONS)}")
        text = str(value)
        if isinstance(value, bool) or not re.fullmatch(OPTIONS[name][1], text, re.ASCII):
            raise ConfigurationError(f"{text!r} is no value for the Slurm option {name!r}")
        found[name] = text
    return found


def srun_argv(hop: dict[str, Any]) -> list[str]:
    """Return the command that runs a hop's process as the only task of a job.

    Never with --unbuffered, --pty or --label: each of them changes the bytes of the task's output.
    """
    argv = ["srun", *_job_options(hop), "--input=0", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    if hop.get("lease"):
        # When its place is wanted (PreemptParameters=send_user_signal), and a minute before its time is up anyway.
        # It waits until the hop can take it, which it would otherwise die of.
        argv += ["--signal=USR1@60", "--", "env", "--block-signal=USR1"]
    else:
        argv.append("--")
    if hop.get("executable"):
        argv.append(str(hop["executable"]))
    else:
        argv += ["python3", "-I", "-S", "-c", _HOP]
    if os.path.exists(_SETPRIV):
        # srun killed with its caller, and not left waiting in the queue: TERM makes it take its job away.
        argv = [_SETPRIV, "--pdeathsig", "TERM", *argv]
    return argv


def _job_options(hop: dict[str, Any]) -> list[str]:
    options = checked(hop.get("options") or {})
    options.setdefault("job_name", "delegate")
    # The working directory may not exist there; the call looks for it itself, and slurmd would complain.
    return ["--nodes=1", "--ntasks=1", "--chdir=/", *(f"--{OPTIONS[name][0]}={text}" for name, text in options.items())]


def environment() -> dict[str, str]:
    """Return the environment for srun and sbatch: without settings that would change what they do."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SRUN_", "SLURMD_", "SBATCH_")) or name.startswith("SLURM_CONF")
    }


def sbatch_argv(hop: dict[str, Any], directory: str, *, tasks: int, at_once: int) -> list[str]:
    """Return the command that submits a batch job, or an array of so many; its script comes on standard input.

    What the job writes, and what Slurm says of it, goes into `0.log` in the directory, or the number of the task.
    A job whose node dies is run again, whatever the cluster does with others.
    """
    log = directory.replace("%", "%%") + ("/%a.log" if tasks > 1 else "/0.log")
    argv = ["sbatch", "--parsable", *_job_options(hop), "--requeue", "--open-mode=append", "--input=/dev/null"]
    argv.append(f"--output={log}")
    if tasks > 1:
        argv.append(f"--array=0-{tasks - 1}%{at_once}")
    return argv


def submit(argv: list[str], script: str) -> str:
    """Submit a batch job; return its number."""
    import subprocess

    try:
        done = subprocess.run(
            argv, input=script, env=environment(), capture_output=True, text=True, timeout=_SUBMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HopFailed(f"a batch job could not be submitted: {error}") from error
    if done.returncode:
        raise JobRejected(f"Slurm did not accept the batch job{_quoted(done.stderr)}")
    return done.stdout.strip().partition(";")[0]


def explain(status: int | None, diagnostics: str, where: str, job_id: str | None = None) -> DelegateFunctionException:
    """Return why srun ended before the call did, from its exit status, what it said, and what Slurm knows."""
    job_id = job_id or job_named_in(diagnostics)
    killed = status is not None and status < 0  # then the job does not end with srun
    known = query(job_id, wait_s=0 if killed else _ENDING_S) if job_id else {}
    error = _end_of_job(job_id, known, diagnostics, _quoted(diagnostics), where, status)
    if error is not None:
        return error
    state = known.get("JobState", "")
    ended = (
        f"srun {'was killed by signal' if killed else 'ended with status'} {abs(status or 0)} before the call did"
        + (f"; {_named(job_id, known)} is {state}" if state else "")
    )
    return HopFailed(ended + _quoted(diagnostics), where=where, job_id=job_id, state=state or None, exit_status=status)


def explain_batch(job_id: str, log: str, where: str) -> DelegateFunctionException:
    """Return why a batch job that is over left no result, from what is in its log, and what Slurm knows."""
    known = query(job_id) or _recorded(job_id)
    # What the log says may be of an earlier try.
    error = _end_of_job(job_id, known, "", _quoted(log), where, None)
    if error is not None:
        return error
    state = known.get("JobState")
    said = f"says that it is {state}" if state else "knows nothing of it any more"
    text = f"{_named(job_id, known)} left no result, and Slurm {said}{_quoted(log)}"
    return JobError(text, where=where, job_id=job_id, state=state)


def _named(job_id: str | None, known: dict[str, str]) -> str:
    about = f"Slurm's job {job_id}" if job_id else "the Slurm job"
    if known.get("NodeList") not in (None, "", "(null)"):
        about += f" on {known['NodeList']}"
    return about


def _end_of_job(
    job_id: str | None, known: dict[str, str], diagnostics: str, said: str, where: str, status: int | None
) -> DelegateFunctionException | None:
    """Return how a job ended, if that is known or was said."""
    state = known.get("JobState", "")
    about = _named(job_id, known)
    details: dict[str, Any] = {"job_id": job_id, "state": state or None, "exit_status": status}
    reason = known.get("Reason", "None")
    because = f" ({reason})" if reason not in ("None", "", "(null)") else ""
    if state == "TIMEOUT" or "DUE TO TIME LIMIT" in diagnostics:
        limit = f" of {known['TimeLimit']}" if known.get("TimeLimit") else ""
        return JobTimeout(f"{about} came to its time limit{limit}{said}", where=where, **details)
    if state in ("NODE_FAIL", "BOOT_FAIL") or "DUE TO NODE FAILURE" in diagnostics:
        return NodeFailed(f"{about} lost its node{because}{said}", where=where, **details)
    # A job that is still completing does not say yet how it ended; its step has.
    is_open = not state or state in _UNFINISHED
    if state.startswith("CANCELLED") or (is_open and re.search("CANCELLED AT|has been revoked", diagnostics)):
        return JobCancelled(f"{about} was cancelled{because}{said}", where=where, **details)
    if state == "OUT_OF_MEMORY":
        return LimitExceeded(f"{about} ran out of memory{said}", where=where, limit="memory", **details)
    if re.search(r"Unable to allocate resources|Invalid|not permitted|unrecognized option", diagnostics) and not state:
        return JobRejected(f"Slurm did not accept the job{said}", where=where, **details)
    if state and state not in _UNFINISHED:
        return JobError(f"{about} ended as {state}{because} before the call did{said}", where=where, **details)
    return None


def job_named_in(diagnostics: str) -> str | None:
    """Return the number of the job of which srun speaks."""
    named = re.search(r"\bjob(?: allocation|id)? (\d+)", diagnostics, re.IGNORECASE)
    return named[1] if named else None


def state(job_id: str) -> str:
    """Return in words what Slurm says of a job at this moment."""
    known = query(job_id, wait_s=0)
    if not known:
        return f"Slurm says nothing of job {job_id}"
    return f"Slurm says that job {job_id} on {known.get('NodeList')} is {known.get('JobState')} ({known.get('Reason')})"


def _quoted(diagnostics: str) -> str:
    lines = [
        line
        for line in diagnostics.splitlines()
        if "queued and waiting" not in line and "allocated resources" not in line
    ]
    return "; it said:\n" + "\n".join(lines[-20:]) if lines else ""


def query(job_id: str, *, wait_s: float = _ENDING_S) -> dict[str, str]:
    """Return what slurmctld knows of a job, waiting a moment for its final state; nothing if it cannot be asked."""
    deadline = time.monotonic() + wait_s
    while True:
        known = _show(job_id)
        if not known or known.get("JobState") not in _UNFINISHED or time.monotonic() >= deadline:
            return known
        time.sleep(0.1)


def _show(job_id: str) -> dict[str, str]:
    shown = _answer(["scontrol", "--oneliner", "show", "job", checked_job(job_id)])
    return dict(re.findall(r"(\w+)=(\S*)", shown or ""))


def _recorded(job_id: str) -> dict[str, str]:
    """Return what the accounting has of a job that slurmctld has forgotten, by the names that slurmctld uses."""
    fields = ["State", "NodeList", "Reason", "Timelimit"]
    argv = ["sacct", "-X", "--noheader", "--parsable2", f"--format={','.join(fields)}", f"--jobs={checked_job(job_id)}"]
    lines = (_answer(argv) or "").splitlines()
    names = ["JobState", "NodeList", "Reason", "TimeLimit"]
    return dict(zip(names, lines[-1].split("|"), strict=False)) if lines else {}


def queued() -> dict[str, str] | None:
    """Return the state of each of this user's jobs that is not over, an array's as `12_3`; None if Slurm is silent."""
    listed = _answer(["squeue", "--me", "--noheader", "--array", "--format=%i %T"])
    return None if listed is None else dict(line.split(maxsplit=1) for line in listed.splitlines())


def checked_job(job_id: Any) -> str:
    """Return a job's number as Slurm writes it, an array's as `12` or `12_3`; raise ConfigurationError for others."""
    text = str(job_id)
    if isinstance(job_id, bool) or not re.fullmatch(r"[0-9]{1,10}(_[0-9]{1,10})?", text, re.ASCII):
        raise ConfigurationError(f"{text!r} is no number of a job")
    return text


def _answer(argv: list[str]) -> str | None:
    import subprocess

    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_QUERY_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout


def cancel(job_id: str) -> None:
    """Cancel a job whose srun may be gone."""
    import subprocess

    argv = ["scancel", checked_job(job_id)]
    try:
        subprocess.run(argv, capture_output=True, timeout=_QUERY_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HopFailed(f"job {job_id} could not be cancelled: {error}") from error
