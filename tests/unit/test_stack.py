"""The stack file, what fills it in, and when a deploy lets the workers run empty."""

import itertools
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from docker.errors import APIError

import samples
from agent.container_policy import Buffer
from cfiddle_cluster import stack
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.slurm import Node

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
REFERENCES = {name: f"10.0.0.1:5000/cfiddle-{name}@sha256:{name}" for name in stack.IMAGES}
NAMES = {
    f"{kind}_{name.upper().replace('-', '_').replace('.', '_')}": f"slurm-stack_{name}-0123456789ab"
    for kind, names in (("SECRET", stack.SECRETS), ("CONFIG", (*stack.CONFIGS, *stack.CERTIFICATES)))
    for name in names
}


def values(buffer: Buffer | None = None, **settings: str) -> dict[str, str]:
    return stack._values(samples.config(ROOT, **settings), REFERENCES, NAMES, buffer or Buffer())


def definition(service: str) -> str:
    return f"DEFINITION_{service.upper().replace('-', '_')}"


def sources(service: str) -> list[str]:
    return [mount if isinstance(mount, str) else mount["type"] for mount in SERVICES[service].get("volumes", [])]


def test_every_name_in_the_stack_file_has_a_value_and_no_value_is_unused() -> None:
    files = (ROOT / "docker-compose.yml", ROOT / "conf/ssh-port.yml")
    text = "\n".join(line for file in files for line in file.read_text().splitlines() if line.lstrip()[:1] != "#")
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(values())


def test_services_are_those_of_the_cluster() -> None:
    assert set(SERVICES) == {"mysql", "slurmdbd", "slurmctld", "slurmd", "agent", "user-registry", "userhost"}


@pytest.mark.parametrize("name", SERVICES)
def test_service_needs_no_kernel_with_ipvs_and_no_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["deploy"]["endpoint_mode"] == "dnsrr"
    assert all(port["mode"] == "host" for port in service.get("ports", []))
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "security_opt"} & set(service)
    assert service["deploy"]["labels"]["cfiddle.cluster"] == service["labels"]["cfiddle.cluster"] == "cfiddle"
    assert service["logging"]["options"]["max-size"]


def test_only_the_agent_has_the_engine_s_socket_and_it_cannot_write_to_homes() -> None:
    holders = {name for name in SERVICES if any("docker.sock" in mount for mount in sources(name))}
    assert holders == {"agent"}
    assert [mount for mount in sources("agent") if mount.startswith("home:")] == ["home:/home:ro"]


def test_the_database_is_reached_from_slurmdbd_alone() -> None:
    assert {name for name, service in SERVICES.items() if "database" in service["networks"]} == {"mysql", "slurmdbd"}
    assert SERVICES["mysql"]["networks"] == ["database"]


def test_secrets_are_readable_for_those_alone_who_need_them() -> None:
    held = {
        (name, secret["source"], secret["uid"])
        for name, service in SERVICES.items()
        for secret in service.get("secrets", [])
        if secret["mode"] == 0o400
    }
    assert held == {
        ("mysql", "database-password", "803"),
        ("slurmdbd", "database-password", "0"),
        ("userhost", "jupyter-token", "1000"),
        ("agent", "user-registry-password", "0"),
        ("user-registry", "user-registry-password", "804"),
        ("user-registry", "registry-key", "804"),
        *((name, "ssh-authority", "0") for name in ("slurmd", "userhost")),
        *((name, "munge-key", "801") for name in ("slurmdbd", "slurmctld", "slurmd", "userhost")),
    }


def test_state_is_on_volumes_and_grants_are_written_by_slurmd_alone() -> None:
    assert "mysql:/var/lib/mysql" in sources("mysql")
    assert "slurm:/var/lib/slurm" in sources("slurmctld")
    assert "grants:/run/cfiddle-grants:ro" in sources("agent")
    assert "agent-socket:/run/cfiddle-agent:ro" in sources("slurmd")
    assert all("cfiddle.cluster" in volume["labels"] for volume in COMPOSE["volumes"].values())


@pytest.mark.parametrize("name", SERVICES)
def test_image_of_a_service_has_a_health_check(name: str) -> None:
    image = SERVICES[name]["image"].removeprefix("${IMAGE_").removesuffix("}").lower()
    assert "HEALTHCHECK" in (ROOT / "images" / image / "Dockerfile").read_text()


