"""What can be said of the checkout without a cluster: style, types, scripts, stack file, notebooks; and the tests."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cfiddle_cluster import packages
from cfiddle_cluster.config import Config
from cfiddle_cluster.errors import ClusterError

BENCHMARKS = ("latency", "fidelity", "mpi", "containers", "cluster")
TEST_RUNS: Sequence[Sequence[str]] = (
    ("--numprocesses=3", "--quiet", "tests/unit"),
    ("--durations=30", *(f"tests/{directory}" for directory in ("images", "cluster", "attacks", "faults"))),
)
"""Unit tests have nothing in common, and wait half of the time; the others share a cluster."""
MACHINES_PATIENCE = "12"
"""What CFIDDLE_PATIENCE is if nobody says otherwise: how much longer things may take on emulated machines."""
SOURCES = ("src", "tests", "benchmarks", "images", "tasks.py", "CM.py", "test_cfiddle.py")

# What `docker stack deploy` ignores with a warning or without one, and what it rejects:
# https://github.com/docker/cli/blob/master/cli/compose/types/types.go, and depends_on, which a swarm has no notion of.
IGNORED_BY_STACKS = (
    "build cgroup_parent cgroupns_mode container_name cpu_quota cpu_shares cpuset depends_on devices domainname expose "
    "extends external_links ipc links mac_address mem_limit memswap_limit network_mode pid privileged restart "
    "security_opt shm_size userns_mode volume_driver volumes_from"
).split()

_SHELLS = ("#!/usr/bin/env bash", "#!/bin/bash", "#!/bin/sh", "#!/bin/dash")


def main(config: Config) -> int:
    """Run every check; return how many found something."""
    root = config.root
    packages.ensure_development_packages(root)
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
        "docker-compose.yml": lambda: stack_faults(root),
        "lock files": lambda: lock_faults(root),
        "notebooks": lambda: notebook_faults(root),
    }
    failed = 0
    for name, argv in commands.items():
        done = subprocess.run(argv, cwd=root, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        failed += _tell(name, (done.stdout + done.stderr).splitlines() if done.returncode else [])
    for name, check in checks.items():
        failed += _tell(name, check())
    return failed


def test(config: Config, arguments: Sequence[str], *, quick: bool) -> int:
    """Run pytest on the cluster that is up, if `quick` without the tests marked slow; return its exit status."""
    _ensure_tests_can_run(config)
    marked = ["-m", "not slow"] if quick else []
    return max(_pytest(config, [*marked, *options]) for options in ([arguments] if arguments else TEST_RUNS))


def _ensure_tests_can_run(config: Config) -> None:
    packages.ensure_test_commands()
    packages.ensure_development_packages(config.root)
    sys.stdout.flush()


def _pytest(config: Config, options: Sequence[str]) -> int:
    argv = [sys.executable, "-m", "pytest", *options]
    return subprocess.run(argv, cwd=config.root, check=False, env=os.environ | {"PYTHONUNBUFFERED": "1"}).returncode


def test_machines(config: Config, arguments: Sequence[str]) -> int:
    """Run pytest on virtual machines of its own, emulated where they must be; return its exit status."""
    packages.refuse_missing_machines_test_commands()
    packages.ensure_development_packages(config.root)
    os.environ.setdefault("CFIDDLE_PATIENCE", MACHINES_PATIENCE)
    sys.stdout.flush()
    return _pytest(config, ["--durations=30", *(arguments or ["tests/machines"])])


def benchmark(config: Config, which: str) -> int:
    """Run one of the benchmarks on the cluster that is up; return its exit status."""
    if which not in BENCHMARKS:
        raise ClusterError(f"there is no benchmark {which!r}", f"./invoke benchmark {'|'.join(BENCHMARKS)}")
    argv = [sys.executable, str(config.root / "benchmarks" / f"{which}.py")]
    return subprocess.run(argv, cwd=config.root, check=False).returncode


def prove(config: Config, arguments: Sequence[str]) -> int:
    """Weaken the cluster that is up, point by point, and see tests fail; return 1 if one did not."""
    _ensure_tests_can_run(config)
    argv = [sys.executable, "tests/prove.py", *arguments]
    return subprocess.run(argv, cwd=config.root, check=False).returncode


def shell_scripts(root: Path) -> list[Path]:
    """Return the checkout's shell scripts, by name or by first line."""
    return [path for path in _files(root) if path.suffix == ".sh" or _first_line(path) in _SHELLS]


