"""The launcher: finds a Python, makes the environment once, and says exactly what is missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LAUNCHER = Path(__file__).resolve().parents[2] / "invoke"
LOCK = "one==1\n"

# In the place of a Python of some version: makes environments whose `python` tells what it was called with.
PYTHON = r"""#!/bin/bash
log="$(dirname "$0")/../log"
case "$*" in
    *print*) echo python3.11-venv ;;
    *version_info*) exit {is_old} ;;
    *ensurepip*) exit {has_no_venv} ;;
    "-m venv "*)
        echo made >>"$log"
        sleep 0.2
        mkdir -p "$3/bin" "$3/packages"
        cat >"$3/bin/python" <<'INNER'
#!/bin/bash
case "$*" in
    *"# Python"*) cat "${{0%/*}}/../../version" ;;
    *purelib*) echo "$(dirname "$(dirname "$0")")/packages" ;;
    "-m pip "*) [[ ! -e "${{0%/*}}/../../no-index" ]] || {{ echo "no index answers" >&2; exit 1; }} ;;
    *) printf '%s|' "$@"; echo; exit 7 ;;
esac
INNER
        chmod +x "$3/bin/python" ;;
esac
"""


class Checkout:
    """A checkout with the launcher, a lock file, and stand-ins for Python in a PATH of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "requirements").mkdir(parents=True)
        (root / "src").mkdir()
        (root / "version").write_text("# Python 3.11\n")
        (root / "requirements/admin.lock").write_text(LOCK)
        shutil.copy(LAUNCHER, root / "invoke")
        self.path = root / "path"
        self.path.mkdir()
        for tool in ("bash", "dirname", "readlink", "cmp", "cat", "flock", "rm", "mkdir", "chmod", "sleep", "env"):
            (self.path / tool).symlink_to(shutil.which(tool) or "/bin/false")

    def python(self, name: str = "python3", *, is_old: bool = False, has_venv: bool = True) -> None:
        program = self.path / name
        program.write_text(PYTHON.format(is_old=int(is_old), has_no_venv=int(not has_venv)))
        program.chmod(0o755)

    def environment(self, path: Path | None = None) -> dict[str, str]:
        return {"PATH": str(path or self.path)}

    def run(self, *arguments: str, launcher: Path | None = None, cwd: Path | None = None) -> tuple[int, str, str]:
        argv = [launcher or self.root / "invoke", *arguments]
        done = subprocess.run(argv, env=self.environment(), cwd=cwd, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    @property
    def made(self) -> int:
        log = self.root / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    found = Checkout(tmp_path / "a checkout")
    # The launcher asks for /usr/bin/python3 too, which this machine has: a stand-in for it cannot be put there.
    text = (found.root / "invoke").read_text()
    assert " /usr/bin/python3" in text
    (found.root / "invoke").write_text(text.replace(" /usr/bin/python3", ""))
    return found


def test_environment_is_made_once_and_runs_the_task(checkout: Checkout) -> None:
    checkout.python()
    status, out, err = checkout.run("up", "a b", "*")
    assert (status, out) == (7, f"-m|invoke|--search-root|{checkout.root}|up|a b|*|\n"), err
    assert "once" in err
    status, _, err = checkout.run("up")
    assert (status, err, checkout.made) == (7, "", 1)
    assert (checkout.root / ".venv/packages/cfiddle.pth").read_text() == f"{checkout.root}/src\n"


def test_called_from_elsewhere_and_through_a_link(checkout: Checkout, tmp_path: Path) -> None:
    checkout.python()
    link = tmp_path / "link"
    link.symlink_to(checkout.root / "invoke")
    assert checkout.run("up", launcher=link, cwd=Path("/"))[1] == f"-m|invoke|--search-root|{checkout.root}|up|\n"


def test_changed_lock_makes_the_environment_anew(checkout: Checkout) -> None:
    checkout.python()
    checkout.run("up")
    (checkout.root / "requirements/admin.lock").write_text("one==2\n")
    assert checkout.run("up")[0] == 7
    assert checkout.made == 2


def test_moved_checkout_makes_the_environment_anew(checkout: Checkout, tmp_path: Path) -> None:
    checkout.python()
    checkout.run("up")
    moved = tmp_path / "moved"
    checkout.root.rename(moved)
    checkout.root, checkout.path = moved, moved / "path"
    assert checkout.run("up")[1] == f"-m|invoke|--search-root|{moved}|up|\n"
    assert (moved / ".venv/packages/cfiddle.pth").read_text() == f"{moved}/src\n"


def test_environment_whose_python_is_gone_is_made_anew(checkout: Checkout) -> None:
    checkout.python()
    checkout.run("up")
    (checkout.root / ".venv/bin/python").unlink()
    assert checkout.run("up")[0] == 7


def test_environment_whose_python_is_another_version_is_made_anew(checkout: Checkout) -> None:
    """After an upgrade of the machine, where `python` is a link to its own."""
    checkout.python()
    checkout.run("up")
    (checkout.root / "version").write_text("# Python 3.13\n")
    assert checkout.run("up")[0] == 7
    assert checkout.made == 2
    checkout.run("up")
    assert checkout.made == 2


def test_two_at_once_make_it_once(checkout: Checkout) -> None:
    checkout.python()
    argv = [checkout.root / "invoke", "up"]
    both = [subprocess.Popen(argv, env=checkout.environment(), stdout=-1, stderr=-1) for _ in range(2)]
    assert [process.communicate()[1].count(b", once") for process in both].count(1) == 1
    assert [process.returncode for process in both] == [7, 7]
    assert checkout.made == 1


def test_failed_installation_says_so_and_is_tried_again(checkout: Checkout) -> None:
    checkout.python()
    (checkout.root / "no-index").touch()
    status, out, err = checkout.run("up")
    assert (status, out) == (1, "")
    assert "no index answers" in err
    assert "cannot be installed" in err
    (checkout.root / "no-index").unlink()
    assert checkout.run("up")[0] == 7


def test_no_python_at_all(checkout: Checkout) -> None:
    status, _, err = checkout.run("up")
    assert status == 1
    assert (
        err == "error: no Python 3.11 or later here\n→ apt-get install python3 python3-venv   (or set PYTHON to one)\n"
    )


def test_only_an_old_python(checkout: Checkout) -> None:
    checkout.python(is_old=True)
    status, _, err = checkout.run("up")
    assert status == 1
    assert "apt-get install python3.11 python3.11-venv" in err


def test_newer_python_beside_an_old_one_is_taken(checkout: Checkout) -> None:
    checkout.python(is_old=True)
    checkout.python("python3.12")
    assert checkout.run("up")[0] == 7


def test_missing_venv_module_is_named(checkout: Checkout) -> None:
    checkout.python(has_venv=False)
    status, _, err = checkout.run("up")
    assert status == 1
    assert "its venv module is missing\n→ apt-get install python3.11-venv" in err
    assert checkout.made == 0


def test_checkout_that_cannot_be_written_to_is_said_so(checkout: Checkout) -> None:
    checkout.python()
    checkout.root.chmod(0o555)
    # Root writes anywhere but without this capability.
    mortal = [shutil.which("setpriv") or "", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    argv = [*mortal, checkout.root / "invoke", "up"]
    done = subprocess.run(argv, env=checkout.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{checkout.root} cannot be written to" in done.stderr
    assert "sudo" in done.stderr


def test_real_environment_has_what_the_locks_name() -> None:
    """This very environment is one that the launcher makes, and the tests' task adds to."""
    lock = "".join((LAUNCHER.parent / f"requirements/{name}.lock").read_text() for name in ("admin", "development"))
    pinned = [Requirement(line) for line in re.findall(r"^([a-z0-9-]+==.+) \\$", lock, re.MULTILINE)]
    here = [found for found in pinned if found.marker is None or found.marker.evaluate()]
    argv = [sys.executable, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    listed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    have = {line.lower().replace("_", "-") for line in listed.splitlines()}
    assert len(here) > 10
    assert {f"{found.name}{found.specifier}" for found in here} <= have
