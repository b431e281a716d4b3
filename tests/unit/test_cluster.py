"""The orchestration: which steps run in which order, what is remembered of the workers, what is refused untouched."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cfiddle_cluster import cluster as cluster_module
from cfiddle_cluster.calibration import Difference, Outcome
from cfiddle_cluster.cluster import Cluster
from cfiddle_cluster.config import Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine, Silent
from cfiddle_cluster.state import State
from cfiddle_cluster.upgrade import Patience
from samples import config, machine


class World:
    """Everything that a cluster drives, and what was done with it, in order."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.did: list[str] = []
        self.failing: dict[str, BaseException] = {}
        self.outcomes: list[Outcome] = []
        self.changed: list[str] = []
        self.there = ["c1", "c2"]
        self.silent: set[str] = set()
        self.cut_off: set[str] = set()
        self.leaving: list[str] = []
        self.without_firewall: set[str] = set()
        self.is_under_way = False
        self.needs_debian = False
        self.patience: list[Patience] = []
        self.state = State(tmp_path / f"state-of-{tmp_path.name}")
        self.state.directory.mkdir()
        self.settings = config(tmp_path)
        self._monkeypatch = monkeypatch
        for module, names in {
            "packages": "ensure_root ensure_commands ensure_engine ensure_packages",
            "homes": "ensure_root ensure_homes purge",
            "swarm": "refuse_other_address ensure_swarm ensure_joined ensure_labels unlabel_worker remove_node leave",
            "registry": "ensure_registry remove_registry remove_trust",
            "users": "ensure_accounts ensure_associations",
            "stack": "deploy remove remove_volumes",
            "slurm": "drain wait_until_empty delete_node set_down ensure_share",
            "images": "remove_images",
            "user_containers": "stop remove_all",
            "distribution": "remove_outdated",
        }.items():
            for name in names.split():
                self._replace(module, name, self._note(f"{module}.{name}"))
        self._replace("swarm", "release", lambda _state, found: self.did.append(f"swarm.release {found.addr}"))
        self._replace("readiness", "wait_until_ready", self._note("readiness.wait_until_ready", {"c1": "identity"}))
        self._replace("calibration", "ensure_calibrated", self._note("calibration.ensure_calibrated", self.outcomes))
        self._replace("calibration", "calibrate", self._note("calibration.calibrate", self.outcomes))
        self._replace("tuning", "tune", self._note("tuning.tune", self.changed))
        self._replace("tuning", "undo", self._note("tuning.undo", self.changed))
        self._replace("slurm", "is_answering", lambda: True)
        self._replace("images", "needs_debian", lambda _config: self.needs_debian)
        self._replace("images", "ensure_one_python", lambda _references, _state: None)
        self._replace("images", "build", self._note("images.build", {"machine": "m:1", "registry": "r:1"}))
        self._replace("distribution", "distribute", self._note("distribution.distribute", {}))
        self._replace("upgrade", "roll_out", self._roll_out)
        self._replace("upgrade", "is_under_way", lambda _state: self.is_under_way)
        self._replace("upgrade", "forget", self._note("upgrade.forget"))
        self._replace("simulated", "existing", lambda: [name for name in self.there if name.startswith("c")])
        self._replace("simulated", "workers", lambda _state: [machine(name, simulated=True) for name in self.there])
        self._replace("simulated", "ensure_machines", self._ensure_machines)
        self._replace("simulated", "remove_machine", self._remove_machine)
        self._replace("simulated", "remove_all", self._note("simulated.remove_all"))
        for name in ("examine", "refuse_if_state_exists", "restore_state", "restore_services", "create"):
            self._replace("backup", name, self._note(f"backup.{name}"))
        ada = SimpleNamespace(name="ada", uid=2003)
        self._replace("users", "add", self._note("users.add", ada))
        self._replace("users", "import_users", self._note("users.import_users", ([ada], [ada, ada])))
        self._replace("users", "remove", self._note("users.remove"))
        self._replace("machines", "named", self._named)
        self._replace("machines", "reached", self._reached)
        self._replace("machines", "answering", lambda machines: self._reached(machines)[0])
        self._replace("machines", "real_worker", lambda _config, _state, addr: machine(addr, addr=addr))
        self._replace("machines", "on_each", lambda machines, action: [action(found) for found in machines])
        self._replace("swarm", "worker_names", lambda: list(self.there))
        self._replace("swarm", "former_worker_names", lambda: self.leaving)
        self._replace("swarm", "is_ready", lambda name: name in self.cut_off)
        self._replace("swarm", "address_of", lambda name: f"addr-{name}")
        self._replace("services", "container", lambda _service: object())
        self._replace("services", "references", set)
        self._replace("services", "machines_of", lambda _service: set())
        self._replace("engine", "is_running", lambda: True)
        self._replace("userhost", "url", lambda _config, _state: "http://localhost:8888/?token=abc")
        monkeypatch.setattr(State, "ensure", self._note("state.ensure"))
        (tmp_path / "install_docker.sh").write_text("install")
        monkeypatch.setattr(Machine, "script", lambda found, text, **_: self.did.append(f"{text} {found.addr}"))

    def _replace(self, module: str, name: str, substitute: Any) -> None:
        self._monkeypatch.setattr(f"cfiddle_cluster.cluster.{module}.{name}", substitute)

    def _note(self, what: str, result: Any = None) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            words = [str(arg) for arg in args if isinstance(arg, str | list)]
            words += [f"{name}={value}" for name, value in kwargs.items() if name in ("purge", "delete_home")]
            self.did.append(" ".join([what, *words]))
            if what in self.failing:
                raise self.failing[what]
            return result

        return noted

    def _ensure_machines(self, _config: Any, _state: State, names: list[str], image: str, _report: Any) -> None:
        self.did.append(f"simulated.ensure_machines {','.join(names)} {image}")
        self.there = list(names)

    def _remove_machine(self, name: str) -> None:
        self.did.append(f"simulated.remove_machine {name}")
        self.there.remove(name)

    def _roll_out(self, *args: Any) -> None:
        self.did.append("upgrade.roll_out")
        self.patience += [arg for arg in args if isinstance(arg, Patience)]

    def _reached(self, machines: Iterable[Machine]) -> tuple[list[Machine], list[Silent]]:
        machines = list(machines)
        silent = [found for found in machines if found.name in self.silent]
        said = "{} cannot be reached by SSH:\nNo route to host".format
        errors = [Silent(found, ClusterError(said(found.addr), f"ssh {found.addr}")) for found in silent]
        return [found for found in machines if found not in silent], errors

    def _named(self, machines: Iterable[Machine]) -> list[Machine]:
        found, silent = self._reached(machines)
        if silent:
            raise silent[0].error
        return found

    def cluster(self, **settings: str) -> Cluster:
        """Return the cluster of config.sh's defaults with some settings changed, as `Cluster.of` reads it."""
        configured = config(self.settings.root, **settings) if settings else self.settings
        configured = replace(configured, state_dir=self.state.directory)
        self._monkeypatch.setattr(cluster_module.config, "load", lambda _root: configured)
        return Cluster.of(configured.root)

    def verbs(self) -> list[str]:
        return [line.partition(" ")[0] for line in self.did]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("DOCKER_HOST", "")  # set by whatever is tested, and to be as it was afterwards
    found = World(tmp_path, monkeypatch)
    yield found
    Path(f"/run/{found.state.directory.name}.lock").unlink(missing_ok=True)


