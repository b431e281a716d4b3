"""The image in which `build` compiles: a sandbox like any other, with compilers in it."""

import json
import platform
from collections.abc import Callable

import pytest

from agent import seccomp
from cfiddle_cluster.commands import docker_cli, run
from containers import Container, Start

COMPILE = """
import json, sys
from delegate_function import compilation

files = {{"main.cpp": {source!r}.encode()}}
command = ["make", "-R", "-f", compilation.RESOURCES + "/make/cfiddle.make", "BUILD=built", "CFIDDLE_VPATH=.",
           "CFIDDLE_INCLUDE=" + compilation.RESOURCES + "/include", "TARGET=" + {target!r}, "built/main.so"]
made = compilation.compile(files, ".", command, ["built/main.so", "built/main.s", "built/none.so"])
sizes = {{name: len(content) for name, content in made["files"].items()}}
print(json.dumps([made["status"], made["output"], sizes]))
"""


@pytest.fixture(scope="module")
def compiler(start_for_all: Start, tmp_path_factory: pytest.TempPathFactory) -> Container:
    allowed = tmp_path_factory.mktemp("seccomp") / "profile.json"
    allowed.write_text(json.dumps(seccomp.profile(platform.machine(), counters=False)))
    options = ["--entrypoint", "sleep", "--read-only", "--network", "none", "--cap-drop", "ALL", "--tmpfs", "/tmp:exec"]
    security = ["--security-opt", "no-new-privileges", "--security-opt", f"seccomp={allowed}"]
    return start_for_all("compiler", "1d", options=[*options, *security])


def _compile(compiler: Container, source: str) -> tuple[int, str, dict[str, int]]:
    program = COMPILE.format(source=source, target=f"{platform.machine()}-linux-gnu")
    status, output, sizes = json.loads(compiler.run("python3", "-I", "-c", program, timeout_s=60))
    return status, output, sizes


def test_cfiddle_s_makefile_compiles_and_links_with_what_a_sandbox_may(compiler: Container) -> None:
    source = "#include <cfiddle.hpp>\n#include <vector>\n"
    source += "int f() { start_measurement(); return std::vector<int>(9).size(); }\n"
    status, output, sizes = _compile(compiler, source)
    assert status == 0, output
    assert sorted(sizes) == ["built/main.s", "built/main.so"]
    assert min(sizes.values()) > 10_000
    assert compiler.run("sh", "-c", "ls -A /tmp") == "", "nothing is left"


@pytest.mark.parametrize("source", ['#include "/etc/shadow"', 'asm(".incbin \\"/etc/shadow\\"");'])
def test_source_reads_no_file_that_the_sandbox_s_user_may_not(compiler: Container, source: str) -> None:
    status, output, sizes = _compile(compiler, source + "\n")
    assert status != 0
    assert "/etc/shadow" in output
    assert "built/main.so" not in sizes


def test_it_is_the_sandbox_with_compilers_and_nothing_else(compiler: Container, image: Callable[[str], str]) -> None:
    def inspect(name: str, form: str) -> str:
        return run([docker_cli(), "image", "inspect", "--format", form, image(name)], timeout_s=30)

    ours, sandbox = (json.loads(inspect(name, "{{json .RootFS.Layers}}")) for name in ("compiler", "sandbox"))
    assert ours[: len(sandbox)] == sandbox
    settings = "{{.Config.User}} {{json .Config.Cmd}} {{json .Config.Env}}"
    assert inspect("compiler", settings) == inspect("sandbox", settings)
    for name in ("pip", "curl", "wget", "ssh", "docker", "srun", "git"):
        assert compiler.run("sh", "-c", f"command -v {name} || true") == "", name
    assert compiler.run("find", "/usr", "/opt", "-xdev", "-type", "f", "-perm", "/6000") == ""


def test_its_compilers_are_those_of_the_users_node(compiler: Container, image: Callable[[str], str]) -> None:
    for name in ("gcc", "g++", "make", "as", "ld"):
        argv = [docker_cli(), "run", "--rm", "--label", "cfiddle.cluster=cfiddle", "--entrypoint", name, image("user")]
        assert run([*argv, "--version"], timeout_s=60) == compiler.run(name, "--version"), name


def test_a_worker_s_disk_pays_no_more_than_it_says(image: Callable[[str], str]) -> None:
    def size_mb(name: str) -> float:
        return int(run([docker_cli(), "image", "inspect", "--format", "{{.Size}}", image(name)], timeout_s=30)) / 1e6

    assert size_mb("compiler") - size_mb("sandbox") < 300
