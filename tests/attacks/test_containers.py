"""Attacks 3, 6, 9, 11, 12, 15, 16 and 18 on users' containers: from another user, from a job step, from inside."""

import json
import re
from collections.abc import Callable, Iterator, Sequence

import pytest

from live import PATIENCE, LiveCluster, Result, UsersContainer, docker, wait_until

VICTIM, THIEF = "test_user1", "test_user2"
NAME = "my_task_container_0"
DISK_MB = 4096
"""So much may one user's containers on a machine have written (policy.yaml)."""

# Requests to the agents' port by hand.
RAW = """
import json, os, socket, sys, time
from agent import letters

def come(node=None):
    for *_, address in socket.getaddrinfo("agent", letters.PORT, socket.AF_INET, socket.SOCK_STREAM):
        connection = socket.create_connection(address, timeout=10)
        greeting = letters.parse(letters.receive(connection))
        if node in (None, greeting["node"]):
            return connection, greeting
        connection.close()

def sealed(greeting, **request):
    known = {"v": letters.VERSION, "node": greeting["node"], "nonce": greeting["nonce"], "reply": "r"}
    return letters.seal({**known, **request})

def answer(connection):
    try:
        return letters.unseal(letters.receive(connection))[0]
    except (EOFError, ConnectionError):
        return {"type": "turned away"}

def ask(node=None, **request):
    connection, greeting = come(node)
    letters.send(connection, sealed(greeting, **request))
    return answer(connection)

def word(told):
    return told.get("code") or told["type"]
"""

# Requests to the agent of the machine by hand, from a job step; prints what each comes to.
HOLD = """
import json, os, socket, sys
for fields in json.loads(sys.argv[1]):
    agent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent.settimeout(20)
    agent.connect("/run/cfiddle-agent/agent.sock")
    request = {"v": 2, "type": "container", "job": int(os.environ.get("SLURM_JOB_ID", 0)), "user": sys.argv[2],
               "name": "smuggled", "image": "my_task_image", "ports": 0, "again": False, **fields}
    agent.send(json.dumps(request).encode())
    told = json.loads(agent.recv(65536) or b"{}")
    print(told.get("code") or told.get("type"))
    agent.close()
"""


@pytest.fixture(autouse=True)
def _nobody_has_containers(cluster: LiveCluster) -> Iterator[None]:
    cluster.remove_containers(VICTIM, THIEF)
    yield
    cluster.remove_containers(VICTIM, THIEF)


@pytest.fixture
def victim(cluster: LiveCluster) -> UsersContainer:
    """Return a container of the victim's that runs and holds a secret."""
    cluster.user(["cm", "run", "--cmd", "umask 0; echo do-not-tell >/tmp/secret"], VICTIM).ok()
    [found] = cluster.containers(VICTIM)
    return found


@pytest.fixture
def thief(cluster: LiveCluster, victim: UsersContainer) -> Callable[..., Result]:
    """Return what runs a shell command in a container of the thief's, on the victim's machine."""
    create = f"print(word(ask({victim.worker!r}, type='create', user={THIEF!r}, name={NAME!r}, image='my_task_image')))"
    assert cluster.python(RAW + create, THIEF).ok() == "created\n"

    def run(command: str, *, timeout_s: float = 60) -> Result:
        return cluster.user(["cm", "run", "--name", NAME, "--cmd", command], THIEF, timeout_s=timeout_s)

    run("true").ok()
    [mine] = cluster.containers(THIEF)
    assert (mine.worker, mine.state) == (victim.worker, "running")
    return run


def _said(result: Result) -> str:
    return result.ok().partition("\n")[2]


def _hold(cluster: LiveCluster, user: str, *requests: dict[str, object]) -> list[str]:
    argv = ["srun", "-p", "shared", "-n1", "--mem=64", "python3", "-I", "-c", HOLD, json.dumps(requests), user]
    return cluster.user(argv, user).ok().split()