UP = [
    "packages.ensure_root",
    "packages.ensure_commands",
    "swarm.refuse_other_address",
    "state.ensure",
    "packages.ensure_engine",
    "images.build",
    "homes.ensure_root",
    "simulated.ensure_machines",
    "swarm.ensure_swarm",
    "swarm.ensure_joined",
    "swarm.ensure_labels",
    "homes.ensure_homes",
    "registry.ensure_registry",
    "distribution.distribute",
    "users.ensure_accounts",
    "stack.deploy",
    "users.ensure_associations",
    "readiness.wait_until_ready",
    "slurm.ensure_share",
    "calibration.ensure_calibrated",
    "distribution.remove_outdated",
]


# --- up --------------------------------------------------------------------------------------------------------------


def test_up_does_every_step_in_order_and_ends_with_what_to_try(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.cluster().up()
    assert world.verbs() == UP
    said = capsys.readouterr().out
    assert "http://localhost:8888/?token=abc" in said
    assert said.count("./invoke shell --command") == 3


def test_what_makes_a_debian_is_installed_where_one_must_be_made(world: World) -> None:
    world.needs_debian = True
    world.cluster().up(until="images")
    assert world.did[-2:] == ["packages.ensure_packages ['mmdebstrap']", "images.build"]


@pytest.mark.parametrize(
    ("until", "last"),
    [
        ("machines", "simulated.ensure_machines"),
        ("swarm", "swarm.ensure_joined"),
        ("labels", "swarm.ensure_labels"),
        ("homes", "homes.ensure_homes"),
        ("images", "images.build"),
        ("distribution", "distribution.distribute"),
        ("stack", "stack.deploy"),
    ],
)
def test_one_step_s_task_does_what_it_needs_and_no_more(
    world: World, until: str, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world.cluster().up(until=until)
    assert world.verbs() == UP[: UP.index(last) + 1]
    assert capsys.readouterr().out == ""


def test_failure_names_the_step_and_what_to_run_next(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.failing["swarm.ensure_swarm"] = ClusterError("the swarm cannot be made", "free port 2377")
    with pytest.raises(ClusterError) as caught:
        world.cluster().up()
    assert caught.value.message == "swarm: the swarm cannot be made"
    assert "free port 2377" in caught.value.remedy
    assert "./invoke up" in caught.value.remedy
    assert world.verbs() == UP[: UP.index("swarm.ensure_swarm") + 1]
    assert capsys.readouterr().out == ""
    del world.failing["swarm.ensure_swarm"]
    world.did.clear()
    world.cluster().up()
    assert world.verbs() == UP


def test_images_are_distributed_with_regard_to_what_services_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(cluster_module.services, "references", lambda: {"sha256:a"})
    monkeypatch.setattr(cluster_module.distribution, "distribute", lambda *args: told.extend(args) or {})
    world.cluster().up()
    assert told[-1] == {"sha256:a"}


def test_upgrade_is_up_with_another_way_to_replace_services(world: World) -> None:
    world.cluster().upgrade(drain_minutes="30", start_seconds="10")
    assert world.verbs() == ["upgrade.roll_out" if verb == "stack.deploy" else verb for verb in UP]
    assert world.patience == [Patience(drain_s=1800, start_s=10)]


def test_up_goes_on_with_an_upgrade_that_was_interrupted(world: World) -> None:
    world.is_under_way = True
    world.cluster().up()
    assert "stack.deploy" not in world.verbs()
    assert world.patience == [Patience()]


@pytest.mark.parametrize(("drain", "start"), [("soon", "1"), ("1", "-1"), ("", "1"), ("1", "1e9")])
def test_upgrade_that_shall_wait_for_no_number_is_refused_untouched(world: World, drain: str, start: str) -> None:
    with pytest.raises(ClusterError, match="whole number"):
        world.cluster().upgrade(drain_minutes=drain, start_seconds=start)
    assert world.verbs() == ["packages.ensure_root"]


def test_second_command_is_refused_before_it_does_anything(world: World) -> None:
    cluster = world.cluster()
    with world.state.lock("down"), pytest.raises(ClusterError, match="is at work on this cluster"):
        cluster.up()
    assert world.verbs() == ["packages.ensure_root"]


def test_commands_mean_this_machine_s_engine(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONTEXT", "elsewhere")
    monkeypatch.setenv("DOCKER_HOST", "tcp://elsewhere:2375")
    world.cluster()
    assert cluster_module.os.environ["DOCKER_HOST"] == "unix:///var/run/docker.sock"
    assert "DOCKER_CONTEXT" not in cluster_module.os.environ


# --- how many workers there are --------------------------------------------------------------------------------------


def _made(world: World) -> str:
    return next(line for line in reversed(world.did) if line.startswith("simulated.ensure_machines")).split()[1]


def test_first_up_makes_as_many_machines_as_config_says(world: World) -> None:
    world.there = []
    world.cluster(LOCAL_WORKERS="3").up()
    assert _made(world) == "c1,c2,c3"


def test_scale_up_is_remembered(world: World) -> None:
    world.cluster().scale("3")
    assert _made(world) == "c1,c2,c3"
    world.cluster().up()
    assert _made(world) == "c1,c2,c3"


def test_scale_down_drains_before_it_removes_and_takes_the_highest(world: World) -> None:
    world.there = ["c1", "c2", "c3"]
    world.cluster(LOCAL_WORKERS="3").scale("2")
    assert world.did[:9] == [
        "packages.ensure_root",
        "slurm.drain ['c3'] cfiddle: the worker is being removed",
        "slurm.wait_until_empty ['c3']",
        "swarm.unlabel_worker c3",
        "slurm.delete_node c3",
        "slurm.ensure_share",
        "swarm.remove_node c3",
        "simulated.remove_machine c3",
        "packages.ensure_commands",
    ]
    assert _made(world) == "c1,c2"
    world.cluster(LOCAL_WORKERS="3").up()
    assert _made(world) == "c1,c2"


def test_gap_that_a_removal_left_is_filled_first(world: World) -> None:
    world.there = ["c1", "c2", "c3"]
    world.cluster(LOCAL_WORKERS="3").remove_worker("c2")
    assert world.there == ["c1", "c3"]
    world.cluster(LOCAL_WORKERS="3").scale("3")
    assert _made(world) == "c1,c2,c3"


def test_config_that_was_changed_has_the_last_word(world: World) -> None:
    world.cluster().scale("3")
    world.cluster(LOCAL_WORKERS="4").up()
    assert _made(world) == "c1,c2,c3,c4"


def test_machines_beyond_what_config_says_now_stay_until_they_are_scaled_away(world: World) -> None:
    world.there = ["c1", "c2", "c3"]
    world.cluster(LOCAL_WORKERS="1").up()
    assert _made(world) == "c1,c2,c3"
    world.cluster(LOCAL_WORKERS="1").scale("1")
    assert world.there == ["c1"]


@pytest.mark.parametrize("count", ["-1", "0", "65", "two", "1.5", "", "1000000", "٣"])
def test_number_of_workers_that_cannot_be_is_refused(world: World, count: str) -> None:
    with pytest.raises(ClusterError, match=f"there cannot be {count} workers") as caught:
        world.cluster().scale(count)
    assert "1 to 64" in caught.value.remedy
    assert world.there == ["c1", "c2"]


def test_cluster_that_does_not_run_is_not_scaled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module.services, "container", lambda _service: None)
    with pytest.raises(ClusterError, match="the cluster does not run"):
        world.cluster().scale("3")
    assert world.verbs() == ["packages.ensure_root"]


def test_worker_that_nobody_knows_is_refused_with_those_that_there_are(world: World) -> None:
    with pytest.raises(ClusterError, match="there is no worker 'c9'; there are c1, c2"):
        world.cluster().remove_worker("c9")
    assert world.verbs() == ["packages.ensure_root"]


def test_last_worker_stays(world: World) -> None:
    world.there = ["c1"]
    with pytest.raises(ClusterError, match="c1 is the last worker"):
        world.cluster().remove_worker("c1")
    assert world.there == ["c1"]


def test_worker_whose_machine_is_gone_is_given_up_and_not_waited_for(world: World) -> None:
    world.silent = {"c2"}
    world.cluster().remove_worker("c2")
    assert "slurm.set_down ['c2'] cfiddle: its machine is gone" in world.did
    assert "slurm.wait_until_empty" not in world.verbs()
    assert world.there == ["c1"]


def test_worker_that_swarm_reaches_and_ssh_does_not_is_left_as_it_is(world: World) -> None:
    world.silent = world.cut_off = {"c2"}
    with pytest.raises(ClusterError, match="addr-c2 cannot be reached by SSH") as caught:
        world.cluster().remove_worker("c2")
    assert caught.value.remedy == "ssh addr-c2"
    assert world.verbs() == ["packages.ensure_root"]


@pytest.mark.parametrize("is_lost", [False, True])
def test_removal_that_was_interrupted_goes_on(world: World, monkeypatch: pytest.MonkeyPatch, is_lost: bool) -> None:
    monkeypatch.setattr(cluster_module.swarm, "worker_names", lambda: ["c1"])
    world.silent = {"c2"} if is_lost else set()
    world.leaving = ["c2"] if is_lost else []
    world.cluster().remove_worker("c2")
    assert world.verbs()[-2:] == ["swarm.remove_node", "simulated.remove_machine"]
    assert world.there == ["c1"]


# --- real machines ---------------------------------------------------------------------------------------------------

REAL = {"WORKER_ADDRS": "10.0.0.2 10.0.0.3"}


def _addresses(world: World) -> tuple[str, ...]:
    return world.cluster(**REAL).config.worker_addrs


def test_worker_that_was_added_is_remembered(world: World) -> None:
    world.there = ["10.0.0.2", "10.0.0.3"]
    cluster = world.cluster(**REAL)
    cluster.add_worker("10.0.0.4")
    assert world.verbs()[-1] == UP[-1]
    assert [line for line in world.did if line.startswith("install ")][:3] == [
        "install 10.0.0.2",
        "install 10.0.0.3",
        "install 10.0.0.4",
    ]
    assert _addresses(world) == ("10.0.0.2", "10.0.0.3", "10.0.0.4")
    with pytest.raises(ClusterError, match="is a worker already"):
        world.cluster(**REAL).add_worker("10.0.0.4")


def test_worker_that_cannot_join_is_not_remembered(world: World) -> None:
    world.there = []
    world.there = ["w1", "w2"]
    world.failing["swarm.ensure_joined"] = ClusterError("10.0.0.4 belongs to another swarm", "docker swarm leave")
    with pytest.raises(ClusterError, match="another swarm"):
        world.cluster(**REAL).add_worker("10.0.0.4")
    assert _addresses(world) == ("10.0.0.2", "10.0.0.3")


def test_worker_is_not_remembered_where_its_join_was_interrupted(world: World) -> None:
    world.there = ["w1", "w2"]
    world.failing["swarm.ensure_joined"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        world.cluster(**REAL).add_worker("10.0.0.4")
    assert _addresses(world) == ("10.0.0.2", "10.0.0.3")


def test_worker_that_is_a_member_already_is_remembered_whatever_fails_afterwards(world: World) -> None:
    world.there = []
    world.there = ["w1", "w2"]
    world.failing["distribution.distribute"] = ClusterError("the disk of 10.0.0.4 is full", "make room")
    with pytest.raises(ClusterError, match="is full"):
        world.cluster(**REAL).add_worker("10.0.0.4")
    assert _addresses(world) == ("10.0.0.2", "10.0.0.3", "10.0.0.4")


# --- workers that cannot be reached ----------------------------------------------------------------------------------

GONE = "10.0.0.3"


@pytest.fixture
def incomplete(world: World) -> World:
    """Have two real workers, of which one cannot be reached."""
    world.there = []
    world.silent = {GONE}
    return world


def _told_of(world: World, address: str) -> set[str]:
    """Return what was done with a machine."""
    return {line.partition(" ")[0] for line in world.did if f"addr={address!r}" in line or line.endswith(address)}


WITH_EACH = {
    *("install", "swarm.ensure_joined", "swarm.ensure_labels", "registry.ensure_registry", "distribution.distribute"),
    *("readiness.wait_until_ready", "calibration.ensure_calibrated", "distribution.remove_outdated"),
}


def test_worker_that_cannot_be_reached_is_named_and_the_others_go_on(
    incomplete: World, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ClusterError) as caught:
        incomplete.cluster(**REAL).up()
    assert incomplete.verbs()[-1] == UP[-1]
    assert _told_of(incomplete, "10.0.0.2") == WITH_EACH
    assert _told_of(incomplete, GONE) == set()
    assert str(caught.value).splitlines() == [
        f"{GONE} cannot be reached by SSH:",
        "No route to host",
        f"→ ssh {GONE}",
        "→ all else is done; when that is mended, this brings in who was left out: ./invoke up",
    ]
    said = capsys.readouterr()
    assert f"left out: {GONE} cannot be reached by SSH\n" in said.err
    assert "JupyterLab" in said.out


def test_worker_that_was_left_out_is_a_worker_still_and_comes_in_with_the_next_up(incomplete: World) -> None:
    with pytest.raises(ClusterError):
        incomplete.cluster(**REAL).up()
    assert not [verb for verb in incomplete.verbs() if "remove_node" in verb or "unlabel" in verb or "delete" in verb]
    assert _addresses(incomplete) == ("10.0.0.2", GONE)
    incomplete.silent.clear()
    incomplete.did.clear()
    incomplete.cluster(**REAL).up()
    assert _told_of(incomplete, GONE) == WITH_EACH


def test_each_of_several_is_named_with_its_own_mend(incomplete: World) -> None:
    incomplete.silent.add("10.0.0.4")
    with pytest.raises(ClusterError) as caught:
        incomplete.cluster(WORKER_ADDRS=f"10.0.0.2 {GONE} 10.0.0.4").up()
    assert f"→ ssh {GONE}\n" in str(caught.value)
    assert "→ ssh 10.0.0.4\n" in str(caught.value)


def test_a_step_s_task_fails_for_it_too_when_it_is_done(incomplete: World) -> None:
    with pytest.raises(ClusterError, match=GONE):
        incomplete.cluster(**REAL).up(until="machines")
    assert incomplete.verbs()[-1] == "install"


def test_where_no_worker_can_be_reached_nothing_is_brought_up(incomplete: World) -> None:
    with pytest.raises(ClusterError, match=f"^machines: {GONE} cannot be reached"):
        incomplete.cluster(WORKER_ADDRS=GONE).up()
    assert "swarm.ensure_swarm" not in incomplete.verbs()
    with pytest.raises(ClusterError, match=f"^{GONE} cannot be reached"):
        incomplete.cluster(WORKER_ADDRS=f"10.0.0.1 {GONE}").up()  # the head is a worker
    assert incomplete.verbs()[-1] == UP[-1]


@pytest.mark.parametrize("is_under_way", [False, True])
def test_an_upgrade_leaves_out_no_worker(incomplete: World, is_under_way: bool) -> None:
    incomplete.is_under_way = is_under_way
    cluster = incomplete.cluster(**REAL)
    with pytest.raises(ClusterError, match=f"^machines: {GONE} cannot be reached") as caught:
        cluster.up() if is_under_way else cluster.upgrade(drain_minutes="1", start_seconds="1")
    assert "./invoke remove-worker" in caught.value.remedy
    assert "swarm.ensure_swarm" not in incomplete.verbs()


def test_a_cluster_is_restored_without_a_worker_that_cannot_be_reached(incomplete: World) -> None:
    with pytest.raises(ClusterError, match=f"^{GONE} cannot be reached"):
        incomplete.cluster(**REAL).restore(Path("backup"))
    assert incomplete.verbs()[-1] == UP[-1]


def test_worker_is_added_while_another_cannot_be_reached(incomplete: World) -> None:
    with pytest.raises(ClusterError, match=f"^{GONE} cannot be reached"):
        incomplete.cluster(**REAL).add_worker("10.0.0.4")
    assert _addresses(incomplete) == ("10.0.0.2", GONE, "10.0.0.4")
    assert _told_of(incomplete, "10.0.0.4") == WITH_EACH


def test_worker_that_is_gone_before_it_has_joined_is_not_remembered(
    incomplete: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module.machines, "named", lambda machines: list(machines))
    incomplete.silent = {"10.0.0.4"}
    with pytest.raises(ClusterError, match=r"^10\.0\.0\.4 cannot be reached"):
        incomplete.cluster(**REAL).add_worker("10.0.0.4")
    assert _addresses(incomplete) == ("10.0.0.2", GONE)


def test_worker_that_was_removed_is_forgotten(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.there = ["10.0.0.2", "10.0.0.3"]
    world.cluster(**REAL).remove_worker("10.0.0.3")
    assert _addresses(world) == ("10.0.0.2",)
    assert "swarm.remove_node 10.0.0.3" in world.did
    assert world.verbs().count("user_containers.remove_all") == 1


def test_worker_that_was_removed_keeps_nothing_and_gets_no_homes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(settings: Config) -> None:
        world.did.append(f"export to {','.join(settings.worker_addrs)}")

    monkeypatch.setattr(cluster_module.homes, "ensure_homes", export)
    world.there = ["10.0.0.2", "10.0.0.3"]
    world.cluster(**REAL).remove_worker("10.0.0.3")
    assert world.did[-5:] == [
        "swarm.remove_node 10.0.0.3",
        f"registry.remove_trust {[machine('10.0.0.3', addr='10.0.0.3')]}",
        "stack.remove_volumes",
        "images.remove_images",
        "export to 10.0.0.2",
    ]


@pytest.mark.parametrize("service", ["slurmd", "agent"])
def test_worker_leaves_when_both_its_services_have_ended(
    world: World, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    monkeypatch.setattr(cluster_module, "STOP_TIMEOUT_S", 0.01)
    monkeypatch.setattr(cluster_module.services, "machines_of", lambda name: {"c2"} if name == service else set())
    with pytest.raises(ClusterError, match="slurmd and agent to end on c2"):
        world.cluster().remove_worker("c2")
    assert world.verbs()[-1] == "swarm.unlabel_worker"


def test_head_that_is_a_worker_no_longer_keeps_what_it_has(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module.machines, "short_hostname", lambda: "head")
    world.there = ["10.0.0.2", "head"]
    world.cluster(WORKER_ADDRS="10.0.0.1 10.0.0.2").remove_worker("head")
    assert not {"swarm.remove_node", "registry.remove_trust", "images.remove_images"} & set(world.verbs())
    assert world.cluster(WORKER_ADDRS="10.0.0.1 10.0.0.2").config.worker_addrs == ("10.0.0.2",)


def test_what_cannot_be_removed_from_a_worker_is_told_and_the_worker_goes(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.there = ["10.0.0.2", "10.0.0.3"]
    world.failing["stack.remove_volumes"] = ClusterError("volume is in use")
    world.cluster(**REAL).remove_worker("10.0.0.3")
    assert "something of the cluster is left on 10.0.0.3: volume is in use" in capsys.readouterr().err
    assert _addresses(world) == ("10.0.0.2",)


def test_lost_worker_with_a_name_for_an_address_is_forgotten(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.there = ["lab-2", "lab-3"]
    world.silent = {"lab-3"}
    numbers = {"lab-2": "10.0.0.2", "lab-3": "10.0.0.3"}
    monkeypatch.setattr(cluster_module.machines, "resolved", lambda addr: numbers[addr])
    monkeypatch.setattr(cluster_module.swarm, "address_of", lambda name: numbers[name])
    world.cluster(WORKER_ADDRS="lab-2 lab-3").remove_worker("lab-3")
    assert world.cluster(WORKER_ADDRS="lab-2 lab-3").config.worker_addrs == ("lab-2",)


def test_addresses_in_config_that_were_changed_have_the_last_word(world: World) -> None:
    world.there = []
    world.there = ["w1", "w2"]
    world.cluster(**REAL).add_worker("10.0.0.4")
    assert world.cluster(WORKER_ADDRS="10.0.0.7").config.worker_addrs == ("10.0.0.7",)


def test_simulated_and_real_workers_are_not_mixed(world: World) -> None:
    with pytest.raises(ClusterError, match="workers are simulated"):
        world.cluster().add_worker("10.0.0.4")
    with pytest.raises(ClusterError, match="real machines, which cannot be made"):
        world.cluster(**REAL).scale("3")
    assert set(world.verbs()) == {"packages.ensure_root"}


# --- users, backup, restore ------------------------------------------------------------------------------------------


def test_users_come_and_go_and_are_told_what_that_means(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = world.cluster()
    cluster.add_user("ada")
    cluster.import_users(Path("class.csv"))
    cluster.remove_user("ada", delete_home=False)
    cluster.remove_user("ada", delete_home=True)
    assert world.did == [
        "packages.ensure_root",
        "users.add ada",
        "packages.ensure_root",
        "users.import_users",
        "packages.ensure_root",
        "users.remove ada delete_home=False",
        "packages.ensure_root",
        "users.remove ada delete_home=True",
    ]
    assert capsys.readouterr().out.splitlines() == [
        "ada (uid 2003) can log in: ./invoke shell --user ada",
        "1 users added: ada; 2 were there",
        "ada is no user any longer; the home directory is still there",
        "ada is no user any longer",
    ]


def test_machine_that_keeps_a_removed_user_s_containers_is_named(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.silent = {"c2"}
    world.cluster().remove_user("ada", delete_home=False)
    assert "c2 does not answer: containers of ada may be left there\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "act",
    [
        lambda cluster: cluster.add_user("ada"),
        lambda cluster: cluster.remove_user("ada", delete_home=True),
        lambda cluster: cluster.import_users(Path("class.csv")),
        lambda cluster: cluster.backup(Path("backup")),
        lambda cluster: cluster.remove_worker("c1"),
    ],
)
def test_what_needs_the_cluster_says_that_it_does_not_run(
    world: World, monkeypatch: pytest.MonkeyPatch, act: Callable[[Cluster], None]
) -> None:
    monkeypatch.setattr(cluster_module.engine, "is_running", lambda: False)
    with pytest.raises(ClusterError, match="the cluster does not run") as caught:
        act(world.cluster())
    assert caught.value.remedy == "./invoke up"
    assert world.verbs() == ["packages.ensure_root"]


def test_restore_has_secrets_before_and_data_after_the_services_run(world: World) -> None:
    world.cluster().restore(Path("backup"))
    to_stack = UP[1 : UP.index("stack.deploy") + 1]
    first = ["packages.ensure_root", "backup.examine", "backup.refuse_if_state_exists", "backup.restore_state"]
    assert world.verbs() == [*first, *to_stack, "backup.restore_services", *UP[1:]]


def test_restore_over_a_cluster_is_refused_before_anything_is_touched(world: World) -> None:
    world.failing["backup.refuse_if_state_exists"] = ClusterError("there is a cluster here", "./invoke down --purge")
    with pytest.raises(ClusterError, match="there is a cluster here"):
        world.cluster().restore(Path("backup"))
    assert world.verbs()[-1] == "backup.refuse_if_state_exists"


# --- down ------------------------------------------------------------------------------------------------------------


def test_down_keeps_state_homes_images_and_volumes(world: World) -> None:
    world.cluster().down(purge=False)
    assert world.did == [
        "packages.ensure_root",
        "upgrade.forget",
        "stack.remove",
        "registry.remove_registry purge=False",
        "user_containers.stop",
        "simulated.remove_all purge=False",
        "swarm.leave",
    ]
    assert world.state.directory.exists()


def test_real_workers_do_not_come_beside_simulated_ones(world: World) -> None:
    world.there = ["c1", "c2"]
    with pytest.raises(ClusterError, match="the simulated ones c1, c2 are still there"):
        world.cluster(**REAL).up()
    assert "swarm.ensure_swarm" not in world.verbs()
    world.there = ["c1"]
    world.cluster(**REAL).down(purge=False)
    assert "simulated.remove_all purge=False" in world.did


def test_purge_takes_everything(world: World) -> None:
    world.cluster().down(purge=True)
    wanted = "user_containers.remove_all stack.remove_volumes images.remove_images registry.remove_trust homes.purge"
    for verb in wanted.split():
        assert verb in world.verbs()
    assert world.did.index("user_containers.remove_all") < world.did.index("stack.remove_volumes"), "they hold volumes"
    assert "simulated.remove_all purge=True" in world.did
    assert not world.state.directory.exists()


def test_purge_deletes_the_homes_of_users_and_says_what_else_stays(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.state.write_json("users.json", {"users": {"jovyan": 1000}, "former": {"ada": 2003}})
    world._replace("homes", "purge", world._note("homes.purge", ["archive"]))
    world.cluster().down(purge=True)
    assert world.did[-1] == "homes.purge ['jovyan', 'ada']"
    assert "keeps what is no home of a user: archive" in capsys.readouterr().err


def test_down_is_no_error_where_no_engine_runs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module.engine, "is_running", lambda: False)
    world.cluster().down(purge=False)
    world.cluster().down(purge=True)
    assert set(world.verbs()) == {"packages.ensure_root", "homes.purge"}


def test_purge_starts_an_engine_that_does_not_run_to_remove_what_it_holds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module.engine, "is_running", lambda: False)
    world.state.path("secrets").mkdir()
    world.cluster().down(purge=True)
    assert world.verbs()[:3] == ["packages.ensure_root", "packages.ensure_engine", "upgrade.forget"]
    assert "simulated.remove_all purge=True" in world.did
    assert not world.state.directory.exists()


def test_down_goes_on_past_a_worker_that_does_not_answer_and_names_it(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.state.path("secrets").mkdir()
    world.silent = {"10.0.0.2"}
    world.cluster(**REAL).down(purge=False)
    assert [line for line in world.did if line.startswith("swarm.release")] == ["swarm.release 10.0.0.3"]
    assert world.verbs().count("user_containers.stop") == 2, "on the head and on the worker that answers"
    assert "10.0.0.2 does not answer" in capsys.readouterr().err
    assert world.verbs()[-1] == "swarm.leave"


# --- measurements ----------------------------------------------------------------------------------------------------

OFF = Outcome("c2", None, Difference(14.2, "14 % slower than its fellows: why", True), "drained: why")


def test_a_new_worker_that_is_slow_is_told_of_by_up(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.outcomes.append(OFF)
    world.cluster().up()
    assert "c2 drained: why; when it is mended: ./invoke calibrate" in capsys.readouterr().err


def test_calibrate_fails_while_a_worker_is_off(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.cluster().calibrate(as_json=False) == 0
    world.outcomes.append(OFF)
    assert world.cluster().calibrate(as_json=False) == 1
    assert "drained: why" in capsys.readouterr().out
    assert world.cluster().calibrate(as_json=True) == 1
    assert json.loads(capsys.readouterr().out)[0]["difference"]["percent"] == 14.2


def test_nothing_is_set_on_simulated_workers(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.cluster().tune(undo=False)
    assert "nothing to set" in capsys.readouterr().out
    assert world.did == ["packages.ensure_root"]


@pytest.mark.parametrize(("undo", "did"), [(False, "tuning.tune"), (True, "tuning.undo")])
def test_workers_are_compared_anew_when_their_settings_changed(world: World, undo: bool, did: str) -> None:
    cluster = world.cluster(WORKER_ADDRS="10.0.0.2")
    cluster.tune(undo=undo)
    assert world.verbs()[-1] == did
    world.changed.append("10.0.0.2")
    cluster.tune(undo=undo)
    assert world.verbs()[-2:] == [did, "calibration.calibrate"]


def test_machine_that_is_off_is_named_and_the_others_are_set_and_measured(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[str] = []
    monkeypatch.setattr(
        cluster_module.tuning, "tune", lambda _c, _s, workers, _say: there.extend(w.addr for w in workers)
    )
    world.silent = {"10.0.0.2"}
    world.cluster(**REAL).tune(undo=False)
    assert there == ["10.0.0.3"]
    assert "left out: 10.0.0.2 cannot be reached" in capsys.readouterr().err


def test_settings_of_real_workers_are_put_back_when_they_leave(world: World) -> None:
    world.there = ["10.0.0.2", "10.0.0.3"]
    world.state.path("secrets").mkdir()
    cluster = world.cluster(WORKER_ADDRS="10.0.0.2 10.0.0.3")
    cluster.remove_worker("10.0.0.3")
    assert world.verbs().index("slurm.delete_node") < world.verbs().index("tuning.undo"), "or it would take jobs again"
    world.did.clear()
    cluster.down(purge=False)
    assert "tuning.undo" not in world.verbs()
    cluster.down(purge=True)
    assert "tuning.undo" in world.verbs()


# --- who may connect -------------------------------------------------------------------------------------------------


@pytest.fixture
def walled(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Have the firewall's rules be wanted; what is done to them is noted with the machines' and members' addresses."""

    def addresses(machines: Iterable[Machine]) -> str:
        return ",".join(found.addr.removeprefix("10.0.0.") for found in machines)

    def ensure(settings: Config, _state: State, machines: Iterable[Machine]) -> list[Silent]:
        members = ",".join(addr.removeprefix("10.0.0.") for addr in settings.worker_addrs)
        world.did.append(f"firewall.ensure {addresses(machines)} for {members}")
        return [Silent(machine(name), ClusterError(f"{name} is silent")) for name in world.without_firewall]

    def remove(machines: Iterable[Machine]) -> list[Silent]:
        world.did.append(f"firewall.remove {addresses(machines)}")
        return []

    monkeypatch.setattr(cluster_module.firewall, "ensure", ensure)
    monkeypatch.setattr(cluster_module.firewall, "remove", remove)
    monkeypatch.setattr(cluster_module.firewall, "survey", lambda *_args: [])
    monkeypatch.setattr(cluster_module.firewall, "text", lambda *_args: "the table")
    world.there = REAL["WORKER_ADDRS"].split()
    (world.state.directory / "secrets").mkdir()
    world.state.write_json(cluster_module.firewall.RECORD, {"members": {}})
    return world


def _firewall(world: World) -> list[str]:
    return [line for line in world.did if line.startswith("firewall.")]


def test_firewall_is_not_touched_unless_it_is_wanted(walled: World) -> None:
    cluster_module.firewall.forget(walled.state)
    walled.cluster(**REAL).up()
    walled.cluster(**REAL).add_worker("10.0.0.4")
    walled.cluster(**REAL).remove_worker("10.0.0.3")
    walled.cluster(**REAL).down(purge=True)
    assert _firewall(walled) == []


def test_machine_is_let_in_before_it_joins(walled: World) -> None:
    walled.cluster(**REAL).add_worker("10.0.0.4")
    assert _firewall(walled)[0] == "firewall.ensure 1,2,3,4 for 2,3,4"
    assert walled.did.index("firewall.ensure 1,2,3,4 for 2,3,4") < walled.verbs().index("swarm.ensure_joined")


def test_machine_that_cannot_be_reached_stays_a_member_to_the_others(walled: World) -> None:
    walled.there, walled.silent = [], {GONE}
    with pytest.raises(ClusterError, match=GONE):
        walled.cluster(**REAL).up()
    assert _firewall(walled) == ["firewall.ensure 1,2 for 2,3"]


def test_machine_that_could_not_join_is_let_out_again(walled: World) -> None:
    walled.failing["swarm.ensure_joined"] = ClusterError("no")
    with pytest.raises(ClusterError, match="no"):
        walled.cluster(**REAL).add_worker("10.0.0.4")
    assert _firewall(walled)[1:] == ["firewall.remove 4", "firewall.ensure 1,2,3 for 2,3"]


def test_up_ends_where_a_machine_s_firewall_cannot_be_set(walled: World) -> None:
    walled.without_firewall = {"c9"}
    with pytest.raises(ClusterError, match="c9 is silent"):
        walled.cluster(**REAL).up()
    assert "swarm.ensure_joined" not in walled.verbs()


def test_machine_that_leaves_is_let_out(walled: World) -> None:
    walled.cluster(**REAL).remove_worker("10.0.0.3")
    assert _firewall(walled) == ["firewall.remove 3", "firewall.ensure 1,2 for 2"]
    assert walled.did.index("firewall.remove 3") > walled.verbs().index("swarm.remove_node")


def test_machine_that_is_lost_is_let_in_no_more(walled: World, capsys: pytest.CaptureFixture[str]) -> None:
    walled.silent = walled.without_firewall = {"10.0.0.3"}
    walled._replace("swarm", "address_of", lambda name: name)
    walled.cluster(**REAL).remove_worker("10.0.0.3")
    assert _firewall(walled) == ["firewall.remove ", "firewall.ensure 1,2 for 2"]
    assert "its firewall stays as it is" in capsys.readouterr().err


@pytest.mark.parametrize("purge", [False, True])
def test_down_takes_the_rules_off_and_keeps_what_was_wanted(walled: World, purge: bool) -> None:
    walled.cluster(**REAL).down(purge=purge)
    assert _firewall(walled) == ["firewall.remove 1,2,3"]
    assert cluster_module.firewall.is_set(walled.state) != purge


def test_simulated_machines_have_no_rules_of_their_own(walled: World) -> None:
    walled.there = ["c1", "c2"]
    walled.cluster().up()
    walled.cluster().scale("1")
    assert set(_firewall(walled)) == {"firewall.ensure 1 for "}


def test_firewall_is_set_and_unset_and_shown(walled: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert walled.cluster(**REAL).firewall(set_=True, unset=False) == 0
    assert walled.cluster(**REAL).firewall(set_=False, unset=True) == 0
    assert not cluster_module.firewall.is_set(walled.state)
    assert _firewall(walled) == ["firewall.ensure 1,2,3 for 2,3", "firewall.remove 1,2,3"]
    assert walled.cluster(**REAL).firewall(set_=False, unset=False) == 0
    assert len(_firewall(walled)) == 2
    assert capsys.readouterr().out == "the table\n" * 3
    with pytest.raises(ClusterError, match="opposites"):
        walled.cluster(**REAL).firewall(set_=True, unset=True)


def test_machine_that_cannot_be_set_makes_the_command_fail(walled: World, capsys: pytest.CaptureFixture[str]) -> None:
    walled.without_firewall = {"c9"}
    assert walled.cluster(**REAL).firewall(set_=True, unset=False) == 1
    assert "c9 is silent" in capsys.readouterr().err
