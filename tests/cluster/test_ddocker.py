"""ddocker as a user and an administrator meet it: the session that people know, over all machines."""

import json
import re
from collections.abc import Iterator

import pytest

from live import LiveCluster, Result, docker, invoke, job_name, wait_until
from terminal import Terminal

USER, OTHER = "test_user1", "test_user2"
IMAGE = "my_task_image"
SMALL = ("--type", "0", "--image", IMAGE)


class Ddocker:
    """The command, as one user; what it made goes after the test."""

    def __init__(self, cluster: LiveCluster, user: str = USER) -> None:
        self.cluster = cluster
        self.user = user
        self.made: list[str] = []
        self.images: list[str] = []

    def __call__(self, *words: str, input: str | None = None, user: str = "", timeout_s: float = 60) -> Result:
        return self.cluster.user(["ddocker", *words], user or self.user, input=input, timeout_s=timeout_s)

    def create(self, *options: str, ports: int = 0) -> str:
        """Create a container, and return its name."""
        name = job_name()
        self.made.append(name)
        self("create", *SMALL, "--ports", str(ports), "--name", name, *options).ok()
        return name

    def rows(self) -> dict[str, list[str]]:
        """Return the cells of `ps -a` by name; there is none that is empty but PORT."""
        lines = self("ps", "-a").ok().splitlines()
        return {line.split()[0]: re.split(r"\s{3,}", line) for line in lines[1:]}

    def clear(self) -> None:
        for name in self.made:
            self("stop", name)
            self("rm", name)
        for image in self.images:
            self("rmi", image)


@pytest.fixture
def ddocker(cluster: LiveCluster) -> Iterator[Ddocker]:
    command = Ddocker(cluster)
    yield command
    command.clear()


def _engine(cluster: LiveCluster, machine: str, name: str) -> dict[str, object]:
    """Return what the engine of a machine knows of a user's container."""
    uid, _ = cluster.ids(USER)
    done = cluster.on_worker(machine, ["docker", "inspect", f"u{uid}.{name}"])
    return dict(json.loads(done.ok())[0])


def _machines_with(cluster: LiveCluster, image: str) -> list[str]:
    """Return the machines whose engines have a user's image."""
    form = ["docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"]
    return [machine for machine in cluster.workers if f"/{image}\n" in cluster.on_worker(machine, form).ok()]


def test_session_that_people_know(cluster: LiveCluster, ddocker: Ddocker) -> None:
    name = job_name()
    ddocker.made.append(name)
    done = ddocker("create", input=f"\n\n\n{name}\n")
    assert done.exit_status == 0, done.output
    text = done.stdout
    assert text.startswith("Service types.\n0 : ")
    for asked in (
        "Select one of types (default: 0): ",
        "Input the number of ports (default: 1): ",
        f"Docker Images.\n0 : {IMAGE}\n",
        f"Input Container name (default: {USER}_",
    ):
        assert asked in text
    assert text.endswith(f"Start to create\n{name}\nSuccessfully created!\n")

    heading = ddocker("ps").ok().splitlines()[0].split()
    assert heading == ["NAME", "PORT", "IMAGE", "CREATED", "HOST", "TYPE", "RUNNING"]
    _, port, image, created, machine, shape, running = ddocker.rows()[name]
    assert re.fullmatch(r"0\.0\.0\.0:(\d+)->\1/tcp", port)
    assert re.fullmatch(r"\d\d-\d\d-\d\dT\d\d:\d\d:\d\d", created)
    assert (image, running) == (IMAGE, "True")
    assert re.fullmatch(r"\d+ cpus,[\d.]+g mem", shape)
    number = port.rpartition(":")[2].partition("-")[0]
    known = _engine(cluster, machine, name)
    assert number in json.dumps(known["NetworkSettings"])
    # It runs in a job of its owner's, and nowhere else.
    [job] = (
        cluster.user(["squeue", "--me", "--noheader", "--name", name, "--format", "%i %u %N"], USER).ok().splitlines()
    )
    assert job.split()[1:] == [USER, machine]

    assert ddocker("stop", name).ok() == f"{name}\n"
    assert ddocker.rows()[name][-1] == "False"
    assert cluster.wait_for_state(job.split()[0], "COMPLETED")["user"] == USER
    assert ddocker("start", name).ok() == f"{name}\n"
    assert ddocker.rows()[name][1:5:3] == [port, machine]
    refused = ddocker("rm", name)
    assert (refused.exit_status, refused.stdout) == (1, "")
    assert f"container {name} is running" in refused.stderr
    ddocker("stop", name).ok()
    assert ddocker("rm", name).ok() == f"{name}\n"
    assert name not in ddocker.rows()


def test_exec_passes_streams_and_status_on(cluster: LiveCluster, ddocker: Ddocker) -> None:
    name = ddocker.create()
    assert ddocker("exec", name, "cat", input="through\n").ok() == "through\n"
    done = ddocker("exec", name, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.exit_status, done.stdout, done.stderr) == (7, "out\n", "err\n")
    uid, gid = cluster.ids(USER)
    assert ddocker("exec", name, "sh", "-c", "id -u; id -g; echo $HOME").ok().split() == [
        str(uid),
        str(gid),
        f"/home/{USER}",
    ]