def _engine_says(cluster: LiveCluster, container: UsersContainer, form: str, *options: str) -> str:
    argv = ["docker", "inspect", *options, "-f", form, container.id]
    return cluster.on_worker(container.worker, argv).ok().strip()


# --- 11: what is another's -------------------------------------------------------------------------------------------


def test_container_of_another_user_is_not_there_for_the_commands(cluster: LiveCluster, victim: UsersContainer) -> None:
    began = _engine_says(cluster, victim, "{{.State.StartedAt}}")
    got = []
    for name in (NAME, f"u{victim.uid}.{NAME}", victim.id[:12]):
        for words in (("stop",), ("delete",), ("run", "--cmd", "cat /tmp/secret")):
            result = cluster.user(["cm", *words, "--name", name], THIEF)
            if result.exit_status == 0 or not result.stderr.startswith("no container name"):
                got.append((name, words, result.output))
    assert got == []
    listed = [cluster.user(["cm", "list", *words], THIEF).ok() for words in ((), ("--table",), ("--json",))]
    assert (listed[0], listed[2]) == ("There are 0 containers:\n", "[]\n")
    assert NAME not in listed[1]
    for words in (("stop",), ("delete",)):
        cluster.user(["cm", *words], THIEF).ok()
    assert cluster.containers(VICTIM) == [victim]
    assert _engine_says(cluster, victim, "{{.State.StartedAt}}") == began


def test_container_of_another_user_is_not_there_for_raw_requests(cluster: LiveCluster, victim: UsersContainer) -> None:
    program = f"""
uid = {victim.uid}
got = []
for name in ({NAME!r}, f"u{{uid}}.{NAME}", {victim.id!r}):
    for kind in ("inspect", "stop", "delete", "exec"):
        more = {{"argv": ["cat", "/tmp/secret"], "terminal": False}} if kind == "exec" else {{}}
        told = ask({victim.worker!r}, type=kind, name=name, uid=uid, user={VICTIM!r}, **more)
        if told.get("code") != "name":
            got.append([kind, name, told])
told = ask({victim.worker!r}, type="list", uid=uid, user={VICTIM!r})
got += told["containers"]
told = ask({victim.worker!r}, type="create", uid=uid, user={VICTIM!r}, name="planted", image="my_task_image")
if told.get("code") != "user":
    got.append(told)
print(json.dumps(got))
"""
    assert json.loads(cluster.python(RAW + program, THIEF).ok()) == []
    assert cluster.containers(VICTIM) == [victim]
    assert cluster.containers(THIEF) == []


def test_job_of_a_container_of_another_user_cannot_be_ended(cluster: LiveCluster, victim: UsersContainer) -> None:
    job = cluster.slurm(f"squeue -h -u {VICTIM} -o %i").strip()
    outcome = f"print(word(ask({victim.worker!r}, type='outcome', job={job}, wait_s=0.0)))"
    assert cluster.python(RAW + outcome, THIEF).ok() == "job\n"
    cluster.user(f"scancel {job}; scancel --user {VICTIM}; true", THIEF)
    assert f"{job} RUNNING" in cluster.queue()
    assert cluster.containers(VICTIM) == [victim]


def test_request_is_good_for_one_connection_to_one_node(cluster: LiveCluster) -> None:
    here, there = cluster.workers[:2]
    program = f"""
connection, greeting = come({here!r})
request = sealed(greeting, type="list")
letters.send(connection, request)
seen = {{"first": word(answer(connection))}}
letters.send(connection, request)
seen["again"] = word(answer(connection))
for node in ({here!r}, {there!r}):
    other, _ = come(node)
    letters.send(other, request)
    seen[f"on another connection to {{node}}"] = word(answer(other))
connection, greeting = come({here!r})
letters.send(connection, sealed(greeting, type="list", node={there!r}))
seen["made for another node"] = word(answer(connection))
connection, greeting = come({here!r})
letters.send(connection, sealed(greeting, type="list", nonce="0" * 32))
seen["of a foreseen nonce"] = word(answer(connection))
print(json.dumps({{what: came for what, came in seen.items() if came != "turned away"}}))
"""
    assert json.loads(cluster.python(RAW + program, THIEF).ok()) == {"first": "containers"}


