"""The checks of the checkout: each sees what it is there for, and this checkout passes those that need no tool."""

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cfiddle_cluster import checks

ROOT = Path(__file__).resolve().parents[2]

STACK: dict[str, Any] = {
    "services": {
        "agent": {
            "image": "${IMAGE_AGENT}",
            "networks": ["cluster"],
            "secrets": ["key", {"source": "password", "target": "p"}],
            "configs": [{"source": "policy", "target": "/etc/policy"}],
            "ports": [{"target": 1, "mode": "host"}],
            "volumes": ["/var/run/docker.sock:/s", "homes:/home", {"type": "tmpfs", "target": "/tmp"}],
            "deploy": {"endpoint_mode": "dnsrr"},
        }
    },
    "networks": {"cluster": {}},
    "volumes": {"homes": {}},
    "secrets": {"key": {}, "password": {}},
    "configs": {"policy": {}},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images/agent").mkdir(parents=True)
    (tmp_path / "images/agent/Dockerfile").touch()
    (tmp_path / "requirements").mkdir()
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def _stack_faults(root: Path, *, top: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    stack = json.loads(json.dumps(STACK | (top or {})))
    service = stack["services"]["agent"]
    stack["services"]["agent"] = {name: value for name, value in (service | changes).items() if value is not None}
    (root / "docker-compose.yml").write_text(yaml.safe_dump(stack))
    return checks.stack_faults(root)


def test_checkout_has_no_such_fault() -> None:
    assert checks.stack_faults(ROOT) == []
    assert checks.lock_faults(ROOT) == []
    assert checks.notebook_faults(ROOT) == []


def test_good_stack_has_no_fault(root: Path) -> None:
    assert _stack_faults(root) == []


@pytest.mark.parametrize("option", ["privileged", "security_opt", "pid", "devices", "shm_size", "depends_on", "cpuset"])
def test_option_that_a_stack_ignores_is_found(root: Path, option: str) -> None:
    assert _stack_faults(root, **{option: "x"}) == [f"agent: `docker stack deploy` ignores {option}"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"deploy": {}}, "agent: endpoint_mode must be dnsrr"),
        ({"ports": ["80:80"]}, "agent: port 80:80 must be published in host mode"),
        ({"ports": [{"target": 80}]}, "agent: port 80 must be published in host mode"),
        ({"networks": ["cluster", "other"]}, "agent: there is no network other"),
        ({"secrets": ["key", "password", {"source": "s"}]}, "agent: there is no secret s"),
        ({"volumes": ["homes:/h", "v:/v"]}, "agent: there is no volume v"),
        ({"configs": []}, "no service uses config policy"),
        ({"image": "${IMAGE_NONE}"}, "no image none: images/none/Dockerfile is missing"),
        ({"image": None}, "agent: it has no image"),
    ],
)
def test_fault_of_a_service_is_found(root: Path, changes: dict[str, Any], fault: str) -> None:
    (found,) = _stack_faults(root, **changes)
    assert found.startswith(fault)


def test_stack_file_that_is_no_yaml_is_a_fault(root: Path) -> None:
    (root / "docker-compose.yml").write_text("services: [")
    assert len(checks.stack_faults(root)) == 1


def _lock(root: Path, name: str, wanted: str, locked: str) -> None:
    (root / f"requirements/{name}.in").write_text(wanted)
    (root / f"requirements/{name}.lock").write_text(locked)


HASH = " \\\n    --hash=sha256:00\n    # via x\n"


def test_good_locks_have_no_fault(root: Path) -> None:
    _lock(root, "sandbox", "# why\ncfiddle==1 # so\npandas<3\n", f"cfiddle==1{HASH}pandas==2.9{HASH}numpy==2{HASH}")
    _lock(
        root,
        "user",
        "-c sandbox.lock\nPyYAML\ncfiddle",
        f"cfiddle==1{HASH}numpy==2{HASH}pandas==2.9{HASH}pyyaml==6{HASH}",
    )
    assert checks.lock_faults(root) == []


@pytest.mark.parametrize(
    ("wanted", "locked", "fault"),
    [
        ("one\ntwo\n", f"one==1{HASH}", "admin.lock: lacks two, which admin.in names"),
        ("one<2\n", f"one==2{HASH}", "admin.lock: has one 2, and admin.in wants one<2"),
        ("one\n", f"one==1\ntwo==2{HASH}", "admin.lock: one has no hash"),
        ("one\n", f"--index-url https://a.b/\none==1{HASH}", "admin.lock: names an index"),
        (
            "one\n",
            f"one==1 ; sys_platform == 'win32' \\\n    --hash=sha256:0\ntwo==2{HASH[:3]}\n",
            "admin.lock: two has no",
        ),
    ],
)
def test_fault_of_a_lock_is_found(root: Path, wanted: str, locked: str, fault: str) -> None:
    _lock(root, "admin", wanted, locked)
    (found,) = checks.lock_faults(root)
    assert found.startswith(fault)


