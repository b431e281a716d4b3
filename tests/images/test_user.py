"""The image of the users' node, alone: JupyterLab as an ordinary user, and nothing of root's for anybody."""

import http.client
import json
import re
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfiddle_cluster import config, images
from cfiddle_cluster.commands import docker_cli
from cfiddle_cluster.config import LABEL
from cfiddle_cluster.state import new_secret
from cfiddle_cluster.users import PROBE, User, group, passwd
from live import ROOT, wait_until

USERS = [
    User("jovyan", 1000, 100, "/home/jovyan"),
    User("ada", 2003, 2003, "/home/ada"),
    User("eve", 2004, 2004, "/home/eve"),
]
TOKEN = secrets.token_hex(32)
KEY = secrets.token_hex(64)


SEARCH = """
import pathlib, sys

wanted = sys.stdin.buffer.read()
for file in [*pathlib.Path("/proc").glob("[0-9]*/environ"), *pathlib.Path("/proc").glob("[0-9]*/cmdline")]:
    try:
        if wanted in file.read_bytes():
            print(file)
    except (FileNotFoundError, ProcessLookupError):
        pass
"""

USUAL_ROOTS = (
    r"tini|bash /usr/local/sbin/userhost|sleep|getent|(/bin/)?sh |ps |timeout|python3 -I|/opt/venv/bin/python3 -I"
)


