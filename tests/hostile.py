"""What an enemy tries in a sandbox, and what must come of it; for the agent alone and for the whole cluster."""

import json
from dataclasses import dataclass
from typing import Any

SECONDS = 3
MEMORY_MB = 256

_CALL = """
import contextlib, io, json, os, sys, time
from delegate_function import SandboxDelegate, SlurmDelegate

class Call:
    def run(self, text):
        names = {}
        exec(text, names)
        return names.get("result")
"""


def program(text: str, *, through_slurm: bool, seconds: float = 60) -> str:
    """Return a program that runs `text` in a sandbox and prints, as JSON, what it set `result` to.

    Args:
        through_slurm: in a job made for it; otherwise the program runs in a job step.
        seconds: the call's time limit.
    """
    return f"{_CALL}\nprint(json.dumps({_invoke(text, through_slurm, seconds)}))"


def _invoke(text: str, through_slurm: bool, seconds: float, memory_mb: int = MEMORY_MB) -> str:
    sandbox = f"SandboxDelegate(seconds={seconds}, memory_mb={memory_mb})"
    delegate = f"SlurmDelegate({sandbox})" if through_slurm else sandbox
    return f"{delegate}.invoke(Call(), 'run', {text!r})"


GOES_ON = """
import os, socket
for fd in range(3, 64):
    try:
        found = socket.socket(fileno=os.dup(fd))
        if found.type == socket.SOCK_SEQPACKET:
            found.send(b"e")
    except OSError:
        pass
while True:
    pass
"""
"""Says over every connection that it finds that the call has returned, and goes on."""


@dataclass(frozen=True)
class Abuse:
    """Something that runs into a limit.

    Attributes:
        text: what the call does.
        error: a class of the exception that its caller sees.
        message: a part of the exception's text.
        memory_mb: what the call asks for.
    """

    text: str
    error: str
    message: str
    memory_mb: int = MEMORY_MB

    @property
    def outcome(self) -> str:
        """What its program prints where all is well."""
        return json.dumps([self.error, True, True])

    def program(self, *, through_slurm: bool, within_s: float = 3.0 * SECONDS) -> str:
        """Return a program that does it in a sandbox and prints what came of it."""
        return f"""{_CALL}
began = time.monotonic()
kinds, said = ["nothing"], ""
with contextlib.redirect_stdout(io.StringIO()):
    try:
        {_invoke(self.text, through_slurm, SECONDS, self.memory_mb)}
    except BaseException as error:
        kinds, said = [kind.__name__ for kind in type(error).__mro__], str(error)
seconds = time.monotonic() - began
kind = {self.error!r} if {self.error!r} in kinds else kinds[0]
print(json.dumps([kind, {self.message!r} in said or said[-500:], seconds < {within_s} or seconds]))
"""


_TIME = f"time limit of {SECONDS} s"

_DEAF = """
import os, signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
time.sleep(600)
"""

_FORKS = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""

_CHILDREN = """
import os, signal, time
children = []
try:
    for _ in range(1000):
        children.append(os.fork())
        if children[-1] == 0:
            time.sleep(600)
finally:
    for child in children:
        os.kill(child, signal.SIGKILL)
"""

_THREADS = """
import threading, time
for _ in range(1000):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
"""

_FILL = """
for number in range(75):
    with open(f"{directory}/{{number}}", "wb") as file:
        file.write(bytes(8 << 20))
"""

_RESERVE = """
import os
for number in range(75):
    with open(f"/tmp/{number}", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 16 << 20)
"""

_INODES = """
for number in range(10**6):
    open(f"/tmp/{number}", "w").close()
"""

_SPARSE = """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
open("/tmp/sparse", "wb").truncate(1 << 40)
"""

_OPEN = """
import os
files = []
try:
    while len(files) < 5000:
        files.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    for file in files:
        os.close(file)
    raise
"""

_FLOOD = """
import os
while True:
    os.write(1, b"x" * 65536)
"""

ABUSES = {
    "memory": Abuse(f"bytearray({2 * MEMORY_MB} << 20)", "LimitExceeded", f"memory limit of {MEMORY_MB} MB"),
    "shared memory": Abuse(_FILL.format(directory="/dev/shm"), "Exception", ""),
    "files in memory": Abuse(_FILL.format(directory="/tmp"), "Exception", ""),
    "files": Abuse(_RESERVE, "OSError", "No space left", memory_mb=2048),
    "sleep": Abuse("import time; time.sleep(600)", "LimitExceeded", _TIME),
    "loop": Abuse("while True: pass", "LimitExceeded", _TIME),
    "deaf and detached": Abuse(_DEAF, "LimitExceeded", _TIME),
    "stopped": Abuse("import os, signal; os.kill(0, signal.SIGSTOP)", "LimitExceeded", _TIME),
    # Each child of a process that has cfiddle imported takes a MiB: the limit of processes is to be met first.
    "fork bomb": Abuse(_FORKS, "LimitExceeded", _TIME, memory_mb=2048),
    "processes": Abuse(_CHILDREN, "BlockingIOError", "Resource temporarily unavailable", memory_mb=2048),
    "thread bomb": Abuse(_THREADS, "RuntimeError", "can't start new thread"),
    "inodes": Abuse(_INODES, "OSError", "No space left"),
    "sparse terabyte": Abuse(_SPARSE, "OSError", "File too large"),
    "open files": Abuse(_OPEN, "OSError", "Too many open files"),
    "output": Abuse(_FLOOD, "LimitExceeded", "output limit of"),
    "core dump": Abuse("import os; os.abort()", "ProcessDied", "SIGABRT"),
    "write to the image": Abuse("open('/usr/bin/file', 'w')", "OSError", "Read-only file system"),
}

