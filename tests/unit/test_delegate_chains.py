"""Chains: how they are put together, what YAML may say, and what is refused before anything starts."""

import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import delegate_function
from delegate_function import (
    BaseDelegate,
    ConfigurationError,
    DelegateChain,
    DelegateGenerator,
    LateBoundYAMLDelegate,
    SandboxDelegate,
    SlurmDelegate,
    SubprocessDelegate,
    TestClass,
    TrivialDelegate,
    YAMLDelegate,
    generator,
    shell_hook,
)

CHAIN = """
version: 0.1
sequence:
  - type: TrivialDelegate
  - type: SlurmDelegate
    partition: $WHERE
    time: 5
  - type: SandboxDelegate
    seconds: 30
"""
HOPS = [
    {"type": "slurm", "options": {"partition": "normal", "time": "5"}},
    {"type": "sandbox", "profile": "default", "seconds": 30},
]


def described(*items: str) -> str:
    return "version: 0.1\nsequence:\n" + "".join(f"  - {{{item}}}\n" for item in items)


def test_every_public_name_can_be_imported() -> None:
    for name in delegate_function.__all__:
        assert getattr(delegate_function, name).__name__ == name


def test_a_hop_starts_without_what_only_the_ends_need() -> None:
    program = "import sys, delegate_function.hop; print(*sys.modules)"
    listed = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(Path(delegate_function.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"pickle", "cloudpickle", "yaml", "_pickle", "delegate_function.inside"} & set(listed)


def test_a_chain_is_outermost_first_and_has_a_name() -> None:
    factory = DelegateChain(TrivialDelegate, SlurmDelegate, SandboxDelegate)
    assert [hop["type"] for hop in factory().compile()] == ["slurm", "sandbox"]
    assert factory.__name__ == factory.pytest_name == "TrivialDelegate_to_SlurmDelegate_to_SandboxDelegate"


def test_a_chains_arguments_go_to_each_factory() -> None:
    chain = DelegateChain(SlurmDelegate, SlurmDelegate, partition="shared")(time=3)
    assert [hop["options"] for hop in chain.compile()] == [{"partition": "shared", "time": "3"}] * 2
    with pytest.raises(ConfigurationError, match=r"TrivialDelegate: .*partition"):
        DelegateChain(SlurmDelegate, TrivialDelegate, partition="shared")()


def test_a_sub_delegate_can_be_set_later() -> None:
    delegate = SlurmDelegate()
    delegate.set_subdelegate(SandboxDelegate(profile="long"))
    assert delegate.compile()[1] == {"type": "sandbox", "profile": "long"}


def test_interactive_spreads_outwards() -> None:
    chain = DelegateChain(TrivialDelegate, TrivialDelegate)(interactive=True)
    assert chain.interactive
    assert chain.invoke(TestClass(), "hello") == os.getpid()
    assert DelegateChain(TrivialDelegate, SlurmDelegate)(SubprocessDelegate(interactive=True)).interactive
    assert not DelegateChain(TrivialDelegate)(SubprocessDelegate()).interactive


def test_nothing_starts_from_inside_a_sandbox() -> None:
    with pytest.raises(ConfigurationError, match="comes last"):
        SandboxDelegate(SubprocessDelegate()).compile()


@pytest.mark.parametrize(
    "options",
    [
        {"profile": "--privileged"},
        {"profile": "../x"},
        {"profile": "a\nb"},
        {"profile": ""},
        {"seconds": 0},
        {"seconds": "1"},
        {"seconds": float("nan")},
        {"memory_mb": -1},
        {"memory_mb": 1.5},
        {"memory_mb": True},
    ],
)
def test_a_sandbox_is_asked_for_sensible_things_only(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        SandboxDelegate(**options)


# YAML.


def test_yaml_describes_a_chain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WHERE", "normal")
    file = tmp_path / "chain.yaml"
    file.write_text(CHAIN)
    assert DelegateGenerator(yaml=CHAIN).compile() == HOPS
    assert DelegateGenerator(filename=file).compile() == HOPS
    assert YAMLDelegate(str(file)).compile() == HOPS
    monkeypatch.setenv("DELEGATE_FUNCTION_CONFIG", str(file))
    assert LateBoundYAMLDelegate().compile() == HOPS
    assert DelegateGenerator(yaml=described("type: LateBoundYAMLDelegate")).compile() == HOPS


def test_yaml_knows_every_delegate_with_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHO", "me")
    chain = DelegateGenerator(
        yaml=described(
            "type: TemporaryDirectoryDelegate",
            "type: SudoDelegate, user: $WHO, sudo_args: [-H]",
            "type: SSHDelegate, user: $WHO, host: far.example, ssh_options: [-i, $WHO.key], interactive: true",
            "type: DockerDelegate, docker_image: image, docker_cmd_line_args: [--init], temporary_file_root: /tmp",
            "type: SuDockerDelegate, docker_image: image, docker_user: $WHO, debug_pre_hook: SHELL",
            "type: SubprocessDelegate, delegate_executable_path: /bin/hop",
            "type: LateBoundYAMLDelegate",
        )
    ).compile()
    hook = chain.pop(5)
    assert (hook["type"], hook["name"], hook["call"]) == ("hook", "SuDockerDelegate", "SHELL")
    assert hook["command"] == "sudo -n -u me -- docker run --rm -i -- image python3 -I -m delegate_function.hop"
    assert chain == [
        {"type": "temporary directory"},
        {"type": "sudo", "user": "me", "options": ["-H"]},
        {"type": "terminal"},
        {"type": "ssh", "user": "me", "host": "far.example", "options": ["-i", "me.key"]},
        {"type": "docker", "image": "image", "options": ["--init"]},
        {"type": "docker", "image": "image", "sudo": {"type": "sudo", "user": "me"}},
        {"type": "subprocess", "executable": "/bin/hop"},
        {"type": "late"},
    ]


def test_descriptions_that_name_themselves_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "chain.yaml"
    file.write_text(described(f"type: YAMLDelegate, configuration_file: {file}"))
    with pytest.raises(ConfigurationError, match="names itself"):
        YAMLDelegate(file)
    file.write_text(described("type: LateBoundYAMLDelegate"))
    monkeypatch.setenv("DELEGATE_FUNCTION_CONFIG", str(file))
    with pytest.raises(ConfigurationError, match="by itself"):
        LateBoundYAMLDelegate().invoke(TestClass(), "hello")


def test_a_generator_is_a_delegate_whose_values_come_back() -> None:
    generated = DelegateGenerator(yaml=described("type: SubprocessDelegate", "type: SubprocessDelegate"))
    thing = TestClass()
    assert generated.invoke(thing, "hello") != os.getpid()
    generated.invoke(thing, "set_value", 7)
    assert thing._value == 7


def test_a_late_bound_chain_needs_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELEGATE_FUNCTION_CONFIG", raising=False)
    with pytest.raises(ConfigurationError, match="DELEGATE_FUNCTION_CONFIG"):
        LateBoundYAMLDelegate().invoke(TestClass(), "hello")


@pytest.mark.parametrize("name", ["BaseDelegate", "DelegateGenerator", "os.system", "'SlurmDelegate '", "[]", "7"])
def test_other_names_are_illegal(name: str) -> None:
    with pytest.raises(ConfigurationError, match="Illegal delegate name"):
        DelegateGenerator(yaml=described(f"type: {name}"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "version: 0.1",
        "version: 0.1\nsequence: []",
        "version: 0.1\nsequence: TrivialDelegate",
        "version: 9.9\nsequence: [{type: TrivialDelegate}]",
        "version: 0.1\nsequence: [{type: TrivialDelegate}]\nmore: 1",
        "version: 0.1\nsequence: [{}]",
        "version: 0.1\nsequence: [{type: SlurmDelegate, nodes: 7}]",
        "version: 0.1\nsequence: [{type: TrivialDelegate, subdelegate: x}]",
        "version: 0.1\nsequence: [{type: TrivialDelegate, debug_pre_hook: [1, 2]}]",
        "version: 0.1\nsequence: [{type: TrivialDelegate",
        "version: 0.1\nsequence: [{type: !!python/name:os.system x}]",
        "version: 0.1\nsequence: !!python/object/apply:os.system ['touch stolen']",
        "!!python/object/new:type {args: [x, [], {}]}",
        "version: 0.1\nsequence: [&a {type: TrivialDelegate}, *a]",
        "version: 0.1\nsequence: " + "[" * 5000,
        "#" * 100_000,
    ],
)
def test_what_is_no_description_of_a_chain_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError):
        DelegateGenerator(yaml=text)
    assert not list(tmp_path.iterdir())


def test_an_alias_bomb_costs_nothing() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match="aliases"):
        generator.parse("\n".join(lines))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - started < 1
    assert peak < 5_000_000


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nothing"):
        YAMLDelegate(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigurationError, match="either"):
        DelegateGenerator()


