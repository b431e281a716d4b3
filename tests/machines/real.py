"""A cluster of machines that are reached by SSH alone, as its administrator makes and uses it on the head."""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from cfiddle_cluster import config, images
from cfiddle_cluster.commands import docker_cli
from cfiddle_cluster.wait import PATIENCE
from live import ROOT, CommandFailed, Result, run, wait_until
from machines.virtual import Lab, VirtualMachine
from terminal import Terminal

CHECKOUT = "/root/cfiddle-cluster"
HOMES = "/srv/cfiddle-cluster/home"
KNOWN_HOSTS = "/var/lib/cfiddle-cluster/ssh/known_hosts"

CARRIED = "agent"
IMAGE_FILE = "image.tar"
ENGINE_SIZE = 20 << 30
PYTEST = ("cloudpickle", "iniconfig", "pluggy", "pytest", "pytest-timeout")

INSTALL_TIMEOUT_S = 120
UP_TIMEOUT_S = 300

CALL = """
from delegate_function import SandboxDelegate, SlurmDelegate
class Sum:
    def of(self, numbers):
        return sum(numbers)
print(SlurmDelegate(SandboxDelegate()).invoke(Sum(), "of", [5, 4, 33]))
"""

ACCOUNTS = "getent passwd | grep -Ev '^(_rpc|statd):'; ls -A /home"
"""Who has an account; those of installed packages stay."""

TRACES = r"""
ls -A /srv /var/lib/cfiddle-cluster /etc/docker/certs.d /etc/exports.d 2>&1
ip -o -4 addr | awk '$2 ~ /^eth/ { print $2, $4 }'; findmnt -rn -t nfs4,nfs; iptables -S 2>/dev/null | grep -i cfiddle
[ ! -x /usr/bin/docker ] || docker info --format '{{.Swarm.LocalNodeState}}' | grep -v inactive
[ ! -x /usr/bin/docker ] || docker volume ls -q
true
"""
"""What else a cluster leaves, or leaves again, as it was."""

_CHANGES = Path(__file__).resolve().parent / "checkout"
_ON_EACH_NODE = "docker ps -q --no-trunc --filter label=com.docker.swarm.service.name=slurm-stack_"


def copy_checkout(target: Path) -> None:
    """Have this checkout there, as it is and with the changes that these tests' administrator makes."""
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"]).ok().splitlines()
    for name in filter(lambda name: (ROOT / name).exists(), listed):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    shutil.copytree(_CHANGES, target, dirs_exist_ok=True)


def make_disks(directory: Path) -> tuple[Path, Path]:
    """Return two disks: one that is carried to the head, with a checkout, and one with its images for every engine.

    The images are built on this machine, and reach the others as an engine keeps them. An emulated machine takes too
    long to load all of them from a file: it hashes and unpacks each layer. `IMAGE_FILE` on the first disk has one.
    """
    content = directory / "stick"
    copy_checkout(content / "cfiddle-cluster")
    its_config = replace(config.load(content / "cfiddle-cluster"), worker_addrs=("real",))
    built = images.build(its_config)
    run([docker_cli(), "image", "save", "--output", content / IMAGE_FILE, built[CARRIED]], timeout_s=60).ok()
    stick = make_disk(directory / "stick.raw", content, "-O", "^has_journal")
    shutil.rmtree(content)
    store = directory / "engine"
    copy_images(store, [*built.values(), images.debian(its_config)])
    engine = make_disk(directory / "engine.raw", store, "-L", "engine", "-E", "lazy_itable_init=1", size=ENGINE_SIZE)
    shutil.rmtree(store)
    return stick, engine


def make_disk(disk: Path, content: Path, *options: str, size: int = 0) -> Path:
    """Make a disk with this content, and of this size in bytes, or as large as the content."""
    used = sum(path.lstat().st_size for path in content.rglob("*"))
    run(["truncate", "--size", str(size or int(1.1 * used) + (64 << 20)), disk]).ok()
    run(["mkfs.ext4", "-q", *options, "-d", content, disk], timeout_s=120).ok()
    return disk