def test_other_homes_are_another_volume() -> None:
    bind, nfs = values(HOME_STORAGE="bind"), values(HOME_STORAGE="nfs", HOME_SERVER="10.0.0.9")
    assert bind["HOME_TYPE"] == "none"
    assert nfs["HOME_TYPE"] == "nfs"
    assert bind["HOME_VOLUME"] != nfs["HOME_VOLUME"]


def test_simulated_workers_say_what_config_sh_says_and_real_ones_what_they_have() -> None:
    assert values(LOCAL_WORKER_CPUS="8", LOCAL_WORKER_MEMORY_MB="2000")["SLURMD_CPUS"] == "8"
    assert values()["SLURMD_CPUS"] == ""
    assert values(LOCAL_WORKER_CPUS="8", WORKER_ADDRS="10.0.0.2")["SLURMD_CPUS"] == ""


@pytest.mark.parametrize("patience", [1, 12])
def test_no_service_is_replaced_because_it_starts_slowly(monkeypatch: pytest.MonkeyPatch, patience: float) -> None:
    monkeypatch.setattr("cfiddle_cluster.services.PATIENCE", patience)
    services = stack._compose(samples.config(ROOT))["services"]
    checks = [service["healthcheck"] for service in services.values()]
    assert {check["start_period"] for check in checks} == {f"{300 * patience}s"}
    assert {check.get("interval") for check in checks} == {"60s" if patience == 12 else None}
    told = {service.get("environment", {}).get("CFIDDLE_PATIENCE") for service in services.values()}
    assert told == {"12" if patience == 12 else None}, "what waits within the containers"


@pytest.mark.parametrize(("head_gib", "gigabytes"), [(1, "1"), (4, "3"), (23.4, "17"), (512, "384")])
def test_users_node_leaves_a_quarter_of_the_head_s_memory(
    monkeypatch: pytest.MonkeyPatch, head_gib: float, gigabytes: str
) -> None:
    monkeypatch.setattr(stack, "_memory_bytes", lambda: int(head_gib * 2**30))
    assert values()["USERHOST_MEMORY_GB"] == gigabytes
    assert SERVICES["userhost"]["deploy"]["resources"]["limits"] == {"memory": "${USERHOST_MEMORY_GB}G"}


def test_what_the_policy_keeps_free_is_told_to_slurmd() -> None:
    free = values(Buffer(cpus=2, memory_mb=1024))
    assert (free["SLURMD_BUFFER_CPUS"], free["SLURMD_BUFFER_MEMORY_MB"]) == ("2", "1024")


@pytest.mark.parametrize(
    ("changed", "changes"),
    [
        ({"IMAGE_CLUSTER": "new"}, {"slurmdbd", "slurmctld", "slurmd"}),
        ({"IMAGE_AGENT": "new"}, {"agent"}),
        ({"IMAGE_SANDBOX": "new"}, {"agent"}),
        ({"CONFIG_POLICY_YAML": "new"}, {"agent"}),
        ({"SECRET_MUNGE_KEY": "new"}, {"slurmdbd", "slurmctld", "slurmd", "userhost"}),
        ({"IMAGE_USER": "new", "CONFIG_SLURM_CONF": "new", "JUPYTER_PORT": "1"}, {"userhost", "slurmctld"}),
        ({"IMAGE_MYSQL": "new", "IMAGE_REGISTRY": "new"}, {"mysql", "user-registry"}),
    ],
)
def test_definition_of_a_service_changes_with_what_it_runs_from(changed: dict[str, str], changes: set[str]) -> None:
    before = stack.definitions(COMPOSE, values())
    after = stack.definitions(COMPOSE, values() | changed)
    assert {name for name in SERVICES if before[definition(name)] != after[definition(name)]} == changes