def stack_faults(root: Path) -> list[str]:
    """Return what is wrong with the stack file: options that a stack ignores, names that stand nowhere."""
    text = (root / "docker-compose.yml").read_text()
    try:
        stack = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [str(error)]
    faults = [
        f"no image {name.lower()}: images/{name.lower()}/Dockerfile is missing"
        for name in sorted(set(re.findall(r"\$\{IMAGE_([A-Z_]+)\}", text)))
        if not (root / "images" / name.lower() / "Dockerfile").is_file()
    ]
    for name, service in stack["services"].items():
        faults += [f"{name}: {fault}" for fault in _service_faults(service, stack)]
    for kind in ("networks", "volumes", "secrets", "configs"):
        used = {item for service in stack["services"].values() for item in _named(service, kind)}
        faults += [f"no service uses {kind[:-1]} {item}" for item in stack.get(kind, {}) if item not in used]
    return faults


def _service_faults(service: dict[str, Any], stack: dict[str, Any]) -> Iterator[str]:
    for option in IGNORED_BY_STACKS:
        if option in service:
            yield f"`docker stack deploy` ignores {option}"
    if "image" not in service:
        yield "it has no image"
    if service.get("deploy", {}).get("endpoint_mode") != "dnsrr":
        yield "endpoint_mode must be dnsrr, for kernels without IPVS"
    for port in service.get("ports", []):
        if not isinstance(port, dict) or port.get("mode") != "host":
            yield f"port {port['target'] if isinstance(port, dict) else port} must be published in host mode"
    for kind in ("networks", "volumes", "secrets", "configs"):
        for item in _named(service, kind):
            if item not in stack.get(kind, {}):
                yield f"there is no {kind[:-1]} {item}"


def _named(service: dict[str, Any], kind: str) -> list[str]:
    """Return the names of networks, volumes, secrets or configs that a service uses; no directories of the machine."""
    items = service.get(kind, [])
    names = [item.get("source", "") if isinstance(item, dict) else item for item in items]
    if kind == "volumes":
        names = [name.partition(":")[0] for name in names]
    return [name for name in names if name and not name.startswith("/")]


def lock_faults(root: Path) -> list[str]:
    """Return where lock files do not fit what they are made from, or pin something without a hash."""
    faults = []
    pinned = {}
    for lock in sorted((root / "requirements").glob("*.lock")):
        text = lock.read_text()
        entries = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
        versions = pinned[lock.stem] = {canonicalize_name(name): version for name, version, _ in entries}
        faults += [f"{lock.name}: {name} has no hash" for name, _, rest in entries if "--hash=sha256:" not in rest]
        if "://" in text:
            faults.append(f"{lock.name}: names an index; where packages come from is each machine's own affair")
        for requirement in _requirements(lock.with_suffix(".in")):
            version = versions.get(canonicalize_name(requirement.name), "")
            if not version:
                faults.append(f"{lock.name}: lacks {requirement.name}, which {lock.stem}.in names")
            elif not requirement.specifier.contains(version, prereleases=True):
                faults.append(f"{lock.name}: has {requirement.name} {version}, and {lock.stem}.in wants {requirement}")
    # What a notebook pickles, a sandbox opens.
    user = pinned.get("user", {})
    faults += [
        f"{place}.lock has {name} {version}, and user.lock {user.get(name, 'has none')}"
        for place in ("sandbox", "worker")
        for name, version in pinned.get(place, {}).items()
        if user.get(name) != version
    ]
    # Both are installed into one environment.
    admin = pinned.get("admin", {})
    faults += [
        f"development.lock has {name} {version}, and admin.lock {admin[name]}"
        for name, version in pinned.get("development", {}).items()
        if admin.get(name, version) != version
    ]
    return faults


def _requirements(path: Path) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def notebook_faults(root: Path) -> list[str]:
    """Return the notebooks that hold outputs: they would differ with every run."""
    return [
        f"{path.relative_to(root)}: cell {number} holds outputs"
        for path in sorted((root / "notebooks").glob("*.ipynb"))
        for number, cell in enumerate(json.loads(path.read_text())["cells"], start=1)
        if cell.get("outputs") or cell.get("execution_count")
    ]


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