def copy_images(store: Path, references: Sequence[str]) -> None:
    """Have images as an engine keeps them below /var/lib/docker, by copying them from this machine's.

    An engine with the driver overlay2 reads what an older one wrote: image/fs.go, layer/filestore.go of moby/moby.
    """
    driver, root = run([docker_cli(), "info", "--format", "{{.Driver}} {{.DockerRootDir}}"]).ok().split()
    assert driver == "overlay2", f"this machine's engine keeps its images by {driver}"
    here = Path(root)
    known, layers = Path("image/overlay2"), Path("overlay2")
    for part in (known / "imagedb/content/sha256", known / "layerdb/sha256", layers / "l"):
        (store / part).mkdir(mode=0o711, parents=True)
    repositories: dict[str, dict[str, str]] = {}
    for reference in references:
        image = run([docker_cli(), "image", "inspect", "--format", "{{.Id}}", reference]).ok().strip()
        repositories.setdefault(reference.partition(":")[0], {})[reference] = image
        description = known / "imagedb/content" / image.replace(":", "/")
        shutil.copy2(here / description, store / description)
        chain = ""
        for layer in json.loads((here / description).read_text())["rootfs"]["diff_ids"]:
            chain = f"sha256:{hashlib.sha256(f'{chain} {layer}'.encode()).hexdigest()}" if chain else layer
            record = known / "layerdb" / chain.replace(":", "/")
            if not (store / record).exists():
                shutil.copytree(here / record, store / record)
                content = layers / (here / record / "cache-id").read_text()
                run(["cp", "--archive", here / content, store / content], timeout_s=120).ok()
                (store / layers / "l" / (here / content / "link").read_text()).symlink_to(f"../{content.name}/diff")
    (store / known / "repositories.json").write_text(json.dumps({"Repositories": repositories}))


class RealCluster:
    """A head and its workers.

    Args:
        head: the machine with the checkout.
        workers: those that are workers from the start.
    """

    def __init__(self, head: VirtualMachine, workers: Sequence[VirtualMachine]) -> None:
        self.head = head
        self.workers = list(workers)

    # --- the administrator -------------------------------------------------------------------------------------------

    def settings(self, settings: Mapping[str, str]) -> None:
        """Set what config.sh shall say."""
        path = f"{CHECKOUT}/config.sh"
        text = self.head.run(["cat", path]).ok()
        for name, value in settings.items():
            text, count = re.subn(rf"^{name}=.*$", f'{name}="{value}"', text, flags=re.MULTILINE)
            assert count == 1, f"config.sh has {count} lines for {name}"
        self.head.write(path, text)

    def command(self, arguments: str) -> str:
        """Return the shell command on the head that runs a task."""
        return f"cd {CHECKOUT} && CFIDDLE_PATIENCE={PATIENCE} PYTHONUNBUFFERED=1 ./invoke {arguments}"

    def invoke(self, arguments: str, *, timeout_s: float = 120) -> Result:
        """Run a task on the head, without a terminal."""
        return self.head.run(self.command(arguments), timeout_s=timeout_s)

    def pytest(self, arguments: str, *, timeout_s: float) -> Result:
        """Run tests on the head; of what developers have it gets only what these need."""
        lock = (ROOT / "requirements/development.lock").read_text()
        needed = re.findall(rf"^(?:{'|'.join(map(re.escape, PYTEST))})==.*\n(?: .*\n)+", lock, re.MULTILINE)
        python = f"cd {CHECKOUT} && .venv/bin/python -m"
        pip = f"{python} pip install --quiet --no-compile --no-deps --require-hashes --requirement /dev/stdin"
        self.head.run(pip, timeout_s=INSTALL_TIMEOUT_S, input="".join(needed)).ok()
        return self.head.run(
            f"CFIDDLE_PATIENCE={PATIENCE}; export CFIDDLE_PATIENCE; {python} pytest {arguments}", timeout_s=timeout_s
        )

    # --- users, Slurm ------------------------------------------------------------------------------------------------

    def in_service(self, service: str, command: str, machine: VirtualMachine | None = None) -> Result:
        """Run a shell command as root in a service's container, on the head or on a worker."""
        where = f"$({_ON_EACH_NODE}{service} | head -n1)"
        return (machine or self.head).run(f"docker exec -i {where} bash -c {shlex.quote(command)}")

    def user(self, command: str, user: str = "jovyan") -> Result:
        """Run a shell command as a user on the users' node."""
        return self.in_service("userhost", f"exec as-user {user} bash -c {shlex.quote(command)}")

    def call_in_sandbox(self) -> str:
        """Return what a call prints that adds 5, 4 and 33 in a sandbox."""
        return self.user(f"python3 - <<'END'\n{CALL}\nEND").ok().strip()

    def slurm(self, command: str) -> str:
        """Run one of Slurm's commands as its administrator."""
        return self.in_service("slurmctld", command).ok()

    def nodes(self) -> dict[str, str]:
        """Return the nodes and their states."""
        return dict(line.split() for line in self.slurm("sinfo -h -N -p normal -o '%N %T'").splitlines())

    def sbatch(self, script: str, *options: str, user: str = "jovyan") -> int:
        """Submit a batch job; return its id."""
        command = shlex.join(["sbatch", "--parsable", "--output=job-%j.out", *options, f"--wrap={script}"])
        return int(self.user(command, user).ok().strip())

    def state(self, job: int) -> str:
        """Return the state of a job as the accounting has it, without who cancelled it; empty if it is not there."""
        text = self.slurm(f"sacct -X -n -P -j {job} -o State")
        return (text.split() or [""])[0]

    def wait_for_state(self, job: int, *states: str, timeout_s: float = 60) -> str:
        """Wait until a job has one of these states; return it."""

        def look() -> str:
            state = self.state(job)
            return state if state in states else ""

        return wait_until(look, timeout_s=timeout_s, interval_s=2, what=f"job {job} is {' or '.join(states)}")

    def wait_until_ready(self, *names: str, timeout_s: float = 60) -> None:
        """Wait until slurmctld answers, and these nodes, or the workers, are idle."""
        wanted = set(names or [worker.name for worker in self.workers])

        def idle() -> bool:
            try:
                return wanted <= {name for name, state in self.nodes().items() if state == "idle"}
            except CommandFailed:
                return False

        wait_until(idle, timeout_s=timeout_s, interval_s=2, what=f"{sorted(wanted)} are idle")


