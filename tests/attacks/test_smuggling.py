"""Attack 3: arguments smuggled into the names of images, profiles, files and jobs.

What a call's container is like stands in golden.json, as the engine shows it. Where that shall change, write it anew
with `WRITE_GOLDEN=1 ./invoke test --only tests/attacks/test_smuggling.py`, and read the difference.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from live import LiveCluster, wait_until

GOLDEN = Path(__file__).with_name("golden.json")

SMUGGLED = "--privileged\n-v /:/host;$(touch /tmp/owned)`id`\\'\"../../etc"

# Runs in a job step whose job has a hostile name, with hostile settings around it.
CALL = """
import os, sys, tempfile
from delegate_function import SandboxDelegate

class Slow:
    def run(self, text, **more):
        import os, time
        print(sorted(os.listdir(".")), flush=True)
        time.sleep(60)

smuggled = sys.argv[1].replace("/", "|")
os.chdir(tempfile.mkdtemp())
open(smuggled, "w").close()
SandboxDelegate().call(Slow(), "run", [sys.argv[1]], {sys.argv[1]: sys.argv[1]}, inputs=[smuggled])
"""

REFUSALS = """
import json
from delegate_function import CallNotSent, ConfigurationError, DelegateFunctionException
from delegate_function import DockerDelegate, SandboxDelegate, SlurmDelegate

class Nothing:
    def run(self):
        pass

NAMES = ["--privileged", "-v/:/host", "a\\n--privileged", "a\\n", "a\\0b", "a;id", "../a", "$(id)", "a b", ""]
PATHS = ["../a", "a/../../b", "/etc/passwd", "a\\0b", "", ".", ".."]
taken = []

def refused(kind, name, attempt):
    try:
        attempt()
    except ConfigurationError:
        return
    except CallNotSent as error:
        if "leaves the working directory" in str(error) or "is not a path" in str(error):
            return
    except DelegateFunctionException:
        pass  # somebody took it for a name and looked for it
    taken.append(f"{kind} {name!r}")

for name in NAMES:
    refused("image", name, lambda: DockerDelegate(name))
    refused("profile", name, lambda: SandboxDelegate(profile=name))
    for option in ("job_name", "partition", "nodelist", "constraint", "account"):
        refused(option, name, lambda: SlurmDelegate(SandboxDelegate(), **{option: name}).invoke(Nothing(), "run"))
for path in PATHS:
    refused("input", path, lambda: SlurmDelegate(SandboxDelegate()).call(Nothing(), "run", inputs=[path]))
    refused("output", path, lambda: SlurmDelegate(SandboxDelegate()).call(Nothing(), "run", outputs=[path]))
print(json.dumps(taken))
"""

ROUND_TRIP = """
import os, tempfile
from delegate_function import SandboxDelegate, SlurmDelegate

class Copy:
    def run(self, names):
        for name in names:
            with open(name) as source, open(name + ".out", "w") as target:
                target.write(source.read())
        return sorted(os.listdir("."))

NAMES = ["-rf", "--privileged", "a\\nb", "a;id", "$(id)", "a b", "-v|:|host", "*"]
os.chdir(tempfile.mkdtemp())
for name in NAMES:
    with open(name, "w") as file:
        file.write(name)
outputs = [name + ".out" for name in NAMES]
there = SlurmDelegate(SandboxDelegate()).call(Copy(), "run", [NAMES], inputs=NAMES, outputs=outputs)
same = [open(name + ".out").read() == name for name in NAMES]
print(there == sorted(NAMES + outputs), sorted(os.listdir(".")) == there, same)
"""


def shown(inspected: dict[str, Any]) -> str:
    """Return what the engine shows of a call's container, but for what differs from one to the next."""
    settings = {"Config": inspected["Config"], "HostConfig": inspected["HostConfig"]}
    text = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False)
    for pattern, word in {
        r'"Image": "[^"]*"': '"Image": "IMAGE"',
        r"/[^\":]*/[0-9a-f]{32}:": "/SOCKET:",
        r'"(cfiddle\.(?:call|job|uid))": "[0-9a-f]+"': r'"\1": "NUMBER"',
        r'"CgroupnsMode": "private"': '"CgroupnsMode": "host"',  # as the machine's cgroups are of version 2 or 1
    }.items():
        text = re.sub(pattern, word, text)
    return text + "\n"


def test_container_of_a_call_is_the_golden_one_whatever_is_smuggled(cluster: LiveCluster) -> None:
    env = {"DOCKER_HOST": "tcp://127.0.0.1:1", "SANDBOX_IMAGE": "debian", "CFIDDLE_PROFILE": SMUGGLED}
    argv = ["srun", f"--job-name={SMUGGLED}", f"--comment={SMUGGLED}", "python3", "-c", CALL, SMUGGLED]
    caller = cluster.background(argv, "test_user1", env=env)
    try:
        caller.wait_for_line(re.escape(repr(SMUGGLED.replace("/", "|"))[1:-1][:20]), timeout_s=30)
        [found] = wait_until(lambda: _serving(cluster), timeout_s=20, what="a sandbox serves the call")
        worker, _, container = found.partition(":")
        text = shown(json.loads(cluster.on_worker(worker, ["docker", "inspect", container]).ok())[0])
    finally:
        cluster.user("scancel -u test_user1", "test_user1").ok()
        caller.wait()
    assert cluster.user("ls /tmp/owned", "test_user1").exit_status != 0
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(text)
        pytest.fail(f"{GOLDEN} is written anew: read the difference, and run this again without WRITE_GOLDEN")
    assert text == GOLDEN.read_text()


def _serving(cluster: LiveCluster) -> list[str]:
    """Return the sandboxes in which a call's process runs beside the one that supervises it."""
    found = []
    for sandbox in cluster.sandboxes():
        worker, _, container = sandbox.partition(":")
        if len(cluster.on_worker(worker, ["docker", "top", container, "-o", "pid"]).stdout.splitlines()) > 2:
            found.append(sandbox)
    return found


def test_name_that_is_none_is_refused(cluster: LiveCluster) -> None:
    assert json.loads(cluster.python(REFUSALS, "test_user1", timeout_s=120).ok()) == []
    assert cluster.user("ls /tmp/owned", "test_user1").exit_status != 0


def test_file_with_a_strange_name_travels_and_does_nothing_else(cluster: LiveCluster) -> None:
    result = cluster.python(ROUND_TRIP, "test_user1")
    assert (result.exit_status, result.stdout.strip()) == (0, f"True True {[True] * 8}"), result.stderr