# Hooks.


class Witness:
    """A hook that notes what it finds in its environment."""

    def __init__(self) -> None:
        self.found: list[tuple[str | None, ...]] = []

    def look(self, *names: str) -> None:
        self.found.append(tuple(os.environ.get(name) for name in names))


NAMES = ("DELEGATE_NAME", "DELEGATE_FUNCTION_COMMAND")


def hooked(kind: type[BaseDelegate], witness: Witness) -> BaseDelegate:
    return kind(debug_pre_hook=(witness, "look", NAMES, {}))


def test_a_hook_runs_before_its_delegate_when_it_is_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELEGATE_FUNCTION_DEBUG_ENABLED", "yes")
    witness = Witness()
    hooked(SubprocessDelegate, witness).invoke(TestClass(), "set_value", 1)
    assert witness.found == [("SubprocessDelegate", "delegate-function-run")]
    assert not set(NAMES) & set(os.environ)


def test_a_hook_that_is_not_enabled_says_so_and_the_call_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DELEGATE_FUNCTION_DEBUG_ENABLED", raising=False)
    witness = Witness()
    assert hooked(TrivialDelegate, witness).invoke(TestClass(), "hello") == os.getpid()
    assert not witness.found
    assert f"disabled on {os.uname().nodename}" in capsys.readouterr().err