def test_notebook_and_sandbox_or_worker_that_differ_are_found(root: Path) -> None:
    _lock(root, "sandbox", "numpy", f"numpy==2{HASH}pandas==2{HASH}")
    _lock(root, "worker", "scipy", f"scipy==3{HASH}")
    _lock(root, "user", "numpy", f"numpy==1{HASH}")
    assert checks.lock_faults(root) == [
        "sandbox.lock has numpy 2, and user.lock 1",
        "sandbox.lock has pandas 2, and user.lock has none",
        "worker.lock has scipy 3, and user.lock has none",
    ]


def test_packages_of_one_environment_that_differ_are_found(root: Path) -> None:
    _lock(root, "admin", "click", f"click==8{HASH}rich==15{HASH}")
    _lock(root, "development", "-c admin.lock\npytest", f"pytest==9{HASH}rich==14{HASH}")
    assert checks.lock_faults(root) == ["development.lock has rich 14, and admin.lock 15"]


def test_notebook_with_outputs_is_found(root: Path) -> None:
    cells = [{"outputs": [], "execution_count": None}, {"outputs": [{}]}, {"execution_count": 3}, {}]
    (root / "notebooks/n.ipynb").write_text(json.dumps({"cells": cells}))
    assert checks.notebook_faults(root) == [f"notebooks/n.ipynb: cell {n} holds outputs" for n in (2, 3)]


def test_every_shell_script_is_looked_at() -> None:
    found = {str(path.relative_to(ROOT)) for path in checks.shell_scripts(ROOT)}
    assert {"invoke", "config.sh", "install_docker.sh", "src/cfiddle_cluster/probe.sh", ".ci/run"} <= found
    assert not any(path.endswith((".py", ".lock", "Dockerfile")) for path in found)


def test_what_a_tool_finds_is_shown_and_makes_the_check_fail(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _stack_faults(root)
    tools = root / "bin"
    tools.mkdir()
    for name in ("ruff", "mypy", "shellcheck", "shfmt", "python"):
        (tools / name).write_text("#!/bin/sh\n" + ("echo 'a.py:1: untyped'; exit 1\n" if name == "mypy" else ""))
        (tools / name).chmod(0o755)
    monkeypatch.setattr(checks.sys, "executable", str(tools / "python"))
    monkeypatch.setattr(checks, "shell_scripts", lambda root: [root / "a.sh"])
    monkeypatch.setattr(checks.packages, "ensure_development_packages", lambda root: None)
    assert checks.main(type("Config", (), {"root": root})) == 1
    printed = capsys.readouterr().out
    assert "a.py:1: untyped" in printed
    assert printed.count("found something") == 1
    assert printed.count("fine") == 7


def test_what_the_tests_need_is_there_before_they_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[list[str]] = []
    statuses = iter([3, 1, 0])
    monkeypatch.setattr(checks.packages, "ensure_test_commands", lambda: done.append(["commands"]))
    monkeypatch.setattr(checks.packages, "ensure_development_packages", lambda root: done.append(["packages"]))

    def run(argv: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        done.append(argv[2:])
        return subprocess.CompletedProcess(argv, next(statuses))

    monkeypatch.setattr(checks.subprocess, "run", run)
    config = type("Config", (), {"root": tmp_path})
    assert checks.test(config, ["tests/unit/test_x.py", "-k", "y"], quick=False) == 3
    assert done == [["commands"], ["packages"], ["pytest", "tests/unit/test_x.py", "-k", "y"]]
    done.clear()
    assert checks.test(config, [], quick=True) == 1, "one of both runs has failed"
    assert all(argv[1:3] == ["-m", "not slow"] for argv in done[2:])
    assert _directories_in(option for argv in done for option in argv) == _run_without_being_named()


def test_pytest_itself_boots_no_virtual_machines_unless_told(pytestconfig: pytest.Config) -> None:
    assert _directories_in(pytestconfig.getini("testpaths")) == _run_without_being_named()


def _directories_in(options: Iterable[str]) -> set[str]:
    return {Path(option).name for option in options if option.startswith("tests/")}


def _run_without_being_named() -> set[str]:
    directories = Path(__file__).parents[1].iterdir()
    return {path.name for path in directories if list(path.glob("test_*.py"))} - {"machines"}


@pytest.mark.parametrize("asked", [None, "3"])
def test_virtual_machines_are_waited_for_longer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str | None
) -> None:
    done: list[tuple[list[str], str]] = []

    def run(argv: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        done.append((argv[2:], env["CFIDDLE_PATIENCE"]))
        return subprocess.CompletedProcess(argv, 5)

    monkeypatch.setattr(checks.packages, "refuse_missing_machines_test_commands", lambda: None)
    monkeypatch.setattr(checks.packages, "ensure_development_packages", lambda root: None)
    monkeypatch.setattr(checks.subprocess, "run", run)
    monkeypatch.setattr(os, "environ", {} if asked is None else {"CFIDDLE_PATIENCE": asked})
    config = type("Config", (), {"root": tmp_path})
    assert checks.test_machines(config, []) == 5
    assert done == [(["pytest", "--durations=30", "tests/machines"], asked or checks.MACHINES_PATIENCE)]
