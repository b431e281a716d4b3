"""Attack 13: what a call leaves in the place of an output file is bounded, is named, and blocks nobody."""

import json
from typing import Any

from live import PATIENCE, LiveCluster

LIMIT_S = int(8 * PATIENCE)
"""How long a call may take, in seconds; one that ends just before that was held up by what it left."""

# Runs in a job step; one sandbox for each kind of output.
PROGRAM = """
import json, os, sys, tempfile, time
from delegate_function import SandboxDelegate

class Make:
    def run(self, text):
        exec(text, {})

os.makedirs(os.path.expanduser("~/.outputs"), exist_ok=True)
results = {}
limit_s = int(sys.argv[2])
for kind, (outputs, text) in json.loads(sys.argv[1]).items():
    directory = tempfile.mkdtemp(dir=os.path.expanduser("~/.outputs"))
    os.mkdir(f"{directory}/here")
    os.chdir(f"{directory}/here")
    if isinstance(outputs, int):
        outputs = [str(number) for number in range(outputs)]
    began = time.monotonic()
    try:
        SandboxDelegate(seconds=limit_s, memory_mb=512).call(Make(), "run", [text], outputs=outputs)
        came = ["nothing", ""]
    except BaseException as error:
        came = [type(error).__name__, str(error)[-300:]]
    if time.monotonic() - began > limit_s - 1:
        came = ["late", came]
    # Everything that is there now, with its size, its kind, and how many names it has.
    left = {}
    for top, folders, files in os.walk(".."):
        for name in folders + files:
            path = os.path.join(top, name)
            status = os.lstat(path)
            left[os.path.relpath(path)] = [oct(status.st_mode >> 12), status.st_size, status.st_nlink]
    left.pop(".")
    results[kind] = [*came, left]
print(json.dumps(results))
"""

FILE = oct(0o10)

# kind: (outputs or how many, what the call does, class of the error, part of its text)
KINDS: dict[str, tuple[Any, str, str, str]] = {
    "link": (["out"], "import os; os.symlink('/etc/passwd', 'out')", "ResultNotReturned", "is a link"),
    "link on the way": (["way/passwd"], "import os; os.symlink('/etc', 'way')", "ResultNotReturned", "link"),
    "link to itself": (["out"], "import os; os.symlink('out', 'out')", "ResultNotReturned", "is a link"),
    "link to a device": (["out"], "import os; os.symlink('/dev/zero', 'out')", "ResultNotReturned", "is a link"),
    "FIFO": (["out"], "import os; os.mkfifo('out')", "ResultNotReturned", "not a regular file"),
    "socket": (
        ["out"],
        "import socket; socket.socket(socket.AF_UNIX).bind('out')",
        "ResultNotReturned",
        "No such device or address",
    ),
    "directory": (["out"], "import os; os.mkdir('out')", "ResultNotReturned", "not a regular file"),
    "device": (["out"], "import os; os.mknod('out', 0o20666, os.makedev(1, 5))", "PermissionError", ""),
    "hard link to a device": (["out"], "import os; os.link('/dev/zero', 'out')", "OSError", ""),
    "hard link to the image's": (["out"], "import os; os.link('/etc/passwd', 'out')", "OSError", ""),
    "sparse terabyte": (
        ["out"],
        "import signal; signal.signal(25, signal.SIG_IGN); open('out', 'w').truncate(1 << 40)",
        "OSError",
        "File too large",
    ),
    "sparse as may be": (["out"], "open('out', 'w').truncate(1 << 30)", "ResultNotReturned", "bytes; at most"),
    "a million files": (["out"], "for n in range(10**6): open(str(n), 'w').close()", "OSError", "No space left"),
    "a million names": (10**6, "", "CallNotSent", "a frame of"),
    "missing": (["out"], "", "ResultNotReturned", "No such file"),
}