# --- 3: what is smuggled ---------------------------------------------------------------------------------------------

NAMES = [
    "",
    "-rf",
    "--privileged",
    "a\n",
    "a\0b",
    "../a",
    "a/../b",
    "a b",
    "a;id",
    "a" * 64,
    "a" * 300,
    "größe",
    "²",
    ".",
]


def test_names_and_fields_that_are_none_are_refused_at_the_port(cluster: LiveCluster) -> None:
    program = f"""
user = {THIEF!r}
wrong = [{{"type": "create", "user": user, "name": name, "image": "my_task_image"}} for name in json.loads(sys.argv[1])]
wrong += [{{"type": "create", "user": user, "name": "a", "image": image}}
          for image in ("debian", "-v/:/host", "my_task_image\\n", "", "../../etc", "cfiddle-agent")]
wrong += [{{"type": "create", "user": other, "name": "a", "image": "my_task_image"}}
          for other in ("root", "..", "../{VICTIM}", user + "/", user + "/data", "{VICTIM}", ".", "/")]
wrong += [{{"type": "hold", "name": "a"}}, {{"type": "list", "v": 2}}, {{"type": None}}, {{}}, {{"type": "stop"}},
          {{"type": "exec", "name": "a", "argv": "id", "terminal": False}}]
told = [(request, ask(**request)) for request in wrong]
print(json.dumps([[request, came] for request, came in told if came["type"] != "refused"]))
"""
    argv = ["python3", "-c", RAW + program, json.dumps(NAMES)]
    assert json.loads(cluster.user(argv, THIEF).ok()) == []
    assert cluster.containers(THIEF) == []


def test_names_and_fields_that_are_none_are_refused_to_a_job_step(cluster: LiveCluster) -> None:
    codes = {
        "name": [{"name": name} for name in NAMES],
        "field": [
            *({"job": job} for job in (0, -1, "1; id", 2**32, True, None)),
            *({field: value} for field in ("mounts", "uid", "Privileged", "HostConfig") for value in (1,)),
            *({"ports": ports} for ports in (-1, 10**6, "22", None)),
            *({"name": 1}, {"user": None}, {"image": ["my_task_image"]}, {"again": "yes"}),
        ],
        "image": [{"image": image} for image in ("debian", "-v/:/host", "my_task_image\n", "cfiddle-agent", "..")],
        "user": [{"user": user} for user in ("root", "..", VICTIM, f"{THIEF}/", f"../{VICTIM}", "", ".")],
        "version": [{"v": 1}, {"v": 3}, {"v": "2"}],
    }
    wanted = [code for code, requests in codes.items() for _ in requests]
    requests = [request for several in codes.values() for request in several]
    told = _hold(cluster, THIEF, *requests)
    assert [(request, came) for request, came, right in zip(requests, told, wanted, strict=True) if came != right] == []
    assert cluster.containers(THIEF) == []


def test_links_in_a_home_lead_nowhere(cluster: LiveCluster) -> None:
    secret = f"/home/{VICTIM}/.t-secret"
    cluster.user(f"umask 0; echo do-not-tell >{secret}", VICTIM).ok()
    cluster.user(f"mv data .kept; ln -s /home/{VICTIM} data && ln -s / .root; true", THIEF).ok()
    try:
        look = f"cat data/.t-secret {secret} /home/me/.root/home/{VICTIM}/.t-secret; readlink -f data"
        seen = cluster.user(["cm", "run", "--cmd", look], THIEF)
        [container] = cluster.containers(THIEF)
        mounts = json.loads(_engine_says(cluster, container, "{{json .Mounts}}"))
        assert sorted(mount["Destination"] for mount in mounts) == ["/home/me", f"/home/{THIEF}"]
        [volume] = {mount["Name"] for mount in mounts}
        options = cluster.on_worker(
            container.worker, ["docker", "volume", "inspect", "-f", "{{json .Options}}", volume]
        )
        assert json.loads(options.ok())["device"].endswith(f"/{THIEF}")
        assert "do-not-tell" not in seen.output
        assert f"/home/{VICTIM}" in seen.stdout, "the command ran"
    finally:
        cluster.user("rm data .root; mv .kept data; true", THIEF)
        cluster.remove_containers(THIEF)
        for worker in cluster.workers:  # a volume keeps what it was made with, were that wrong
            mine = f"docker volume ls -q --filter name=cfiddle-home-{THIEF}- | xargs -r docker volume rm"
            cluster.on_worker(worker, ["sh", "-c", mine]).ok()
        cluster.user(f"rm {secret}", VICTIM).ok()