@dataclass
class Record:
    """What was seen while the cluster was made.

    Attributes:
        before: of each machine, what must be the same after all.
        asked: what was said in the terminal in which `up` ran for the first time.
    """

    before: dict[str, str]
    asked: str


def make(lab: Lab) -> tuple[RealCluster, Record]:
    """Make the cluster as README says, in a terminal, with images that were built on this machine."""
    stick, lab.engine = make_disks(lab.directory)
    head = lab.machine("head", cpus=2, stick=stick)
    worker = lab.machine("c1")
    for machine in (head, worker):
        machine.wait_until_up()
    cluster = RealCluster(head, [worker])
    before = {machine.name: traces(machine) for machine in (head, worker)}
    head.run(
        "mount /dev/vdc /mnt && cp -r /mnt/cfiddle-cluster /root && ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519"
    ).ok()
    let_in(head, worker)
    # The one waits for Debian's packages, the other for Python's.
    with ThreadPoolExecutor() as pool:
        engine = pool.submit(head.run, f"{CHECKOUT}/install_docker.sh", timeout_s=INSTALL_TIMEOUT_S)
        its_own_python = f"PIP_NO_COMPILE=1 {CHECKOUT}/invoke --list"
        environment = pool.submit(head.run, its_own_python, timeout_s=INSTALL_TIMEOUT_S)
    engine.result().ok()
    environment.result().ok()
    # An emulated machine is slower than its fellow for whatever else this one does.
    cluster.settings({"WORKER_ADDRS": worker.addr, "HEAD_ADDR": head.addr, "CALIBRATION_LIMIT": "1000"})
    return cluster, Record(before, up_in_terminal(cluster))


def let_in(head: VirtualMachine, worker: VirtualMachine) -> None:
    """Have a machine's SSH server let the head's root in."""
    key = head.run("cat .ssh/id_ed25519.pub").ok()
    worker.run("cat >>.ssh/authorized_keys", input=key).ok()


def up_in_terminal(cluster: RealCluster) -> str:
    """Run `up`, say yes where it asks about a machine's key, and return all that stood in the terminal."""
    terminal = Terminal(cluster.head.argv(cluster.command("up"), "-tt"), columns=200)
    for _ in cluster.workers:
        terminal.wait_for(r"\(yes/no/\[fingerprint\]\)\? $", timeout_s=UP_TIMEOUT_S)
        terminal.press(b"yes\n")
    terminal.wait_for(r"JupyterLab: \S+", timeout_s=UP_TIMEOUT_S)
    return terminal.end()


def traces(machine: VirtualMachine) -> str:
    """Return what a cluster must leave, or leave again, as it was on a machine: all but installed packages."""
    return machine.run(f"{ACCOUNTS}\n{TRACES}").ok()