def test_what_is_no_plain_file_is_an_error_that_says_so(cluster: LiveCluster) -> None:
    asked = {kind: [outputs, text] for kind, (outputs, text, _, _) in KINDS.items()}
    wrong = {}
    for kind, (came, said, left) in _run(cluster, asked).items():
        _, _, error, text = KINDS[kind]
        # What a call has written before it raised comes back, as far as it is a file.
        if came != error or text not in said or left not in ({}, {"out": [FILE, 0, 1]}):
            wrong[kind] = [came, said, left]
    assert wrong == {}


def test_hard_link_comes_back_as_a_file_of_its_own(cluster: LiveCluster) -> None:
    text = "import os; open('first', 'w').write('x' * 10); os.link('first', 'out'); os.link('first', 'third')"
    assert _run(cluster, {"hard link": [["out", "third"], text]}) == {
        "hard link": ["nothing", "", {"out": [FILE, 10, 1], "third": [FILE, 10, 1]}]
    }


FORGED = {
    "a path upwards": [{"kind": "output", "path": "../evil", "size": 4, "mode": 0o644}],
    "an absolute path": [{"kind": "output", "path": "/tmp/evil", "size": 4, "mode": 0o644}],
    "a name that nobody asked for": [{"kind": "output", "path": "evil", "size": 4, "mode": 0o644}],
    "an input": [{"kind": "input", "path": "out", "size": 4, "mode": 0o644}],
    "a size below zero": [{"kind": "output", "path": "out", "size": -4, "mode": 0o644}],
    "a size that is none": [{"kind": "output", "path": "out", "size": "4", "mode": 0o644}],
    "an exabyte": [{"kind": "output", "path": "out", "size": 1 << 60, "mode": 0o644}],
    "fewer bytes than were said": [{"kind": "output", "path": "out", "size": 400, "mode": 0o644}],
    "more bytes than were said": [{"kind": "output", "path": "out", "size": 1, "mode": 0o644}],
}

# The call's process writes frames itself, in the place of its result.
FORGE = """
import json, os, socket
from delegate_function import frames
def is_channel(fd):
    try:
        with socket.socket(fileno=os.dup(fd)) as found:
            return found.type == socket.SOCK_STREAM and found.family == socket.AF_UNIX
    except OSError:
        return False
[channel] = [fd for fd in range(3, 30) if is_channel(fd)]
parts = PARTS
for data in (
    frames.encode_json(frames.RESULT, {"python": [3], "parts": parts}),
    frames.encode(frames.DATA, b"evil"),
    frames.encode(frames.END),
):
    os.write(channel, data)
os._exit(0)
"""


def test_forged_result_writes_nowhere_else(cluster: LiveCluster) -> None:
    asked = {kind: [["out"], FORGE.replace("PARTS", repr(parts))] for kind, parts in FORGED.items()}
    refusals = ("HopFailed", "ResultNotReturned", "ProcessDied")
    wrong = {
        kind: [came, said, left]
        for kind, (came, said, left) in _run(cluster, asked).items()
        if came not in refusals or left != {}
    }
    assert wrong == {}
    assert cluster.user("ls /tmp/evil", "test_user1").exit_status != 0


def test_link_in_the_caller_s_directory_is_replaced_and_not_followed(cluster: LiveCluster) -> None:
    program = """
import os, tempfile
from delegate_function import SandboxDelegate, SlurmDelegate

class Write:
    def run(self):
        open("out", "w").write("new")

os.chdir(tempfile.mkdtemp())
open("precious", "w").write("kept")
os.symlink("precious", "out")
SlurmDelegate(SandboxDelegate()).call(Write(), "run", outputs=["out"])
print(open("precious").read(), os.path.islink("out"), open("out").read())
"""
    assert cluster.python(program, "test_user1").ok().strip() == "kept False new"


def _run(cluster: LiveCluster, asked: dict[str, Any]) -> dict[str, Any]:
    """Make calls, each with its outputs; return the error, its text, and what is left in the caller's directory."""
    command = ["srun", "python3", "-c", PROGRAM, json.dumps(asked), str(LIMIT_S)]
    try:
        text = cluster.user(command, "test_user1", timeout_s=150).ok()
        return dict(json.loads(text.splitlines()[-1]))
    finally:
        cluster.user("rm -rf ~/.outputs", "test_user1").ok()