ATTEMPTS = (
    "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
    "libc.umount2(b'/tmp', 2)",
    "libc.unshare(0x10000000)",  # CLONE_NEWUSER
    "libc.unshare(0x00020000)",  # CLONE_NEWNS
    "libc.setns(os.open('/proc/self/ns/net', 0), 0)",
    "libc.chroot(b'/tmp')",
    "libc.ptrace(0, 0, 0, 0)",
    "libc.personality(0x0040000)",
    "libc.setuid(0)",
    "libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)",  # clone(CLONE_NEWUSER)
    "libc.syscall(435, ctypes.create_string_buffer(88), 88)",  # clone3
    "libc.syscall(155, b'/tmp', b'/tmp')",  # pivot_root
    "libc.syscall(175, 0, 0, b'')",  # init_module
    "libc.syscall(246, 0, 0, 0, 0)",  # kexec_load
    "libc.syscall(248, b'user', b'a', b'b', 1, -3)",  # add_key
    "libc.syscall(249, b'user', b'a', b'b', -3)",  # request_key
    "libc.syscall(250, 0, -3, 0)",  # keyctl
    "libc.syscall(298, ctypes.create_string_buffer(128), 1, -1, -1, 0)",  # perf_event_open, of another process
    "libc.syscall(303, -100, b'/', ctypes.create_string_buffer(b'\\x80', 160), ctypes.create_string_buffer(8), 0)",
    "libc.syscall(304, 0, 0, 0)",  # open_by_handle_at
    "libc.syscall(310, 1, 0, 0, 0, 0, 0)",  # process_vm_readv
    "libc.syscall(321, 0, ctypes.create_string_buffer(128), 128)",  # bpf
    "libc.syscall(323, 0)",  # userfaultfd
    "libc.syscall(425, 1, ctypes.create_string_buffer(128))",  # io_uring_setup
    "libc.syscall(438, os.pidfd_open(1), 0, 0)",  # pidfd_getfd
    "libc.syscall(442, 0, 0, 0, 0, 0)",  # mount_setattr
    "libc.syscall(29, 0, 4096, 0o1600)",  # shmget
    "libc.syscall(275, 0, 0, 1, 0, 1, 0)",  # splice
    "family(38)",  # AF_ALG
    "family(40)",  # AF_VSOCK
    "family(17)",  # AF_PACKET
    "family(16)",  # AF_NETLINK
    "socket.socket(2, 3, 1)",  # SOCK_RAW, of ICMP
    "socket.create_connection(('1.1.1.1', 53), 1)",
    "socket.create_connection(('172.17.0.1', 22), 1)",
    "os.open('/dev/kmsg', os.O_RDONLY)",
    "os.open('/dev/mem', os.O_RDONLY)",
    "os.open('/proc/sysrq-trigger', os.O_WRONLY)",
    "os.open('/proc/sys/kernel/core_pattern', os.O_WRONLY)",
    "os.open('/proc/sys/kernel/modprobe', os.O_WRONLY)",
    "os.open('/proc/kcore', os.O_RDONLY) if os.stat('/proc/kcore').st_size else denied()",
    "os.open('/proc/1/environ', os.O_RDONLY)",
    "os.open('/proc/1/mem', os.O_RDONLY)",
    "os.listdir('/proc/1/fd')",
    "os.open('/sys/fs/cgroup/memory/memory.limit_in_bytes', os.O_WRONLY)",
    "os.open('/sys/fs/cgroup/memory/release_agent', os.O_WRONLY)",
    "os.open('/sys/fs/cgroup/memory.max', os.O_WRONLY)",
    "os.open('/sys/kernel/uevent_helper', os.O_WRONLY)",
    "os.mknod('/tmp/disk', 0o60600, os.makedev(8, 0))",
    "os.kill(1, 9) or os.kill(1, 15) or os.kill(1, 0) or denied()",
    "os.kill(-1, 15) if os.getpid() == 1 else denied()",
    "os.open('/run/cfiddle/file', os.O_WRONLY | os.O_CREAT)",
    "os.unlink('/run/cfiddle/sandbox.sock')",
    "os.setpriority(os.PRIO_PROCESS, 0, -5)",
    "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))",
    "resource.setrlimit(resource.RLIMIT_CORE, (1, 1))",
    "socket.sethostname('other')",
)

