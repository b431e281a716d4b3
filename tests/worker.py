"""A worker in two containers: the agent with the real engine, and one in which job steps run as users."""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cfiddle_cluster.commands import docker_cli, run
from containers import Container, Start
from live import wait_until

USER, OTHER = 2001, 2002

# What every program begins with.
PRELUDE = """
import os, signal, subprocess, sys, threading, time
from delegate_function import DelegateFunctionException, LimitExceeded, ProcessDied, SandboxDelegate, SandboxRefused
class Call:
    def run(self, text, *arguments):
        names = {"arguments": arguments}
        exec(text, names)
        return names.get("result")
def call(text, *arguments, **options):
    return SandboxDelegate(**options).invoke(Call(), "run", text, *arguments)
def refusal(text="", **options):
    try:
        call(text, **options)
    except SandboxRefused as error:
        return error.details["reason"], str(error)
"""

# A request by hand, as an enemy writes it: any fields, any descriptors.
RAW = """
import array, json, os, socket, sys
def ask(request, descriptors=None, kind=socket.SOCK_STREAM):
    agent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent.settimeout(20)
    agent.connect("/run/cfiddle-agent/agent.sock")
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    read, write = os.pipe()
    given = [theirs.fileno(), write, write] if descriptors is None else descriptors
    base = {"v": 2, "type": "call", "id": os.urandom(16).hex(), "job": 7, "profile": "default"}
    data = request if isinstance(request, bytes) else json.dumps({**base, **request}).encode()
    agent.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", given))] if given else [])
    answer = json.loads(agent.recv(65536) or b"{}")
    agent.close()
    return answer.get("code") or answer.get("type"), answer.get("message", "")
"""


class Worker:
    """An agent, and a container in which job steps run."""

    def __init__(self, agent: Container, step: Container, grants: Path) -> None:
        self.agent = agent
        self.step = step
        self._grants = grants

    def grant(self, job: int, content: str) -> None:
        aside = self._grants / f".{job}"
        aside.write_text(content)
        aside.rename(self._grants / str(job))

    def revoke(self, *jobs: int) -> None:
        for job in jobs:
            (self._grants / str(job)).unlink(missing_ok=True)

    def start(self, program: str, *, uid: int = USER, job: int = 7, prelude: str = PRELUDE) -> subprocess.Popen[str]:
        """Start a Python program as a user's job step."""
        options = ["--user", f"{uid}:{uid}", "--env", f"SLURM_JOB_ID={job}", "--workdir", "/tmp"]
        argv = [str(docker_cli()), "exec", "-i", *options, self.step.name, "python3", "-c", prelude + program]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(argv, text=True, **pipes)

    def python(self, program: str, *, timeout_s: float = 60, **options: Any) -> str:
        """Run a Python program as a user's job step and return what it wrote; fail if it fails."""
        process = self.start(program, **options)
        out, err = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, err[-3000:]
        return out.strip()

    def sandboxes(self, *options: str) -> list[str]:
        argv = [docker_cli(), "ps", "-a", "-q", "--no-trunc", "--filter", "label=cfiddle.sandbox", *options]
        return run(argv, timeout_s=30).split()

    def held(self, *states: str) -> list[str]:
        """Return the containers that the agent holds in one of these states; without any, in all."""
        lines = self.agent.run("python3", "-m", "agent", "--list").splitlines()
        return [fields[0] for fields in map(str.split, lines) if not states or fields[1] in states]

    def events(self, since: float) -> list[dict[str, Any]]:
        """Return what the engine says of sandboxes since a time of day."""
        period = ["--since", f"{since:.3f}", "--until", f"{time.time():.3f}"]
        kind = ["--filter", "type=container", "--filter", "label=cfiddle.sandbox"]
        argv = [docker_cli(), "events", *period, *kind, "--format", "{{json .}}"]
        return [json.loads(line) for line in run(argv, timeout_s=30).splitlines()]

    def one_that_serves(self) -> dict[str, Any]:
        """Wait for a call to be served, and return what the engine says of its container."""
        [container] = wait_until(lambda: self.held("serving"), timeout_s=20, what="a call is served")
        return dict(json.loads(run([docker_cli(), "inspect", container], timeout_s=30))[0])

    def wait_until_none_runs(self, *, timeout_s: float = 2.0) -> None:
        wait_until(
            lambda: not self.sandboxes("--filter", "status=running"),
            timeout_s=timeout_s,
            interval_s=0.05,
            what="no sandbox runs",
        )

    def wait_until_none_is_left(self) -> None:
        wait_until(lambda: not self.sandboxes(), timeout_s=10, what="no sandbox is left")


def start_worker(
    start: Start, image: Callable[[str], str], base: Path, policy: str, *, options: Sequence[str] = ()
) -> Worker:
    """Start an agent with a policy, and a container in which job steps run.

    Args:
        base: a directory for them.
        options: further ones of docker run for the agent.
    """
    (base / "policy.yaml").write_text(policy)
    (base / "policy.yaml").chmod(0o444)
    for name, mode in (("socket", 0o755), ("grants", 0o700), ("sandboxes", 0o755)):
        (base / name).mkdir(mode=mode)
    agent = start(
        "agent",
        options=[
            *("--hostname", "c1", "--env", f"SANDBOX_IMAGE={image('sandbox')}"),
            *("--volume", "/var/run/docker.sock:/var/run/docker.sock", "--volume", "/sys/fs/cgroup:/run/cgroup"),
            *("--volume", f"{base}/policy.yaml:/etc/cfiddle/policy.yaml:ro"),
            *("--volume", f"{base}/socket:/run/cfiddle-agent", "--volume", f"{base}/grants:/run/cfiddle-grants:ro"),
            *("--volume", f"{base}/sandboxes:/run/cfiddle-sandboxes"),
            *options,
        ],
    )
    step = start(
        "cluster",
        "1d",
        options=[
            *("--hostname", "c1", "--entrypoint", "sleep"),
            *("--volume", f"{base}/socket:/run/cfiddle-agent:ro", "--volume", f"{base}/grants:/run/cfiddle-grants"),
        ],
    )
    agent.wait_until_healthy()
    return Worker(agent, step, base / "grants")
