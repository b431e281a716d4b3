"""Two workers and the users' node on a network of their own, without a swarm: MPI, and who gets in by SSH."""

import secrets
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cfiddle_cluster import config
from cfiddle_cluster.commands import CommandError, docker_cli, run
from cfiddle_cluster.state import State
from cfiddle_cluster.wait import wait_until
from containers import Container, Start

ROOT = Path(__file__).resolve().parents[2]
USERS = {"jovyan": (1000, 100), "ada": (2001, 2001), "ben": (2002, 2002)}
SEEMING_ADDRESS = "172.30.0.3/16"
"""Of each container in a network that leads nowhere, as that of docker_gwbridge on each machine."""

HELLO = """
from mpi4py import MPI
world = MPI.COMM_WORLD
print(world.rank, MPI.Get_processor_name(), world.allreduce(world.rank))
"""
SRUN = "srun --quiet --mpi=pmix --partition=shared --nodes=2 --ntasks=4"


@dataclass(frozen=True)
class Nodes:
    """The containers."""

    slurmctld: Container
    workers: tuple[Container, Container]
    userhost: Container

    def script(self, text: str, user: str = "ada", *, timeout_s: float = 60) -> str:
        """Run a script as a user on the users' node."""
        return self.userhost.run("as-user", user, "bash", "-c", text, user="0:0", timeout_s=timeout_s)

    def refusal(self, text: str, user: str = "ada") -> str:
        """Run a script that must fail, and return what it says."""
        with pytest.raises(CommandError) as caught:
            self.script(text, user)
        return caught.value.output

    def hold(self, user: str = "ada", nodes: str = "c[1-2]") -> str:
        """Have a job of the user's on the nodes; return its number."""
        count = 2 if "-" in nodes else 1
        batch = f"srun --ntasks-per-node=1 sleep {secrets.randbelow(1000) + 1000}"
        argv = f"sbatch --parsable -p shared -N{count} --ntasks-per-node=1 -w {nodes} -o /dev/null --wrap='{batch}'"
        job = self.script(argv, user).strip()
        there = self.workers[:count] if nodes != "c2" else self.workers[1:]
        for worker in there:
            wait_until(
                lambda worker=worker: job in worker.run("ls", "/run/cfiddle-grants").split(),
                timeout_s=20,
                what="a grant",
            )
        return job

    def end(self, job: str, user: str = "ada") -> None:
        """End a job, with its epilogs."""
        self.script(f"scancel {job}", user)
        wait_until(self.is_idle, timeout_s=30, what="idle nodes")

    def is_idle(self) -> bool:
        """Whether no job is on a node."""
        found = self.slurmctld.run("sinfo", "--noheader", "--Node", "--format=%T", "--partition=normal", user="slurm")
        return found.split() == ["idle", "idle"]