class Deployed:
    """A stack that runs, and what a deploy does to it, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, labels: dict[str, str]) -> None:
        self.events: list[str] = []
        self.services: dict[str, Any] = {}
        self.nodes = {
            "c1": Node("c1", "allocated", True),
            "c2": Node("c2", "drained", True, "disk is broken"),
            "c3": Node("c3", "down", False, "Not responding"),
        }
        self.is_answering = True
        self.tasks: list[dict[str, Any]] = [{}]
        found = [
            SimpleNamespace(name=f"slurm-stack_{name}", attrs={"Spec": {"Labels": {"cfiddle.definition": label}}})
            for name, label in labels.items()
        ]
        ports = {"EndpointSpec": {"Ports": [{"PublishedPort": 8888}]}}
        found.append(SimpleNamespace(name="slurm-stack_userhost", attrs={"Spec": {"Labels": {}, **ports}}))
        monkeypatch.setattr(stack, "services", lambda: found)
        monkeypatch.setattr(stack, "running_tasks", lambda _service: self.tasks)
        monkeypatch.setattr(stack, "_ensure_secrets", lambda _state: {})
        monkeypatch.setattr(stack, "_ensure_configs", lambda _root, _state: NAMES)
        monkeypatch.setattr(stack, "remove_unused", lambda _values: self.events.append("tidy"))
        monkeypatch.setattr(stack.registry, "docker_config", lambda _config, _state: Path("/account"))
        monkeypatch.setattr(stack, "run", self.run)
        monkeypatch.setattr(stack, "wait_until_healthy", lambda **_: self.events.append("healthy"))
        monkeypatch.setattr(stack.slurm, "nodes", lambda: self.nodes)
        monkeypatch.setattr(stack.slurm, "is_answering", lambda: self.is_answering)
        monkeypatch.setattr(stack.slurm, "drain", self.drain)
        monkeypatch.setattr(stack.slurm, "resume", lambda names: self.events.append(f"resume {' '.join(names)}"))
        monkeypatch.setattr(stack.slurm, "wait_until_empty", lambda _names, **_: self.events.append("empty"))

    def run(self, argv: list[str], input: str, **_: Any) -> str:
        assert argv[1:3] == ["--config", "/account"]
        assert ("--compose-file", "-") in itertools.pairwise(argv)
        self.events.append(" ".join(argv[3:5]))
        self.services = json.loads(input)["services"]
        return ""

    def drain(self, names: list[str], reason: str) -> None:
        self.events.append(f"drain {' '.join(names)}")
        for name in names:
            self.nodes[name] = Node(name, "drained", True, reason)

    def deploy(self, **settings: str) -> list[str]:
        state: Any = None
        stack.deploy(samples.config(ROOT, **settings), state, REFERENCES, self.events.append)
        return self.events


def labels() -> dict[str, str]:
    return {name: values()[f"DEFINITION_{name.upper()}"] for name in stack.WORKER_SERVICES}


def test_workers_run_empty_before_what_jobs_run_in_changes_and_take_jobs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Deployed(monkeypatch, {**labels(), "slurmd": "older"}).deploy()
    assert events == ["drain c1", "empty", "stack deploy", "healthy", "resume c1", "tidy"]


def test_nothing_is_drained_when_nothing_of_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Deployed(monkeypatch, labels()).deploy() == ["stack deploy", "healthy", "resume ", "tidy"]


def test_ssh_is_published_where_config_sh_has_a_port_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = Deployed(monkeypatch, labels())
    deployed.deploy()
    assert deployed.services == stack._compose(samples.config(ROOT))["services"]
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    deployed.deploy(SSH_PORT=port)
    assert [published["target"] for published in deployed.services["userhost"]["ports"]] == [8888, 22]
    assert values(SSH_PORT=port)["DEFINITION_USERHOST"] != values()["DEFINITION_USERHOST"]


def test_services_that_are_not_named_are_not_told_to_swarm(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = Deployed(monkeypatch, labels())
    state: Any = None
    stack.put(samples.config(ROOT), state, values(), ["slurmctld"])
    assert deployed.services == {"slurmctld": stack._compose(samples.config(ROOT))["services"]["slurmctld"]}
    assert deployed.events == ["stack deploy"]


def test_changed_are_services_with_another_definition_and_those_that_are_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Deployed(monkeypatch, {**labels(), "agent": "older"})
    assert stack.changed(values()) == {"agent", *stack.SERVICES} - {"slurmd"}


def test_slurm_s_parts_are_replaced_in_the_order_that_slurm_allows() -> None:
    order = [stack.SERVICES.index(name) for name in ("slurmdbd", "slurmctld", "slurmd", "userhost")]
    assert order == sorted(order)
    assert set(stack.SERVICES) == set(SERVICES)


def test_nodes_that_an_interrupted_deploy_drained_take_jobs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = Deployed(monkeypatch, labels())
    deployed.nodes["c1"] = Node("c1", "drained", True, stack.DRAIN_REASON)
    assert "resume c1" in deployed.deploy()


def test_workers_take_jobs_again_when_the_wait_for_jobs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = Deployed(monkeypatch, {**labels(), "slurmd": "older"})

    def given_up(_names: object, say: Callable[[str], None], **_: object) -> None:
        say("7 (ada)")
        raise KeyboardInterrupt

    monkeypatch.setattr(stack.slurm, "wait_until_empty", given_up)
    with pytest.raises(KeyboardInterrupt):
        deployed.deploy()
    assert deployed.events == ["drain c1", "7 (ada)", "resume c1"]


def test_workers_are_not_replaced_while_nobody_knows_whether_jobs_run(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = Deployed(monkeypatch, {**labels(), "agent": "older"})
    deployed.is_answering = False
    with pytest.raises(ClusterError, match="agent would be replaced"):
        deployed.deploy()
    assert deployed.events == []
    deployed.tasks = []
    assert "stack deploy" in deployed.deploy(), "where no slurmd runs, no job does"


class Kept:
    """Swarm's secrets and configurations."""

    def __init__(self) -> None:
        self.there: dict[str, dict[str, Any]] = {}
        self.in_use: set[str] = set()

    def create_secret(self, name: str, data: bytes, labels: dict[str, str]) -> None:
        assert data
        self.there[name] = {"ID": name, "Spec": {"Name": name, "Labels": labels}}

    create_config = create_secret

    def secrets(self, filters: dict[str, str] | None = None) -> list[dict[str, Any]]:
        wanted = (filters or {}).get("label", "")
        return [
            item
            for item in self.there.values()
            if not wanted or wanted in [f"{key}={value}" for key, value in item["Spec"]["Labels"].items()]
        ]

    def configs(self, filters: dict[str, str] | None = None) -> list[dict[str, Any]]:
        return [] if filters else self.secrets()

    def remove_secret(self, identity: str) -> None:
        if identity in self.in_use:
            response: Any = SimpleNamespace(status_code=400)
            raise APIError("in use", response=response)
        del self.there[identity]

    remove_config = remove_secret


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    found = Kept()
    monkeypatch.setattr(stack.engine, "client", lambda: SimpleNamespace(api=found))
    return found