def _docker(*argv: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([docker_cli(), *argv], capture_output=True, text=True, timeout=timeout_s, check=False)


class UserHost:
    """A container of the image, with two people's homes, and no cluster behind it."""

    def __init__(self, container: str, homes: Path) -> None:
        self.container = container
        self.homes = homes
        self.log_of_start = ""

    def root(self, command: str) -> subprocess.CompletedProcess[str]:
        return _docker("exec", self.container, "sh", "-c", command)

    def user(self, command: str, name: str = "ada") -> subprocess.CompletedProcess[str]:
        return _docker("exec", self.container, "as-user", name, "bash", "--login", "-c", command)

    @property
    def log(self) -> str:
        done = _docker("logs", self.container)
        return done.stdout + done.stderr

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        address = _docker("inspect", "-f", "{{.NetworkSettings.IPAddress}}", self.container).stdout.strip()
        connection = http.client.HTTPConnection(address, 8888, timeout=10)
        try:
            connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()


@pytest.fixture(scope="module")
def image() -> str:
    return images.build(config.load(ROOT), names=["user"])["user"]


@pytest.fixture(scope="module")
def host(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[UserHost]:
    base = tmp_path_factory.mktemp("userhost")
    for name in ("secrets", "accounts", "homes"):
        (base / name).mkdir(mode=0o755)
    authority = new_secret("ssh-authority")
    for name, text, uid in (("munge-key", KEY, 801), ("jupyter-token", TOKEN, 0), ("ssh-authority", authority, 0)):
        path = base / "secrets" / name
        path.write_text(text)
        path.chmod(0o400)
        subprocess.run(["chown", f"{uid}:{uid}", path], check=True)
    (base / "accounts" / "passwd").write_text(passwd([*USERS, PROBE]))
    (base / "accounts" / "group").write_text(group([*USERS, PROBE]))
    for user in USERS:
        home = base / "homes" / user.name
        home.mkdir(mode=0o700)
        # A file of one's own stays; a link to where root alone may write leads nowhere.
        if user.name == "eve":
            (home / ".bashrc").write_text("# mine\n")
            (home / "work").symlink_to("/etc")
        subprocess.run(["chown", "-hR", f"{user.uid}:{user.gid}", home], check=True)
    mounts = [
        "-v",
        f"{base}/secrets:/run/secrets:ro",
        "-v",
        f"{base}/accounts:/var/lib/extrausers:ro",
        "-v",
        f"{base}/homes:/home",
    ]
    started = _docker("run", "-d", "--hostname", "userhost", "--label", LABEL, *mounts, image)
    assert started.returncode == 0, started.stderr
    found = UserHost(started.stdout.strip(), base / "homes")
    try:
        wait_until(lambda: _answers(found), timeout_s=60, what="JupyterLab answers")
        wait_until(lambda: (base / "homes" / "eve" / "notebooks").exists(), timeout_s=20, what="the homes are filled")
        found.log_of_start = found.log
        yield found
    finally:
        _docker("rm", "-f", found.container)


def _answers(host: UserHost) -> bool:
    try:
        return host.get("/api")[0] == 200
    except OSError:
        return False


def test_jupyterlab_is_jovyan_s_with_nothing_of_root(host: UserHost) -> None:
    pid = host.root("pgrep -f 'jupyter-lab' | head -1").stdout.strip()
    status = dict(
        line.split(":\t", 1) for line in host.root(f"cat /proc/{pid}/status").stdout.splitlines() if ":\t" in line
    )
    assert status["Uid"].split() == ["1000"] * 4
    assert status["Gid"].split() == ["100"] * 4
    assert status["Groups"].split() == ["100"] or not status["Groups"].split()
    assert all(int(status[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"))
    assert status["NoNewPrivs"] == "1"
    assert status["Umask"] == "0077"


def test_all_of_delegate_function_can_be_imported(host: UserHost) -> None:
    done = host.user("python3 -c 'from delegate_function import *; print(Executor, SandboxDelegate)'")
    assert done.returncode == 0, done.stderr


def test_only_init_and_what_waits_is_root(host: UserHost) -> None:
    processes = [line.split(None, 1) for line in host.root("ps -eo user=,args=").stdout.splitlines()]
    roots = {arguments for user, arguments in processes if user == "root"}
    assert all(
        re.match(
            r"tini|bash /usr/local/(sbin/userhost|bin/wait-until)|sshd: /usr/sbin/sshd|sleep|sh -c|ps|/bin/sh|timeout|"
            r"python3 -I|health|getent|awk|runc init",
            process,
        )
        for process in roots
    ), roots
    assert ["munge", "munged"] in [[user, arguments.split()[0]] for user, arguments in processes]


def test_token_opens_and_nothing_else_does(host: UserHost) -> None:
    assert host.get(f"/api/contents?token={TOKEN}")[0] == 200
    assert host.get("/api/contents", Authorization=f"token {TOKEN}")[0] == 200
    assert host.get("/api/contents")[0] == 403
    assert host.get("/api/contents?token=" + "0" * 64)[0] == 403
    assert host.get("/api/contents?token=")[0] == 403
    assert host.get("/lab")[0] == 302, "to the login page"
    assert "access-control-allow-origin" not in host.get(f"/api?token={TOKEN}", Origin="http://evil.example")[1].lower()


def test_secrets_are_in_no_process_environment_argument_or_log(host: UserHost) -> None:
    for name, value in (("token", TOKEN), ("key", KEY)):
        assert value not in host.log, name
        argv = [docker_cli(), "exec", "-i", host.container, "python3", "-I", "-c", SEARCH]
        done = subprocess.run(argv, input=value, capture_output=True, text=True, timeout=30, check=False)
        assert done.stdout.split() == [], (name, done.stderr)


def test_other_users_read_neither_secret_nor_token_nor_another_s_home(host: UserHost) -> None:
    for path in (
        "/run/secrets/munge-key",
        "/run/secrets/jupyter-token",
        "/run/secrets/ssh-authority",
        "/run/ssh-identity/key",
        "/run/jupyter/token",
        "/home/jovyan/.bashrc",
        "/home/eve/.bashrc",
    ):
        done = host.user(f"cat {path}")
        assert done.returncode != 0, path
        assert "Permission denied" in done.stderr, path
    assert host.user("ls /home/eve").returncode != 0
    assert host.user("cat /run/secrets/munge-key", "jovyan").returncode != 0


def test_home_is_filled_by_its_owner_who_keeps_what_is_there(host: UserHost) -> None:
    for user in USERS:
        home = host.homes / user.name
        for name in ("test_slurm.sh", "test_cfiddle.py", "notebooks"):
            found = (home / name).stat()
            assert (found.st_uid, found.st_gid, found.st_mode & 0o077) == (user.uid, user.gid, 0), (home, name)
    assert (host.homes / "ada" / "work").is_dir()
    assert (host.homes / "eve" / ".bashrc").read_text() == "# mine\n"
    assert (host.homes / "eve" / "work").is_symlink()


def test_munge_signs_for_users_in_their_own_name(host: UserHost) -> None:
    done = host.user("munge -n | unmunge")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^UID:\s+ada \(2003\)$", done.stdout, re.MULTILINE)


def test_session_has_a_clean_environment_and_private_files(host: UserHost) -> None:
    environment = dict(line.split("=", 1) for line in host.user("env").stdout.splitlines())
    assert set(environment) <= {
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "TERM",
        "PATH",
        "OMPI_MCA_mca_base_env_list",
        "PWD",
        "OLDPWD",
        "SHLVL",
        "_",
    }
    assert environment["HOME"] == "/home/ada"
    assert host.user("pwd; umask; id -un; id -G").stdout.split() == ["/home/ada", "0077", "ada", "2003"]
    assert host.user("exit 23").returncode == 23
    assert host.user("true", "nobody-has-this-name").returncode == 1
    assert host.user("true", "munge").returncode == 1, "no daemon's account"
    assert host.user("true", "--help").returncode == 1


def test_nothing_makes_anyone_more_than_they_are(host: UserHost) -> None:
    assert host.root("find / -xdev -type f -perm /6000").stdout == ""
    assert host.root("getent shadow | cut -d: -f2 | grep -v '^[*!]'").stdout == ""
    assert host.user("grep NoNewPrivs /proc/self/status").stdout.split()[1] == "1"
    assert host.root("ls /var/run/docker.sock").returncode != 0
    assert host.user("find / -xdev -type d -perm -0002 ! -perm -1000 2>/dev/null").stdout == ""
    assert host.user("find /usr /opt /etc -writable ! -type l 2>/dev/null").stdout == ""


ASK = """
import socket
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.settimeout(20)
connection.connect("/run/queue-place/socket")
connection.send(b'{"jobs": [1]}')
print(connection.recv(1000).decode())
"""


def test_place_in_the_queue_is_told_by_a_daemon_that_is_not_root_and_comes_back(host: UserHost) -> None:
    assert _python(host, ASK, "ada") == '{"of": 0, "jobs": {}}\n', "no cluster is behind this"
    [pid] = host.root("pgrep -f queue_place[.]py").stdout.split()
    status = host.root(f"cat /proc/{pid}/status").stdout
    assert re.findall(r"^[UG]id:\s+(\d+)\s", status, re.MULTILINE) == ["802", "802"]
    assert set(re.findall(r"^Cap\w+:\s+(\w+)", status, re.MULTILINE)) == {"0" * 16}
    host.root(f"kill -9 {pid}")

    def another() -> str:
        return host.root("pgrep -f queue_place[.]py").stdout.replace(pid, "").strip()

    wait_until(another, timeout_s=10, what="another one runs")
    assert host.root("stat -c '%U %a' /run/queue-place").stdout == "slurm 755\n"


MEASUREMENT = """
from cfiddle import arg_map, build, code, run

program = code(r'''
#include "cfiddle.hpp"
extern "C"
int sum(int n) {
    start_measurement();
    int s = 0;
    for (int i = 0; i < n; i++) s += i * s + i;
    end_measurement();
    return s;
}
''')
results = run(build(program), function="sum", arguments=arg_map(n=[1000, 100000]))
print("took time:", [row["ET"] > 0 for row in results.as_df().to_dict("records")])
"""

NOTEBOOK = """
import nbclient, nbformat

cell = nbformat.v4.new_code_cell("import delegate_function, os; print(5 * 4, os.getuid())")
notebook = nbformat.v4.new_notebook(cells=[cell])
nbclient.NotebookClient(notebook, timeout=60).execute()
print(notebook.cells[0].outputs[0].text)
"""


def _python(host: UserHost, program: str, name: str) -> str:
    done = host.user(f"cd $(mktemp -d) && python3 -W ignore - <<'EOF'\n{program}\nEOF", name)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_cfiddle_measures_a_function(host: UserHost) -> None:
    assert "took time: [True, True]" in _python(host, MEASUREMENT, "ada")


def test_a_notebook_computes(host: UserHost) -> None:
    assert _python(host, NOTEBOOK, "jovyan").split() == ["20", "1000"]


def test_log_of_the_start_has_no_warning_and_no_error(host: UserHost) -> None:
    wrong = re.compile(r"\b(WARN|ERROR|CRITICAL|Traceback)|^\[[WEC] |error:")
    assert [line for line in host.log_of_start.splitlines() if wrong.search(line)] == []


def test_container_without_secrets_ends_and_says_why(image: str) -> None:
    done = _docker("run", "--rm", "--label", LABEL, image)
    assert done.returncode == 1
    assert "the secret munge-key is missing" in done.stderr


def test_a_start_that_takes_long_is_not_taken_for_a_failure(image: str) -> None:
    started = _docker("run", "-d", "--rm", "--label", LABEL, image, "sleep", "60")
    container = started.stdout.strip()
    try:

        def failures() -> list[int]:
            log = json.loads(_docker("inspect", "-f", "{{json .State.Health.Log}}", container).stdout) or []
            return [entry["ExitCode"] for entry in log]

        wait_until(lambda: len(failures()) > 3, timeout_s=40, what="several checks")
        assert 0 not in failures()
        assert _docker("inspect", "-f", "{{.State.Health.Status}}", container).stdout == "starting\n"
    finally:
        _docker("rm", "-f", container)


def test_it_ends_quickly_when_told_to(host: UserHost) -> None:
    began = time.monotonic()
    assert _docker("stop", "-t", "10", host.container).returncode == 0
    assert time.monotonic() - began < 8
    state = json.loads(_docker("inspect", "-f", "{{json .State}}", host.container).stdout)
    assert state["ExitCode"] != 137, "it was not killed"
