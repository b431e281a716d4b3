"""What can be said of the checkout without a cluster: style, types, shell scripts, the stack file, notebooks; and the tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from cfiddle_cluster.config import Config

SOURCES = ("src", "tests", "benchmarks", "tasks.py", "test_cfiddle.py")

# docs.docker.com/engine/reference/commandline/stack_deploy: what it ignores without a word that anybody reads, or rejects.
IGNORED_BY_STACKS = ["build", "cgroup_parent", "container_name", "cpuset", "depends_on", "devices", "external_links", "ipc", "links", "mem_limit", "network_mode", "oom_score_adj", "pid", "privileged", "restart", "security_opt", "shm_size", "userns_mode"]


def main(config: Config) -> int:
    """Run every check; return how many found something."""
    root = config.root
    scripts = [str(path.relative_to(root)) for path in shell_scripts(root)]
    tool = Path(sys.executable).parent
    commands: dict[str, Sequence[str | Path]] = {
        "ruff check": [tool / "ruff", "check", "--quiet", *SOURCES],
        "ruff format": [tool / "ruff", "format", "--quiet", "--diff", *SOURCES],
        "mypy": [tool / "mypy", "--no-error-summary"],
        "shellcheck": [tool / "shellcheck", "--external-sources", *scripts],
        "shfmt": [tool / "shfmt", "--diff", "--indent", "4", *scripts],
    }
    checks: dict[str, Callable[[], list[str]]] = {
        "docker-compose.yml": lambda: stack_faults(yaml.safe_load((root / "docker-compose.yml").read_text())),
        "notebooks": lambda: notebook_faults(root),
    }
    failed = 0
    for name, argv in commands.items():
        done = subprocess.run(argv, cwd=root, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        failed += _tell(name, (done.stdout + done.stderr).splitlines() if done.returncode else [])
    for name, check in checks.items():
        failed += _tell(name, check())
    return failed


def test(config: Config, arguments: Sequence[str]) -> int:
    """Run pytest on the cluster that is up; return its exit status."""
    sys.stdout.flush()
    argv = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(argv, cwd=config.root, check=False, env=os.environ | {"PYTHONUNBUFFERED": "1"}).returncode


def shell_scripts(root: Path) -> list[Path]:
    """Return the checkout's shell scripts, by name or by first line."""
    return [path for path in _files(root) if path.suffix == ".sh" or _first_line(path) in _SHELLS]


def stack_faults(stack: dict[str, Any]) -> list[str]:
    """Return what is wrong with the stack file: options that a stack ignores, names that stand nowhere."""
    faults = []
    for name, service in stack["services"].items():
        faults += [
            f"{name}: `docker stack deploy` ignores {option}" for option in IGNORED_BY_STACKS if option in service
        ]
        deploy = service.get("deploy", {})
        if deploy.get("endpoint_mode") != "dnsrr":
            faults.append(f"{name}: endpoint_mode must be dnsrr, for kernels without IPVS")
        faults += [
            f"{name}: port {port['target']} must be published in host mode"
            for port in service.get("ports", [])
            if port.get("mode") != "host"
        ]
        for kind in ("secrets", "configs", "networks"):
            used = [item["source"] if isinstance(item, dict) else item for item in service.get(kind, [])]
            faults += [f"{name}: no {kind[:-1]} {item}" for item in used if item not in stack.get(kind, {})]
        for volume in service.get("volumes", []):
            source = volume.get("source", "") if isinstance(volume, dict) else volume.partition(":")[0]
            if source and not source.startswith("/") and source not in stack["volumes"]:
                faults.append(f"{name}: no volume {source}")
    return faults


def notebook_faults(root: Path) -> list[str]:
    """Return the notebooks that hold outputs: they would differ with every run."""
    return [
        f"{path.relative_to(root)}: cell {number} holds outputs"
        for path in sorted((root / "notebooks").glob("*.ipynb"))
        for number, cell in enumerate(json.loads(path.read_text())["cells"], start=1)
        if cell.get("outputs") or cell.get("execution_count")
    ]


_SHELLS = ("#!/usr/bin/env bash", "#!/bin/bash", "#!/bin/sh", "#!/bin/dash")


def _files(root: Path) -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    return (root / name for name in sorted(listed.stdout.split("\0")) if name and (root / name).is_file())


def _first_line(path: Path) -> str:
    with open(path, "rb") as file:
        return file.readline(64).decode(errors="replace").strip()


def _tell(name: str, faults: Sequence[str]) -> bool:
    print(f"{name:<20} {'found something' if faults else 'fine'}", flush=True)
    for fault in faults:
        print(f"  {fault}", flush=True)
    return bool(faults)