# --- 6: no job, no container -----------------------------------------------------------------------------------------


def test_container_is_held_in_one_s_own_job_alone(cluster: LiveCluster, victim: UsersContainer) -> None:
    job = int(cluster.slurm(f"squeue -h -u {VICTIM} -o %i"))
    node = f"--nodelist={victim.worker}"
    argv = ["srun", "-p", "shared", "-n1", "--mem=64", node, "printenv", "SLURM_JOB_ID"]
    ended = int(cluster.user(argv, THIEF).ok())
    wait_until(
        lambda: not cluster.slurm(f"squeue -h -j {ended} 2>/dev/null || true"), timeout_s=20, what="it has ended"
    )
    requests = [{"job": number} for number in (job, ended, 1, 2**31)]
    argv = ["srun", "-p", "shared", "-n1", "--mem=64", node, "python3", "-I", "-c", HOLD, json.dumps(requests), THIEF]
    assert cluster.user(argv, THIEF).ok().split() == ["job"] * len(requests)
    assert cluster.containers(THIEF) == []
    again = [{"name": NAME, "user": VICTIM, "again": True, "image": ""}]
    argv = ["srun", "-p", "shared", "-n1", "--mem=64", node, "python3", "-I", "-c", HOLD, json.dumps(again), THIEF]
    assert cluster.user(argv, THIEF).ok().split() == ["name"]
    assert cluster.containers(VICTIM) == [victim]


# --- 9, 12, 15: from inside ------------------------------------------------------------------------------------------

VIEW = r"""
import json, os, socket, stat, subprocess
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
def fails(*argv):
    try:
        return subprocess.run(argv, capture_output=True, timeout=20).returncode != 0
    except OSError:
        return True
def sockets():
    for directory, names, files in os.walk("/"):
        names[:] = [name for name in names if directory != "/" or name not in ("proc", "sys")]
        for file in files:
            path = os.path.join(directory, file)
            try:
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    yield path
            except OSError:
                pass
def devices():
    for name in os.listdir("/dev"):
        mode = os.lstat(f"/dev/{name}").st_mode
        if stat.S_ISBLK(mode):
            yield name
print(json.dumps({
    "capabilities": [status[f"Cap{which}"] for which in ("Inh", "Prm", "Eff", "Bnd", "Amb")],
    "no new privileges": status["NoNewPrivs"],
    "seccomp": status["Seccomp"],
    "uids": status["Uid"].split(),
    "groups": status["Groups"].split(),
    "homes": sorted(os.listdir("/home")),
    "sockets": sorted(sockets()),
    "disks": sorted(devices()),
    "docker": sorted(name for name in os.environ if name.startswith(("DOCKER", "SLURM"))),
    "mounts": sorted(mounted for _, mounted, *_ in map(str.split, open("/proc/mounts"))
                     if not mounted.startswith(("/proc", "/sys", "/dev"))),
    "done": sorted(name for name, argv in {
        "mount": ("mount", "-t", "tmpfs", "none", "/tmp"),
        "bind": ("mount", "--bind", "/etc", "/tmp"),
        "user namespace": ("unshare", "-Ur", "true"),
        "mount namespace": ("unshare", "-m", "true"),
        "su": ("su", "-c", "id"),
        "chroot": ("chroot", "/", "true"),
        "hostname": ("hostname", "other"),
        "clock": ("date", "-s", "2000-01-01"),
        "keys": ("python3", "-c", "import ctypes,sys; sys.exit(ctypes.CDLL(None).syscall(250, 0, 0) < 0)"),
        "core pattern": ("sh", "-c", "echo x >/proc/sys/kernel/core_pattern"),
        "sysrq": ("sh", "-c", "echo b >/proc/sysrq-trigger"),
        "raw socket": ("python3", "-c", "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
        "packet socket": ("python3", "-c", "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
        "bpf": ("python3", "-c", "import ctypes,sys; sys.exit(ctypes.CDLL(None).syscall(321, 0, 0, 0) < 0)"),
    }.items() if not fails(*argv)),
}))
"""


