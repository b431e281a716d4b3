"""Attack 12: what one user's job leaves on a machine is not there for the next user's."""

from live import LiveCluster, wait_until

LEAVE = r"""
import ctypes, mmap, os, socket, subprocess, sys, time
os.umask(0)
for folder in ("/tmp", "/dev/shm", "/var/tmp"):
    try:
        os.makedirs(f"{folder}/left-behind/deep", exist_ok=True)
        open(f"{folder}/left-behind/deep/file", "w").write("left")
        os.symlink("/etc", f"{folder}/left-behind/link")
        os.mkfifo(f"{folder}/left-behind/pipe")
        open(f"{folder}/-rf *\n", "w").close()
    except OSError as error:
        print(folder, error)
libc = ctypes.CDLL(None, use_errno=True)
for call in ("shmget", "semget", "msgget"):
    arguments = {"shmget": (0x5EF7, 4096, 0o1666), "semget": (0x5EF7, 1, 0o1666), "msgget": (0x5EF7, 0o1666)}[call]
    if getattr(libc, call)(*arguments) < 0:
        print(call, os.strerror(ctypes.get_errno()))
rt = ctypes.CDLL("librt.so.1", use_errno=True)
if rt.mq_open(b"/left-behind", os.O_CREAT | os.O_RDWR, 0o666, None) < 0:
    print("mq_open", os.strerror(ctypes.get_errno()))
if os.fork() == 0:  # a daemon out of its session, that ignores what asks it to end
    os.setsid()
    if os.fork() == 0:
        import signal
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCONT):
            signal.signal(number, signal.SIG_IGN)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("\0left-behind")
        listener.listen()
        for stream in (0, 1, 2):
            os.dup2(os.open("/dev/null", os.O_RDWR), stream)
        open("/tmp/left-behind/ready", "w").close()
        time.sleep(1000)
    os._exit(0)
os.wait()
while not os.path.exists("/tmp/left-behind/ready"):
    time.sleep(0.05)
print("left")
"""

LOOK = r"""
import os
found = []
for folder in ("/tmp", "/dev/shm", "/var/tmp", "/dev/mqueue"):
    if os.path.isdir(folder):
        found += [f"{folder}/{name}" for name in os.listdir(folder) if "left" in name or name.startswith("-rf")]
for kind in ("shm", "sem", "msg"):
    with open(f"/proc/sysvipc/{kind}") as table:
        found += [f"{kind} {line.split()[0]}" for line in table.readlines()[1:] if int(line.split()[0]) == 0x5EF7]
with open("/proc/net/unix") as sockets:
    found += [line.split()[-1] for line in sockets if "left-behind" in line]
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if os.stat(f"/proc/{pid}").st_uid == UID:
            found.append("process " + open(f"/proc/{pid}/cmdline").read().replace("\0", " "))
    except OSError:
        pass
print("found", found)
"""


def test_next_user_finds_nothing(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    uid = cluster.ids("test_user1")[0]
    look = LOOK.replace("UID", str(uid))
    text = cluster.user(["srun", "-w", worker, "python3", "-c", LEAVE], "test_user1", timeout_s=90).ok()
    assert text.splitlines()[-1] == "left", text
    wait_until(lambda: cluster.nodes()[worker] == "idle", timeout_s=60, what="its node is free")
    text = cluster.user(["srun", "-w", worker, "python3", "-c", look], "test_user2").ok()
    assert text.strip() == "found []"


def test_the_looker_sees_what_is_there(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    look = LOOK.replace("UID", str(cluster.ids("test_user1")[0]))
    both = 'python3 -c "$LEAVE"; python3 -c "$LOOK"'
    text = cluster.user(
        ["srun", "-w", worker, "bash", "-c", both], "test_user1", env={"LEAVE": LEAVE, "LOOK": look}
    ).ok()
    for word in ("/tmp/left-behind", "/dev/shm/left-behind", "shm ", "sem ", "msg ", "@left-behind", "process "):
        assert word in text, (word, text)


def test_what_is_left_by_one_job_does_not_end_another_of_the_same_user(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    shared = ("-p", "shared", "-n1", "-c1", "--mem=16", "-w", worker)
    first = cluster.sbatch(
        "until [ -e released ]; do sleep 0.2; done; test -e /tmp/of-the-first-$SLURM_JOB_ID", "test_user1", *shared
    )
    cluster.wait_until_runs(first)
    try:
        if int(cluster.slurm(f"sinfo -h -n {worker} -p shared -o %c")) > 1:
            second = cluster.sbatch(f"touch /tmp/of-the-first-{first}", "test_user1", *shared)
            cluster.wait_for_state(second, "COMPLETED")
            is_there = f"squeue -h -j {second} 2>/dev/null || true"
            wait_until(lambda: not cluster.slurm(is_there).strip(), timeout_s=30, what="the second's epilog has run")
            cluster.user(["touch", "released"], "test_user1").ok()
            assert cluster.wait_for_state(first, "COMPLETED", "FAILED")["state"] == "COMPLETED"
    finally:
        cluster.slurm(f"scancel {first}")
        cluster.user(["rm", "-f", "released"], "test_user1").ok()
