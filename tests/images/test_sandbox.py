"""The sandbox's image, alone: what a call finds in it, and what it does not."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cfiddle_cluster.commands import docker_cli, run
from containers import Container, Start

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sandbox(start_for_all: Start) -> Container:
    options = ["--entrypoint", "sleep", "--read-only", "--network", "none", "--cap-drop", "ALL", "--tmpfs", "/tmp:exec"]
    return start_for_all("sandbox", "1d", options=options)


def _versions(lock: str) -> dict[str, str]:
    text = (ROOT / "requirements" / lock).read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)==([^ \\\n]+)", text, re.MULTILINE))


def test_python_and_packages_are_those_of_the_lock(sandbox: Container) -> None:
    program = """
import importlib.metadata, json, sys
packages = {found.name.lower(): found.version for found in importlib.metadata.distributions()}
print(json.dumps([sys.version_info[:2], packages]))
"""
    version, found = json.loads(sandbox.run("python3", "-I", "-c", program))
    assert version == [3, 13]
    assert found == _versions("sandbox.lock"), "these and no other: no pip either"


def test_packages_are_the_same_where_a_call_is_made() -> None:
    here, there = _versions("sandbox.lock"), _versions("user.lock")
    assert {name: there.get(name) for name in here} == here


def test_everything_that_a_call_needs_is_loaded_without_writing(sandbox: Container) -> None:
    program = """
import warnings
warnings.simplefilter("ignore")
import cfiddle, cloudpickle, numpy, pandas
import delegate_function.inside
print(numpy.arange(5).sum(), cfiddle.are_perf_counters_available() in (True, False))
"""
    assert sandbox.run("python3", "-I", "-c", program).split() == ["10", "True"]
    assert sandbox.run("sh", "-c", "ls -A /tmp") == ""


def test_bytecode_of_all_modules_is_there(sandbox: Container) -> None:
    program = """
import importlib.util, pathlib, site
for directory in map(pathlib.Path, site.getsitepackages()):
    for source in directory.rglob("*.py"):
        if not pathlib.Path(importlib.util.cache_from_source(source)).exists():
            print(source)
"""
    assert sandbox.run("python3", "-I", "-c", program) == ""


def test_cfiddle_starts_the_shim_and_nothing_else(sandbox: Container) -> None:
    program = """
import subprocess, sys, warnings
warnings.simplefilter("ignore")
def hook(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        print(event, arguments[1])
sys.addaudithook(hook)
import cfiddle
"""
    assert set(sandbox.run("python3", "-I", "-c", program).splitlines()) == {
        "subprocess.Popen ['gcc', '-print-multiarch']"
    }


def test_there_is_no_compiler_and_the_shim_says_so(sandbox: Container) -> None:
    assert sandbox.run("gcc", "-print-multiarch").strip() in ("x86_64-linux-gnu", "aarch64-linux-gnu")
    refused = sandbox.run("sh", "-c", "gcc x.c 2>&1 || echo status $?")
    assert "no compiler in the sandbox" in refused
    assert "status 1" in refused
    for name in ("cc", "g++", "clang", "as", "ld", "make", "pip", "curl", "wget", "ssh", "docker", "srun"):
        assert sandbox.run("sh", "-c", f"command -v {name} || true") == "", name


def test_nobody_in_it_is_or_becomes_root(sandbox: Container) -> None:
    assert sandbox.run("id", "-u").strip() == "65533"
    assert sandbox.run("id", "-G").strip() == "65533"
    assert sandbox.run("find", "/usr", "/opt", "-xdev", "-type", "f", "-perm", "/6000") == ""
    assert sandbox.run("sh", "-c", "find / -xdev -writable ! -type l 2>/dev/null || true").split() == ["/tmp"]
    assert sandbox.run("sh", "-c", "ls -A /home /root 2>/dev/null || true").replace("/home:", "").strip() == ""


def test_it_shares_only_debian_with_the_images_of_privileged_roles(image: Callable[[str], str]) -> None:
    def layers(name: str) -> list[str]:
        form = "{{json .RootFS.Layers}}"
        return list(json.loads(run([docker_cli(), "image", "inspect", "--format", form, image(name)], timeout_s=30)))

    for name in ("agent", "cluster"):
        assert set(layers("sandbox")) & set(layers(name)) == set(layers("base")), name


def test_the_agent_s_image_carries_no_package_that_it_does_not_need(image: Callable[[str], str]) -> None:
    program = "import importlib.metadata; print(sorted(found.name for found in importlib.metadata.distributions()))"
    argv = [docker_cli(), "run", "--rm", "--label", "cfiddle.cluster=cfiddle", "--network", "none", image("agent")]
    assert run([*argv, "python3", "-c", program], timeout_s=60).strip() == "['PyYAML']"


def test_a_process_without_an_agent_ends_at_once(start: Start) -> None:
    assert start("sandbox", options=["--network", "none"]).wait_until_ended() != 0