def test_inside_is_its_owner_s_and_nothing_more(cluster: LiveCluster, thief: Callable[..., Result]) -> None:
    uid, gid = cluster.ids(THIEF)
    cluster.user("cat >.view.py", THIEF, input=VIEW).ok()
    try:
        seen = json.loads(_said(thief("python3 /home/me/.view.py")))
    finally:
        cluster.user("rm .view.py", THIEF).ok()
    right = {
        "capabilities": ["0000000000000000"] * 5,
        "no new privileges": "1",
        "seccomp": "2",
        "uids": [str(uid)] * 4,
        "groups": [str(gid)],
        "homes": ["me", THIEF],
        "sockets": [],
        "disks": [],
        "docker": [],
        "mounts": ["/", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/home/me", f"/home/{THIEF}"],
        "done": [],
    }
    assert {what: seen[what] for what, wanted in right.items() if seen[what] != wanted} == {}


def test_set_uid_programs_give_nothing(cluster: LiveCluster, thief: Callable[..., Result]) -> None:
    find = "find / -xdev -perm -4000 -type f 2>/dev/null; true"
    programs = _said(thief(find)).split()
    uid, _ = cluster.ids(THIEF)
    [container] = cluster.containers(THIEF)
    # One that tells: it is root's, set-uid, and would print 0.
    tell = "cp /usr/bin/id /tell && chown root /tell && chmod 4755 /tell"
    cluster.on_worker(
        container.worker, ["docker", "exec", "-u", "0", "--privileged", container.id, "sh", "-c", tell]
    ).ok()
    assert "/tell" in _said(thief(find)).split()
    assert _said(thief("/tell -u")) == f"{uid}\n", f"beside {programs}"


def _network(cluster: LiveCluster) -> dict[str, list[str]]:
    """Return what must not be reached: by a word for people, addresses and ports."""

    def addresses(container: str, worker: str | None = None) -> list[str]:
        argv = ["inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}", container]
        said = docker(*argv) if worker is None else cluster.on_worker(worker, ["docker", *argv])
        return said.ok().split()

    ports = {"mysql": 3306, "slurmdbd": 6819, "slurmctld": 6817, "userhost": 8888}
    found = {
        name: [f"{host}:{port}" for host in (*addresses(cluster.container(name)), name)] for name, port in ports.items()
    }
    for worker in cluster.workers:
        for service, port in {"agent": 6831, "slurmd": 6818}.items():
            found[f"{service} of {worker}"] = [
                f"{host}:{port}" for host in addresses(cluster.container(service, worker), worker)
            ]
        machine = cluster.on_worker(worker, ["hostname", "-I"]).ok().split()
        found[f"machine {worker}"] = [f"{host}:{port}" for host in machine for port in (22, 2375, 2376, 2377, 7946)]
    head = cluster.config.head_addr
    found["head"] = [f"{head}:{port}" for port in (22, 111, 2049, 2376, 2377, 5000, 7946, cluster.config.jupyter_port)]
    return found


KNOCK = r"""
import concurrent.futures, json, socket, sys
def knock(place):
    host, port = place.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=4).close()
        return place
    except OSError:
        return None
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    print(json.dumps([place for place in pool.map(knock, sys.argv[1:]) if place]))
"""


def _knocked(run: Callable[..., Result], places: Sequence[str]) -> list[str]:
    program = f"python3 - {' '.join(places)} <<'END'\n{KNOCK}\nEND"
    return list(json.loads(_said(run(program, timeout_s=120))))


def test_nothing_of_the_cluster_s_is_reached(cluster: LiveCluster, thief: Callable[..., Result]) -> None:
    places = [place for several in _network(cluster).values() for place in several]
    assert _knocked(thief, places) == []
    serve = "python3 -c 'import socket, time; s = socket.create_server((str(), 7000)); time.sleep(60)' & sleep 1"
    own = _knocked(lambda knock, **more: thief(f"{serve}\n{knock}\nkill %1", **more), ["127.0.0.1:7000"])
    assert own == ["127.0.0.1:7000"], "the knocker is good for something"


def test_nothing_of_another_user_s_container_is_reached(
    cluster: LiveCluster, victim: UsersContainer, thief: Callable[..., Result]
) -> None:
    serving = cluster.background(
        ["cm", "run", "--name", NAME, "--cmd", "cd /tmp; echo begun; exec python3 -m http.server 7001"], VICTIM
    )
    try:
        serving.wait_for_line("begun", timeout_s=20)
        [address] = re.findall(
            r"[\d.]+", _engine_says(cluster, victim, "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
        )
        mine = f"python3 - 127.0.0.1:7001 <<'END'\n{KNOCK}\nEND"
        serves = "the victim's server serves"
        wait_until(
            lambda: "7001" in _said(cluster.user(["cm", "run", "--name", NAME, "--cmd", mine], VICTIM)),
            timeout_s=20,
            what=serves,
        )
        assert _knocked(thief, [f"{address}:7001", f"{NAME}:7001", f"u{victim.uid}.{NAME}:7001"]) == []
    finally:
        serving.end()


def test_nothing_is_left_for_the_next(
    cluster: LiveCluster, victim: UsersContainer, thief: Callable[..., Result]
) -> None:
    leave = "umask 0; touch /tmp/left /dev/shm/left /var/tmp/left; ipcmk -M 64 -p 0666; ipcmk -S 1 -p 0666; true"
    cluster.user(["cm", "run", "--name", NAME, "--cmd", leave], VICTIM).ok()
    look = "ls /tmp /dev/shm /var/tmp; cat /proc/net/unix | wc -l; ipcs -m -s"
    seen = _said(thief(f"{look}; cat /tmp/secret; true"))
    assert "left" not in seen
    assert "do-not-tell" not in seen
    assert not re.search("^0x", seen, re.MULTILINE)


# --- 16: what is contained -------------------------------------------------------------------------------------------


@pytest.mark.timeout(200)
def test_fork_bomb_is_contained_and_others_start(cluster: LiveCluster, thief: Callable[..., Result]) -> None:
    bomb = f"""
import os, signal, time
children = []
try:
    while True:
        child = os.fork()
        if not child:
            time.sleep({60 * PATIENCE})
            os._exit(0)
        children.append(child)
except BlockingIOError:
    print("stopped at", len(children), flush=True)
time.sleep({8 * PATIENCE})
for child in children:
    os.kill(child, signal.SIGKILL)
"""
    bombing = cluster.background(["cm", "run", "--name", NAME, "--cmd", f"python3 -c '{bomb}'"], THIEF)
    line = bombing.wait_for_line("stopped at", timeout_s=60)
    assert int(line.split()[2]) < 512
    other = cluster.user(["cm", "run", "--name", NAME, "--cmd", "hostname"], VICTIM)
    assert other.ok() == f"command output:\n{NAME}\n"
    assert other.seconds < 10 * PATIENCE
    bombing.wait(timeout_s=60)


# --- 18: floods ------------------------------------------------------------------------------------------------------


def test_flood_of_connections_keeps_nobody_out(cluster: LiveCluster, victim: UsersContainer) -> None:
    program = f"""
held, number = [], 0
while True:
    try:
        connection, greeting = come({victim.worker!r})
        if number % 3 == 1:
            connection.sendall((1000).to_bytes(4) + b"half a letter")
        held = [*held[-600:], connection]
    except (OSError, EOFError):
        pass
    number += 1
    if number == 600:
        print("flooding", flush=True)
"""
    flood = cluster.background(["python3", "-c", RAW + program], THIEF)
    try:
        flood.wait_for_line("flooding", timeout_s=60)
        listed = cluster.user(["cm", "list"], VICTIM)
        assert listed.ok().startswith("There are 1 containers:\n"), "the victim's machine answers"
        ran = cluster.user(["cm", "run", "--name", NAME, "--cmd", "hostname"], VICTIM)
        assert ran.ok() == f"command output:\n{NAME}\n"
        assert listed.seconds + ran.seconds < 10
    finally:
        flood.end()


def test_letter_without_an_end_and_one_without_a_sense_are_not_waited_for(cluster: LiveCluster) -> None:
    program = """
seen = {}
contents = {"huge": b"\\xff\\xff\\xff\\xff", "garbage": b"\\0\\0\\0\\x05MUNGE", "plain": b"\\0\\0\\0\\x02{}"}
for what, content in contents.items():
    connection, _ = come()
    connection.sendall(content)
    seen[what] = word(answer(connection))
began = time.monotonic()
connection, _ = come()
connection.settimeout(30)
connection.sendall(b"\\0\\0\\x10\\0half")
seen["half"] = word(answer(connection))
print(json.dumps([what for what, came in seen.items() if came != "turned away"] + [time.monotonic() - began]))
"""
    *answered, seconds = json.loads(cluster.python(RAW + program, THIEF).ok())
    assert answered == []
    assert seconds < 15


def test_share_of_containers_is_one_user_s_own(cluster: LiveCluster, victim: UsersContainer) -> None:
    program = f"""
from concurrent.futures import ThreadPoolExecutor
def create(number):
    return word(ask({victim.worker!r}, type="create", user={THIEF!r}, name=f"n{{number}}", image="my_task_image"))
with ThreadPoolExecutor(12) as pool:
    print(sorted(pool.map(create, range(44))).count("created"))
"""
    assert 0 < int(cluster.python(RAW + program, THIEF, timeout_s=200).ok()) <= 32
    assert len(cluster.containers(THIEF)) <= 32
    assert cluster.user(["cm", "create", "1"], VICTIM).ok().startswith("created 1 containers\n")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_share_of_images_is_one_user_s_own(cluster: LiveCluster, thief: Callable[..., Result]) -> None:
    assert thief("true").ok()
    [mine] = cluster.containers(THIEF)
    program = f"""
from concurrent.futures import ThreadPoolExecutor
images = [f"n{{number}}" for number in range(20)]
def commit(image):
    connection, greeting = come({mine.worker!r})
    connection.settimeout(300)
    letters.send(connection, sealed(greeting, type="commit", name={NAME!r}, image=image))
    return word(answer(connection))
try:
    with ThreadPoolExecutor(20) as pool:
        print(list(pool.map(commit, images)).count("committed"))
finally:
    for image in images:
        ask({mine.worker!r}, type="forget", image=image)
"""
    assert 0 < int(cluster.python(RAW + program, THIEF, timeout_s=360).ok()) <= 16


def test_requests_that_say_much_besides_take_no_memory(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    program = f"""
held = []
for _ in range(40):
    connection, greeting = come({worker!r})
    letters.send(connection, sealed(greeting, type="outcome", job=1, wait_s=60.0, more=[{{}}] * 150000))
    held.append(connection)
print("sent", flush=True)
time.sleep(50)
"""
    flood = cluster.background(["python3", "-c", RAW + program], THIEF)
    try:
        flood.wait_for_line("sent", timeout_s=40)
        of_each = cluster.in_service("agent", "grep -h VmRSS /proc/[0-9]*/status", worker).ok()
        assert max(int(size) // 1024 for size in re.findall(r"[0-9]+", of_each)) < 300
    finally:
        flood.end()


def test_loop_of_requests_gives_way_to_a_measurement(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    measuring = cluster.sbatch("sleep 600", VICTIM, "-w", worker)
    cluster.wait_until_runs(measuring)
    program = f"""
began = time.monotonic()
told = {{word(ask({worker!r}, type="list")) for _ in range(24)}}
print(told == {{"containers"}}, time.monotonic() - began)
"""
    answered, seconds = cluster.python(RAW + program, THIEF).ok().split()
    assert answered == "True"
    assert float(seconds) > 9
    listed = cluster.user(["cm", "list"], VICTIM)
    cluster.slurm(f"scancel {measuring}")
    assert listed.ok() == "There are 0 containers:\n"
    assert listed.seconds < 5


@pytest.mark.parametrize("wanted", ["CPUs", "memory"])
def test_flood_of_jobs_leaves_room_for_another_s_container(cluster: LiveCluster, wanted: str) -> None:
    of_node_mb = int(cluster.slurm("sinfo -h -p shared -o %m").split()[0])
    memory_mb = {"CPUs": 16, "memory": of_node_mb // 4}[wanted]
    flood = cluster.sbatch(
        "sleep 600", THIEF, "-p", "shared", "--array=0-399", "--oversubscribe", "-c1", f"--mem={memory_mb}"
    )
    _wait_until_no_more_start(cluster, flood)
    _see_room_for_the_victim(cluster)


def test_plain_job_on_every_machine_leaves_room_for_another_s_container(cluster: LiveCluster) -> None:
    nodes = f"-N{len(cluster.workers)}"
    cluster.wait_until_runs(cluster.sbatch("sleep 600", THIEF, "-p", "shared", nodes, "-c1", "--mem=16"))
    _see_room_for_the_victim(cluster)


def _wait_until_no_more_start(cluster: LiveCluster, array: int) -> None:
    why = "QOSMax|Resources"
    reasons = f"squeue -h -r -t PENDING -j {array} -o %r"
    wait_until(lambda: re.search(why, cluster.slurm(reasons)), timeout_s=60, what="as many run as may")


def _see_room_for_the_victim(cluster: LiveCluster) -> None:
    ran = cluster.user(["timeout", "--signal=INT", "20", "cm", "run", "--cmd", "hostname"], VICTIM)
    assert ran.output == f"command output:\n{NAME}\n"


def test_cpus_and_ports_that_are_counted_are_not_all_one_user_s(cluster: LiveCluster) -> None:
    def create(user: str, name: str) -> Result:
        words = ("--type", "0", "--ports", "20", "--image", "my_task_image", "--name", name)
        return cluster.user(["ddocker", "create", *words], user)

    cpus = int(cluster.slurm("sinfo -h -p shared -o %C").split("/")[-1])
    said = ""
    for number in range(cpus):
        said = create(THIEF, f"n{number}").stderr
        if said:
            break
    mine = create(VICTIM, "mine")
    assert mine.stdout == "Start to create\nmine\nSuccessfully created!\n", f"{mine.stderr}, and the thief {said!r}"


def test_disk_of_a_machine_is_not_one_user_s_to_fill(
    cluster: LiveCluster, victim: UsersContainer, thief: Callable[..., Result]
) -> None:
    result = thief("dd if=/dev/zero of=/tmp/full bs=1M count=9000 conv=fsync", timeout_s=200)
    [mine] = cluster.containers(THIEF)
    written_mb = int(_engine_says(cluster, mine, "{{.SizeRw}}", "--size")) / 2**20
    assert written_mb < 2 * DISK_MB, result
    # The command that wrote is told of its end before the engine has let go of what it wrote.
    wait_until(
        lambda: [found.state for found in cluster.containers(THIEF)] == ["exited"],
        timeout_s=20,
        what=f"the container is stopped, whose command ended with {result}",
    )
    refused = cluster.user(["cm", "run", "--name", NAME, "--cmd", "true"], THIEF)
    assert "your containers here have written" in refused.stderr, refused
    assert refused.exit_status != 0
    assert cluster.containers(VICTIM) == [victim]