def test_exec_gives_a_terminal_of_the_same_size(cluster: LiveCluster, ddocker: Ddocker) -> None:
    name = ddocker.create()
    argv = cluster.exec_as_user(USER, ["ddocker", "exec", name, "stty", "size"], {})
    argv[argv.index("-i")] = "-it"
    terminal = Terminal(argv, columns=123)
    wait_until(lambda: not terminal.read(), timeout_s=30, what="stty ends")
    assert "25 123" in terminal.said


def test_administrator_sees_all_and_others_see_only_their_own(ddocker: Ddocker, cluster: LiveCluster) -> None:
    name = ddocker.create()
    uid, _ = cluster.ids(USER)
    assert name not in ddocker("ps", "-a", user=OTHER).ok()
    for command in (("inspect", name), ("exec", name, "id"), ("stop", name), ("rm", name), ("commit", name, "stolen")):
        refused = ddocker(*command, user=OTHER)
        assert refused.exit_status == 1
        assert f"no such container: {name}" in refused.stderr
    root = f"u{uid}.{name}"
    assert root in ddocker("ps", user="root").ok()
    assert ddocker("exec", root, "id", "-u", user="root").ok().strip() == str(uid)
    ddocker("stop", root, user="root").ok()
    assert ddocker.rows()[name][-1] == "False"
    ddocker("start", root, user="root").ok()
    assert ddocker.rows()[name][-1] == "True"


def test_no_room_is_said_at_once_and_leaves_nothing(ddocker: Ddocker, cluster: LiveCluster) -> None:
    types = ddocker("create", input="").stdout.splitlines()
    largest = str(max(int(line.split()[0]) for line in types if re.match(r"\d+ : ", line)))
    names = []
    for _ in range(50):
        name = job_name()
        ddocker.made.append(name)
        done = ddocker("create", "--type", largest, "--ports", "1", "--image", IMAGE, "--name", name)
        if done.exit_status:
            break
        names.append(name)
    assert done.exit_status == 1
    assert "there is no room" in done.stderr
    assert all(re.search(rf"^  {machine} ", done.stderr, re.MULTILINE) for machine in cluster.workers)
    assert done.seconds < 15
    assert names, "there was room"
    assert set(names) <= set(ddocker.rows())
    assert name not in ddocker.rows()
    assert name not in cluster.user(["squeue", "--me", "--noheader", "--format", "%j"], USER).ok()


@pytest.mark.slow
def test_committed_image_can_be_created_from_on_every_machine(ddocker: Ddocker, cluster: LiveCluster) -> None:
    image = f"lab/{job_name()}:v1"
    ddocker.images.append(image)
    name = ddocker.create()
    ddocker("exec", name, "sh", "-c", "echo mine >/tmp/mine").ok()
    assert ddocker("commit", name, image, timeout_s=600).ok() == f"{image}\n"
    [line] = [line for line in ddocker("images").ok().splitlines() if line.startswith(image)]
    assert line.split()[-2:] == [USER, ",".join(cluster.workers)]
    assert _machines_with(cluster, image) == cluster.workers
    assert image not in ddocker("images", user=OTHER).ok()
    assert "distinct" in ddocker("commit", name, image, timeout_s=600).stderr
    made = ddocker.create("--image", image)
    assert ddocker("exec", made, "cat", "/tmp/mine").ok() == "mine\n"
    assert f"container {made} is made of {image}" in ddocker("rmi", image).stderr
    ddocker("stop", made).ok()
    ddocker("rm", made).ok()
    assert ddocker("rmi", image).ok() == f"{image}\n"
    assert image not in ddocker("images").ok()
    assert _machines_with(cluster, image) == []

    def stored_kib() -> int:
        registry = cluster.container("user-registry")
        return int(docker("exec", registry, "du", "--summarize", "/var/lib/registry").ok().split()[0])

    before = stored_kib()
    said = invoke("free-images", timeout_s=120).ok()
    assert int(re.findall(r"(\d+) blobs and \d+ manifests eligible for deletion", said)[0]) >= 2, (
        "a layer and what describes it"
    )
    assert stored_kib() < before


def test_machine_without_a_gpu_says_so(ddocker: Ddocker, cluster: LiveCluster) -> None:
    done = ddocker("nvidia-smi", cluster.workers[0])
    assert (done.exit_status, done.stderr) == (1, f"error: {cluster.workers[0]} has no GPU\n")
    assert "there is no machine 'c99'" in ddocker("nvidia-smi", "c99").stderr


def test_setup_names_a_container_in_the_way(ddocker: Ddocker, cluster: LiveCluster) -> None:
    machine, name = cluster.workers[0], job_name()
    task = cluster.on_worker(machine, ["docker", "image", "ls", "--quiet", "--filter", "reference=cfiddle-task"]).ok()
    cluster.on_worker(
        machine, ["docker", "create", "--label", "cfiddle.cluster=", "--name", name, task.split()[0], "true"]
    ).ok()
    try:
        done = ddocker("setup", user="root")
        assert done.exit_status == 1
        assert f"{machine}: container {name} is not the cluster's" in done.stdout
    finally:
        cluster.on_worker(machine, ["docker", "rm", name]).ok()
    assert ddocker("setup").stderr.startswith("error: setup is the administrator's\n")