@pytest.fixture(scope="module")
def network() -> Iterator[str]:
    name = f"cfiddle-test-{uuid.uuid4().hex[:8]}"
    run([docker_cli(), "network", "create", "--label", config.LABEL, name], timeout_s=30)
    yield name
    subprocess.run([docker_cli(), "network", "rm", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def volumes() -> Iterator[list[str]]:
    names = [f"cfiddle-test-{uuid.uuid4().hex[:8]}" for _ in range(2)]
    for name in names:
        run([docker_cli(), "volume", "create", "--label", config.LABEL, name], timeout_s=30)
    yield names
    subprocess.run([docker_cli(), "volume", "rm", "--force", *names], capture_output=True, check=False)


@pytest.fixture(scope="module")
def nodes(
    network: str,
    volumes: list[str],
    start_for_all: Start,
    secret_file: Callable[[str, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Nodes:
    state = State(tmp_path_factory.mktemp("state") / "state")
    state.ensure("10.0.0.1")
    keys = {name: secret_file(name, state.secret(name)) for name in ("munge-key", "ssh-authority", "jupyter-token")}
    for name, owner in (("munge-key", 801), ("ssh-authority", 0)):
        keys[name].chmod(0o400)
        subprocess.run(["chown", str(owner), keys[name]], check=True)
    lines = (ROOT / "conf/slurm.conf").read_text().splitlines()
    left_out = ("HealthCheck", "Accounting", "JobSubmit")  # neither an agent nor a database runs here
    conf = secret_file("slurm.conf", "\n".join(line for line in lines if not line.startswith(left_out)) + "\n")
    home, accounts = volumes
    maker = start_for_all("base", "sleep", "infinity", options=["-v", f"{home}:/home", "-v", f"{accounts}:/accounts"])
    for name, (uid, gid) in USERS.items():
        maker.run("install", "-d", "-o", str(uid), "-g", str(gid), "-m", "0700", f"/home/{name}")
    text = "".join(f"{name}:x:{uid}:{gid}::/home/{name}:/bin/bash\n" for name, (uid, gid) in USERS.items())
    maker.run("tee", "/accounts/passwd", input=text)
    maker.run("touch", "/accounts/group")

    def options(name: str, *secret_names: str) -> list[str]:
        mounts = [f"--volume={keys[secret]}:/run/secrets/{secret}:ro" for secret in ("munge-key", *secret_names)]
        return ["--network", network, "--hostname", name, "--network-alias", name, *mounts]

    # slurmctld waits for a name that tells that the accounting answers.
    settings = [f"--volume={conf}:/etc/slurm/slurm.conf:ro", "--network-alias", "slurmdbd"]
    with_accounts = f"--volume={accounts}:/var/lib/extrausers"
    slurmctld = start_for_all("cluster", "slurmctld", options=[*options("slurmctld"), *settings, with_accounts])
    worker = [f"--volume={home}:/home", "--tmpfs", "/tmp:mode=1777", "--volume", "/run/cfiddle-grants"]
    worker += ["--env", "SLURMD_CPUS=16"]
    workers = [
        start_for_all("cluster", "slurmd", options=[*options(name, "ssh-authority"), *worker]) for name in ("c1", "c2")
    ]
    userhost = start_for_all(
        "user",
        options=[
            *options("userhost", "ssh-authority", "jupyter-token"),
            f"--volume={home}:/home",
            f"{with_accounts}:ro",
        ],
    )
    for container in (*workers, userhost):
        inside = ["nsenter", "--net", "--target", container.inspect("{{.State.Pid}}"), "ip"]
        for command in ("link add world type bridge", f"addr add {SEEMING_ADDRESS} dev world", "link set world up"):
            run([*inside, *command.split()], timeout_s=10)
    found = Nodes(slurmctld, (workers[0], workers[1]), userhost)

    def is_ready() -> bool:
        try:
            keys_are_there = [found.script("test -s ~/.ssh/authorized_keys", name) for name in USERS]
            return found.is_idle() and len(keys_are_there) == len(USERS)
        except CommandError:
            return False

    wait_until(is_ready, timeout_s=90, what="two idle nodes")
    found.script(f"cat >hello.py <<'END'\n{HELLO}\nEND")
    return found


def _ranks(output: str) -> list[str]:
    return sorted(output.split("\n"))[1:]


def test_processes_on_two_nodes_reach_each_other(nodes: Nodes) -> None:
    found = [line.split() for line in _ranks(nodes.script(f"{SRUN} python3 hello.py"))]
    assert {node for _, node, *_ in found} == {"c1", "c2"}
    assert [total for *_, total in found] == ["6"] * 4


def test_mpirun_in_an_allocation_has_the_python_and_the_nodes_of_the_job(nodes: Nodes) -> None:
    for start in ("salloc -Q -p shared -N2 -n4 {}", "sbatch -Q -W -p shared -N2 -n4 -o out --wrap='{}'; cat out"):
        found = _ranks(nodes.script(start.format("mpirun python3 hello.py") + " </dev/null"))
        assert {line.split()[1] for line in found} == {"c1", "c2"}, found
        assert len(found) == 4


def test_samples_compile_and_run(nodes: Nodes) -> None:
    said = nodes.script("cd ~/mpi && make run 2>&1", timeout_s=120)
    assert "the token came back as 6" in said
    assert "pi is 3.14159265359" in said
    assert said.count("of 4 on c") == 4


def test_names_on_a_worker_are_those_of_the_homes(nodes: Nodes) -> None:
    worker = nodes.workers[0]
    assert worker.run("getent", "passwd", "ada", "2002").splitlines() == [
        "ada:x:2001:2001:ada:/home/ada:/bin/bash",
        "ben:x:2002:2002:ben:/home/ben:/bin/bash",
    ]
    for nobody in ("..", "../home", "nobody-there", "3000"):
        with pytest.raises(CommandError):
            worker.run("getent", "passwd", nobody)


def test_ssh_goes_where_the_user_has_a_job_and_nowhere_else(nodes: Nodes) -> None:
    assert "Permission denied (publickey)" in nodes.refusal("ssh c1 true")
    job = nodes.hold(nodes="c1")
    try:
        said = nodes.script(
            "ssh c1 'id -un; hostname; command -v python3; ulimit -u; grep NoNewPrivs /proc/self/status'"
        )
        assert said.split() == ["ada", "c1", "/opt/venv/bin/python3", "4096", "NoNewPrivs:", "1"]
        assert "Permission denied (publickey)" in nodes.refusal("ssh c2 true"), "no job of hers is there"
        assert "Permission denied (publickey)" in nodes.refusal("ssh c1 true", "ben"), "another's job"
        assert "Permission denied (publickey)" in nodes.refusal("ssh ada@c1 true", "ben"), "another's name"
        assert "Permission denied (publickey)" in nodes.refusal("ssh root@c1 true")
        assert "Permission denied (publickey)" in nodes.refusal(
            "ssh -o PreferredAuthentications=password,keyboard-interactive c1 true"
        )
    finally:
        nodes.end(job)
    assert "Permission denied (publickey)" in nodes.refusal("ssh c1 true")


def test_one_s_wrong_keys_keep_nobody_else_out(nodes: Nodes) -> None:
    job = nodes.hold(nodes="c1")
    try:
        nodes.script("for _ in $(seq 12); do ssh c1 true 2>/dev/null; done; true", "ben")
        assert nodes.script("ssh c1 hostname").strip() == "c1"
    finally:
        nodes.end(job)


@pytest.mark.parametrize("trap", ["mkfifo KEYS", "ln -s /dev/zero KEYS", "ln -s /run/secrets/munge-key KEYS"])
def test_what_a_user_puts_in_the_place_of_keys_lets_nobody_in_and_holds_nothing_up(nodes: Nodes, trap: str) -> None:
    job = nodes.hold(nodes="c1")
    keys = "~/.ssh/authorized_keys"
    try:
        nodes.script(f"mv {keys} ~/kept; {trap.replace('KEYS', keys)}")
        assert "Permission denied" in nodes.refusal("timeout 20 ssh c1 true")
        assert nodes.workers[0].run("pgrep", "-c", "sshd").strip() == "1"
    finally:
        nodes.script(f"rm -f {keys}; mv ~/kept {keys}")
        nodes.end(job)


def test_session_ends_with_the_last_job_and_none_of_it_is_left(nodes: Nodes) -> None:
    worker = nodes.workers[0]
    first, last = nodes.hold(nodes="c1"), nodes.hold(nodes="c1")
    nodes.script("setsid -f ssh c1 'setsid -f sleep 7001; exec sleep 7002' >/dev/null 2>&1 </dev/null; true")
    wait_until(
        lambda: worker.run("sh", "-c", "pgrep -fc '^sleep 700' || true").strip() == "2", timeout_s=20, what="a session"
    )
    nodes.script(f"scancel {first}")
    wait_until(
        lambda: first not in worker.run("ls", "/run/cfiddle-grants").split(), timeout_s=20, what="the first job's end"
    )
    assert worker.run("pgrep", "-fc", "^sleep 700").strip() == "2", "the other job goes on"
    nodes.end(last)
    assert worker.run("sh", "-c", "pgrep -fa '^(sleep 700|sshd-session: ada)' || true") == ""


def test_login_that_is_under_way_when_the_job_ends_comes_to_nothing(nodes: Nodes) -> None:
    worker = nodes.workers[0]
    job = nodes.hold(nodes="c1")
    # Waits for a passphrase, after the server has said that it would take the key.
    nodes.script(
        "cp ~/.ssh/id_ed25519 ~/slow; cp ~/.ssh/id_ed25519.pub ~/slow.pub; ssh-keygen -q -p -P '' -N secret -f ~/slow;"
        "printf '#!/bin/sh\\nsleep 600\\n' >~/ask; chmod +x ~/ask;"
        "SSH_ASKPASS=~/ask SSH_ASKPASS_REQUIRE=force setsid -f ssh -i ~/slow -o IdentitiesOnly=yes c1 sleep 7003"
        " >/dev/null 2>&1 </dev/null"
    )
    under_way = "pgrep -f '^sshd-session: ada \\[priv\\]' || true"
    wait_until(lambda: worker.run("sh", "-c", under_way), timeout_s=20, what="a login under way")
    nodes.end(job)
    assert worker.run("sh", "-c", under_way) == ""
    nodes.script("pkill -u ada ssh; rm -f ~/slow ~/slow.pub ~/ask; true")


def test_mpirun_goes_over_ssh_where_the_user_has_jobs(nodes: Nodes) -> None:
    nodes.userhost.run("tee", "/etc/machinefile", input="c1 slots=2\nc2 slots=2\n", user="0:0")
    job = nodes.hold()
    try:
        found = _ranks(nodes.script("mpirun --hostfile /etc/machinefile python3 hello.py </dev/null 2>complaints"))
        assert "WARNING" not in nodes.script("cat complaints")
        assert {line.split()[1] for line in found} == {"c1", "c2"}, found
    finally:
        nodes.end(job)


def test_users_node_lets_in_whose_key_it_is_and_hosts_prove_who_they_are(nodes: Nodes) -> None:
    assert nodes.script("ssh userhost 'id -un; hostname'").split() == ["ada", "userhost"]
    for wrong in ("ben@userhost", "root@userhost", "-o PubkeyAuthentication=no userhost"):
        assert "Permission denied (publickey)" in nodes.refusal(f"ssh {wrong} true")
    # The same host under a name that its certificate is not for.
    assert "verification failed" in nodes.refusal("ssh -o BatchMode=yes -o HostKeyAlias=c1 userhost true")
    assert nodes.userhost.run("stat", "-c", "%a %U", "/run/ssh-identity/key").split() == ["600", "root"]