def test_a_secret_is_made_once_and_a_changed_one_beside_it_until_the_old_one_is_unused(
    kept: Kept, tmp_path: Path
) -> None:
    content = dict.fromkeys(stack.SECRETS, "0123456789")
    (tmp_path / "registry.key").write_text("0123456789")
    state: Any = SimpleNamespace(secret=content.__getitem__, path=tmp_path.__truediv__)
    first = stack._ensure_secrets(state)
    assert stack._ensure_secrets(state) == first
    assert len(kept.there) == len(stack.SECRETS)
    assert not any("0123456789" in name for name in kept.there)
    kept.create_secret("of-the-registry", b"x", {"cfiddle.cluster": "cfiddle"})

    content["munge-key"] = "another"
    second = stack._ensure_secrets(state)
    assert set(first.values()) | set(second.values()) <= set(kept.there)
    kept.in_use = {first["SECRET_MUNGE_KEY"]}
    stack.remove_unused(second)
    assert first["SECRET_MUNGE_KEY"] in kept.there
    kept.in_use = set()
    stack.remove_unused(second)
    assert set(kept.there) == {*second.values(), "of-the-registry"}


def test_a_changed_configuration_has_another_name(kept: Kept, tmp_path: Path) -> None:
    for path in stack.CONFIGS.values():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("a setting\n")
    for name in stack.CERTIFICATES:
        (tmp_path / name).write_text("a certificate\n")
    state: Any = SimpleNamespace(path=tmp_path.__truediv__)
    first = stack._ensure_configs(tmp_path, state)
    assert stack._ensure_configs(tmp_path, state) == first
    (tmp_path / "conf" / "slurm.conf").write_text("another setting\n")
    second = stack._ensure_configs(tmp_path, state)
    assert {name for name in first if first[name] != second[name]} == {"CONFIG_SLURM_CONF"}


def test_wrong_policy_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deployed = Deployed(monkeypatch, {**labels(), "agent": "older"})
    (tmp_path / "policy.yaml").write_text("version: 1\nprofile: {}\n")
    state: Any = None
    with pytest.raises(ClusterError, match="profile"):
        stack.deploy(samples.config(tmp_path), state, REFERENCES, print)
    assert deployed.events == []


def test_port_of_somebody_else_is_refused_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deployed = Deployed(monkeypatch, labels())
    state: Any = None
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"port {port}"):
            stack.deploy(samples.config(ROOT, JUPYTER_PORT=str(port)), state, REFERENCES, print)
    assert deployed.events == []
