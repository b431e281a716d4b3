"""Which registry is used, with which account, and what its refusals mean."""

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cfiddle_cluster import config, registry
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.registry import Registry, RegistryUnreachable
from cfiddle_cluster.state import State

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "correct-horse-battery"


@pytest.fixture
def settings() -> config.Config:
    return replace(
        config.load(ROOT), head_addr="192.0.2.1", registry_port=5000, user_registry_port=5001, dockerhub_username=""
    )


@pytest.fixture
def state(tmp_path: Path) -> State:
    (tmp_path / "secrets").mkdir()
    found = State(tmp_path)
    found.write("secrets/registry-password", PASSWORD)
    found.write("ca.crt", "-----BEGIN CERTIFICATE-----\n")
    return found


def test_own_registry_is_on_the_head(settings: config.Config, state: State) -> None:
    own = registry.of(settings, state)
    assert own.repository("agent") == "192.0.2.1:5000/cfiddle-agent"
    assert (own.username, own.password) == ("cfiddle", PASSWORD)


@pytest.mark.parametrize(
    ("account", "repository", "username"),
    [
        ("teacher", "docker.io/teacher/cfiddle-agent", "teacher"),
        ("registry.example:5443/teacher", "registry.example:5443/teacher/cfiddle-agent", "teacher"),
    ],
)
def test_account_elsewhere(
    settings: config.Config,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
    account: str,
    repository: str,
    username: str,
) -> None:
    monkeypatch.setenv("DOCKERHUB_TOKEN", PASSWORD)
    found = registry.of(replace(settings, dockerhub_username=account), state)
    assert found.repository("agent") == repository
    assert found.username == username


def test_token_is_needed_once_and_kept_for_root_alone(
    settings: config.Config, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, dockerhub_username="teacher")
    monkeypatch.setenv("DOCKERHUB_TOKEN", PASSWORD)
    registry.of(settings, state)
    monkeypatch.delenv("DOCKERHUB_TOKEN")
    assert registry.of(settings, state).password == PASSWORD
    assert state.path("secrets/dockerhub-token").stat().st_mode & 0o777 == 0o600


def test_missing_token_says_how_to_give_it(
    settings: config.Config, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DOCKERHUB_TOKEN", raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    with pytest.raises(ClusterError, match=r"no password for teacher.*\n.*DOCKERHUB_TOKEN"):
        registry.of(replace(settings, dockerhub_username="teacher"), state)


def test_password_is_not_shown() -> None:
    assert PASSWORD not in repr(Registry("192.0.2.1:5000", "", "cfiddle", PASSWORD))


def test_docker_config_knows_this_account_alone_and_is_roots(settings: config.Config, state: State) -> None:
    directory = registry.docker_config(settings, state)
    content = json.loads((directory / "config.json").read_text())
    assert list(content["auths"]) == ["192.0.2.1:5000"]
    assert base64.b64decode(content["auths"]["192.0.2.1:5000"]["auth"]).decode() == f"cfiddle:{PASSWORD}"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "config.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "complaint",
    [
        "login attempt to https://192.0.2.1:5000/v2/ failed with status: 401 Unauthorized",
        "unauthorized: incorrect username or password",
        "denied: requested access to the resource is denied",
        "no basic auth credentials",
    ],
)
def test_refused_password_is_one_clear_message(complaint: str) -> None:
    error = Registry("192.0.2.1:5000", "", "cfiddle", PASSWORD).explain(complaint)
    assert not isinstance(error, RegistryUnreachable)
    assert error.message == "192.0.2.1:5000 refuses the password of cfiddle"
    assert error.remedy


@pytest.mark.parametrize(
    "complaint",
    [
        'Get "https://192.0.2.1:5000/v2/": dial tcp 192.0.2.1:5000: connect: connection refused',
        'Get "https://192.0.2.1:5000/v2/": x509: certificate signed by unknown authority',
    ],
)
def test_registry_that_cannot_be_used_is_told_from_a_refusal(complaint: str) -> None:
    error = Registry("192.0.2.1:5000", "", "cfiddle", PASSWORD).explain(complaint)
    assert isinstance(error, RegistryUnreachable)
    assert complaint in error.message


def test_every_machine_learns_the_authority(
    settings: config.Config, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts: list[tuple[str, str, list[str]]] = []

    def script(machine: Machine, text: str, args: Sequence[str] = (), *, timeout_s: float) -> str:
        scripts.append((machine.name, text, list(args)))
        return ""

    monkeypatch.setattr(Machine, "script", script)
    workers = [Machine(name=name, addr="192.0.2.11", roles=frozenset({"worker"})) for name in ("c1", "c2")]
    registry.ensure_trust(settings, state, workers)
    assert sorted(name for name, _, _ in scripts) == ["c1", "c2"]
    assert all("-----BEGIN CERTIFICATE-----" in text for _, text, _ in scripts)
    assert all(arguments == ["192.0.2.1:5000", "192.0.2.1:5001"] for _, _, arguments in scripts)


@pytest.mark.parametrize("others", [[], ["registry.example:5443"]], ids=["nobody else's", "somebody else's, too"])
def test_trust_leaves_the_certificates_of_others_and_no_directory_that_was_not_there(
    settings: config.Config, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: list[str]
) -> None:
    certificates = tmp_path / "certs.d"
    monkeypatch.setattr(registry, "CERTIFICATES", certificates)
    for other in others:
        (certificates / other).mkdir(parents=True)
    head = Machine(name="head", addr="192.0.2.1", roles=frozenset({"head"}))
    registry.ensure_trust(settings, state, [head])
    authority = (certificates / "192.0.2.1:5001" / "ca.crt").read_text()
    assert authority == state.path("ca.crt").read_text()
    for _ in range(2):
        registry.remove_trust(settings, [head])
        assert [path.name for path in certificates.glob("*")] == others
        assert certificates.exists() == bool(others)