def test_the_shell_hook_starts_the_users_shell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\necho "in $DELEGATE_NAME"\n')
    shell.chmod(0o755)
    monkeypatch.setenv("SHELL", str(shell))
    monkeypatch.setenv("DELEGATE_FUNCTION_DEBUG_ENABLED", "yes")
    TrivialDelegate(debug_pre_hook=shell_hook()).invoke(TestClass(), "set_value", 1)
    assert capfd.readouterr().out == "in TrivialDelegate\n"


def test_other_hooks_are_refused() -> None:
    for hook in ("PDB", (1, 2), (Witness(), 7, (), {})):
        with pytest.raises(ConfigurationError, match="debug_pre_hook"):
            TrivialDelegate(debug_pre_hook=hook)  # type: ignore[arg-type]


# The command.


def test_the_command_runs_a_call_that_lies_in_a_file(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_bytes(cloudpickle.dumps((TrivialDelegate(), TestClass(), "set_value", (5,), {})))
    argv = [sys.executable, "-m", "delegate_function", "--delegate-before", str(before), "--delegate-after", str(after)]
    subprocess.run(
        [*argv, "--log-level", "10"],
        env={"PYTHONPATH": str(Path(delegate_function.__file__).parents[1])},
        check=True,
        stdin=subprocess.DEVNULL,
    )
    value, raised, obj = cloudpickle.loads(after.read_bytes())
    assert (value, raised, obj._value) == (None, None, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after", "before"]


def test_the_command_serves_a_hop_when_it_is_given_nothing(tmp_path: Path) -> None:
    program = tmp_path / "delegate-function-run"
    source = Path(delegate_function.__file__).parents[1]
    program.write_text(
        f"#!{sys.executable}\nimport sys; sys.path.insert(0, {str(source)!r})\n"
        "from delegate_function.__main__ import main\nmain()\n"
    )
    program.chmod(0o755)
    assert SubprocessDelegate(delegate_executable_path=str(program)).invoke(TestClass(), "hello") != os.getpid()