_TRY = """
import ctypes, errno, os, resource, socket
libc = ctypes.CDLL(None, use_errno=True)
# What says otherwise that it failed was tried: it reached the kernel, and did not find what it needs there.
REFUSALS = (errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSYS)
NOWHERE = (errno.ENOENT, errno.ENETUNREACH)
def family(number):
    socket.socket(number, socket.SOCK_DGRAM)
def denied():
    raise PermissionError(errno.EPERM, "denied")
def came_of(attempt):
    try:
        value = eval(attempt)
    except OSError as error:
        return "" if error.errno in REFUSALS + NOWHERE else repr(error)
    except ValueError as error:  # so says setrlimit that it was refused
        return "" if "not allowed" in str(error) else repr(error)
    if value == -1:
        return "" if ctypes.get_errno() in REFUSALS else errno.errorcode[ctypes.get_errno()]
    return repr(value)
result = {}
for attempt in ATTEMPTS:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        libc.unshare(0x00020000)  # where that can be had, what follows mounts nothing over the call's own directory
        os.write(write, came_of(attempt).encode())
        os._exit(0)
    os.close(write)
    said = os.read(read, 1000).decode()
    os.close(read)
    if os.waitpid(child, 0)[1] or said:
        result[attempt] = said
"""
ESCAPE = f"ATTEMPTS = {ATTEMPTS!r}\n{_TRY}"
"""Its result: the attempts that were not denied, with what came of them."""

VIEW = """
import os
def lines(path):
    with open(path) as file:
        return file.read().splitlines()
status = dict(line.split(":", 1) for line in lines("/proc/self/status"))
mounts = [line.split() for line in lines("/proc/self/mountinfo")]
links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
result = {
    "capabilities": [status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_privileges": status["NoNewPrivs"].strip(),
    "seccomp": status["Seccomp"].strip(),
    "uid": os.getresuid(),
    "groups": os.getgroups(),
    "interfaces": sorted(os.listdir("/sys/class/net")),
    "sockets": [line.split()[-1] for line in lines("/proc/net/unix")[1:] if "/" in line],
    "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
    "homes": [path for path in ("/home", "/root") if os.access(path, os.R_OK) and os.listdir(path)],
    "mounts": sorted(fields[4] for fields in mounts if fields[4].startswith(("/run", "/tmp", "/home", "/var"))),
    "writable": sorted(fields[4] for fields in mounts if os.path.isdir(fields[4]) and os.access(fields[4], os.W_OK)),
    "root": [fields[5].split(",")[0] for fields in mounts if fields[4] == "/"],
    "docker": [path for path in ("/var/run/docker.sock", "/run/docker.sock") if os.path.exists(path)],
    "environment": sorted(os.environ),
    "descriptors": sorted({os.readlink(link).split(":")[0] for link in links if os.path.islink(link)}),
    "core": [line.split()[-3:-1] for line in lines("/proc/self/limits") if line.startswith("Max core")],
}
"""
"""Its result: what a call sees around it, for check_view."""


def check_view(seen: dict[str, Any]) -> None:
    """Assert that what a call sees around it is a sandbox."""
    own = {"HOME", "HOSTNAME", "LANG", "LC_CTYPE", "PATH", "PYTHONDONTWRITEBYTECODE"}
    by_cfiddle = {"LD_LIBRARY_PATH"}  # set when it is imported
    right = {
        "capabilities": set(seen["capabilities"]) == {"0" * 16},
        "no_new_privileges": seen["no_new_privileges"] == "1",
        "seccomp": seen["seccomp"] == "2",
        "uid": seen["uid"] == [65533] * 3,
        "groups": seen["groups"] in ([], [65533]),
        "interfaces": seen["interfaces"] == ["lo"],
        # The agent's end of the connection, by the name that it has where the agent is; here that leads nowhere.
        "sockets": [path for path in seen["sockets"] if not path.startswith("/run/cfiddle-sandboxes/")] == []
        and len(seen["sockets"]) <= 1,
        "processes": len(seen["processes"]) == 2,  # the one that supervises and the call's
        "homes": seen["homes"] == [],
        "mounts": seen["mounts"] == ["/run/cfiddle", "/tmp"],
        "writable": seen["writable"] in (["/dev/shm", "/tmp"], ["/dev/mqueue", "/dev/shm", "/tmp"]),
        "root": seen["root"] == ["ro"],
        "docker": seen["docker"] == [],
        "environment": set(seen["environment"]) <= own | by_cfiddle,
        "descriptors": set(seen["descriptors"]) == {"/dev/null", "pipe", "socket"},
        "core": seen["core"] == [["0", "0"]],
    }
    wrong = {name: seen[name] for name, is_right in right.items() if not is_right}
    assert not wrong, wrong
