"""Which workers are measured, when one is off its fellows, and what becomes of it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cfiddle_cluster import calibration
from cfiddle_cluster.calibration import REASON, Figures, Identity, compare
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.slurm import Node
from cfiddle_cluster.state import State
from samples import machine

WELL = Figures("p1", "boot", "A CPU", 1.0, 1.02, 80.0, 82.0, 0.99)
SLOW = replace(WELL, cpu_ns=1.14)


class World:
    """Workers that show what a test says, and Slurm as far as it is told."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = State(tmp_path)
        self.nodes_ = {name: Node(name, "idle", True) for name in ("c1", "c2", "c3")}
        self.shows: dict[str, list[Figures]] = {name: [WELL] for name in self.nodes_}
        self.ran: list[str] = []
        self.told: list[str] = []
        self.simulated = False
        self.taken = ""
        monkeypatch.setattr(calibration.slurm, "nodes", lambda: self.nodes_)
        monkeypatch.setattr(calibration.slurm, "slurm", self._slurm)
        monkeypatch.setattr(calibration.slurm, "drain", lambda names, why: self.told.append(f"drain {names[0]} {why}"))
        monkeypatch.setattr(calibration.slurm, "resume", lambda names: self.told.append(f"resume {names[0]}"))
        monkeypatch.setattr(Machine, "script", lambda found, text, **_: self._show(found.name, f"there {found.name}"))

    def _show(self, name: str, how: str) -> str:
        self.ran.append(how)
        figures = self.shows[name]
        return json.dumps(asdict(figures.pop(0) if len(figures) > 1 else figures[0]))

    def _slurm(self, argv: list[str], *, user: str, timeout_s: float) -> str:
        assert user == "2000:2000"
        assert "--partition=normal" in argv, "alone on the machine"
        name = next(word.removeprefix("--nodelist=") for word in argv if word.startswith("--nodelist="))
        if name == self.taken:
            self.nodes_ = {**self.nodes_, name: Node(name, "allocated", True)}
            raise ClusterError("srun: error: Unable to allocate resources")
        return self._show(name, f"job {name}")

    @property
    def workers(self) -> list[Machine]:
        return [machine(name, simulated=self.simulated) for name in self.nodes_]

    def calibrate(self) -> dict[str, str]:
        """Return what was done with each worker."""
        return {found.name: found.what for found in calibration.calibrate(self.state, self.workers, 10)}

    def ensure(self, identities: Mapping[str, Identity]) -> list[str]:
        """Return which workers were measured."""
        return [found.name for found in calibration.ensure_calibrated(self.state, self.workers, identities, 10)]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


# --- who is measured -------------------------------------------------------------------------------------------------


def test_a_worker_is_measured_when_it_joins_and_not_again(world: World) -> None:
    identities = dict.fromkeys(("c1", "c2"), WELL.identity)
    assert world.ensure(identities) == ["c1", "c2"]
    assert sorted(world.ran) == ["job c1", "job c2"]
    world.ran.clear()
    assert world.ensure(identities) == []
    assert world.ensure({**identities, "c3": WELL.identity}) == ["c3"]
    assert world.ran == ["job c3"]


@pytest.mark.parametrize("changes", [{"boot": "another"}, {"model": "Another CPU"}, {"program": "p2"}])
def test_another_machine_or_program_is_measured_anew(world: World, changes: dict[str, str]) -> None:
    world.ensure({"c1": WELL.identity})
    world.ran.clear()
    assert world.ensure({"c1": replace(WELL.identity, **changes)}) == ["c1"]
    assert world.ran == ["job c1"]


def test_figures_of_a_worker_that_left_are_forgotten(world: World) -> None:
    world.calibrate()
    del world.nodes_["c3"]
    world.calibrate()
    assert sorted(world.state.read_json(calibration.RECORDS, {})) == ["c1", "c2"]


def test_figures_that_another_version_wrote_are_no_figures(world: World) -> None:
    world.state.write_json(calibration.RECORDS, {"c1": {"speed": 1}})
    assert world.ensure({"c1": WELL.identity}) == ["c1"]


def test_busy_and_otherwise_drained_workers_are_let_alone(world: World) -> None:
    world.nodes_["c1"] = Node("c1", "allocated", True)
    world.nodes_["c2"] = Node("c2", "drained", True, "a broken fan")
    world.nodes_["c3"] = Node("c3", "drained", False, REASON + "slow")
    assert world.calibrate() == {
        "c1": "not measured now: allocated",
        "c2": "not measured now: a broken fan",
        "c3": f"not measured now: {REASON}slow",
    }
    assert world.ran + world.told == []


def test_somebody_s_job_that_comes_first_is_no_failure(world: World) -> None:
    world.taken = "c1"
    assert world.calibrate() == {"c1": "not measured now: idle", "c2": "", "c3": ""}
    assert "job c1" not in world.ran


def test_a_program_that_fails_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> str:
        raise ClusterError("srun: calibrate: no memory")

    monkeypatch.setattr(calibration.slurm, "slurm", fail)
    with pytest.raises(ClusterError, match="no memory"):
        world.calibrate()


# --- who is off ------------------------------------------------------------------------------------------------------


def test_a_slow_worker_is_drained_with_the_reason(world: World) -> None:
    world.shows["c2"] = [SLOW]
    what = world.calibrate()["c2"]
    assert what == "drained: 14 % slower than its fellows: a CPU step takes 1.140 ns, theirs 1.000 ns"
    assert world.told == [f"drain c2 calibration: {what.removeprefix('drained: ')}"]


def test_what_seems_slow_once_is_noise(world: World) -> None:
    world.shows["c2"] = [SLOW, WELL]
    assert world.calibrate()["c2"] == ""
    assert world.told == []
    assert [how for how in world.ran if how == "job c2"] == ["job c2"] * 2
    assert world.ran.count("job c1") == 1


def test_a_worker_that_is_slow_no_longer_is_resumed(world: World) -> None:
    world.nodes_["c2"] = Node("c2", "drained", True, REASON + "14 % slower")
    assert world.calibrate()["c2"] == "resumed"
    assert world.told == ["resume c2"]
    assert "there c2" in world.ran, "no job runs on a drained node"


def test_a_worker_that_is_still_slow_stays_drained(world: World) -> None:
    world.nodes_["c2"] = Node("c2", "drained", True, REASON + "14 % slower")
    world.shows["c2"] = [SLOW]
    assert world.calibrate()["c2"].startswith("drained: 14 %")
    assert "resume c2" not in world.told


def test_simulated_fellows_are_measured_with_the_one_that_seems_slow(world: World) -> None:
    world.simulated = True
    crowded = replace(WELL, share=0.3)
    world.shows["c2"] = [crowded, crowded, crowded]
    world.shows["c1"] = world.shows["c3"] = [WELL]
    assert world.calibrate()["c2"].startswith("drained: 230 % slower than its fellows: a program gets 30 % of a CPU")
    assert world.ran == ["job c1", "job c2", "job c3"] * 3
    world.ran.clear()
    world.shows["c2"] = [crowded, crowded, replace(WELL, share=0.4)]
    assert world.calibrate()["c2"] == ""
    assert world.ran == ["job c1", "job c2", "job c3"] * 3


@pytest.mark.parametrize(
    ("changes", "simulated", "is_off"),
    [
        ({"cpu_ns": 1.09}, False, False),
        ({"cpu_ns": 1.11}, False, True),
        ({"cpu_ns": 1.11}, True, True),
        ({"cpu_ns": 0.5}, False, False),
        ({"memory_ns": 90.0}, False, True),
        ({"memory_ns": 160.0}, True, False),  # it is one memory
        ({"share": 0.85}, False, True),
        ({"share": 0.85}, True, False),
        ({"share": 0.3}, True, True),
        ({"cpu_median_ns": 9.0, "memory_median_ns": 900.0}, False, False),
    ],
)
def test_each_figure_has_its_limit(changes: dict[str, float], simulated: bool, is_off: bool) -> None:
    found = compare(replace(WELL, **changes), [WELL, WELL], simulated=simulated, limit_percent=10)
    assert found
    assert found.is_off == is_off, found


def test_one_odd_fellow_makes_nobody_slow() -> None:
    quick = replace(WELL, cpu_ns=0.5)
    found = compare(WELL, [quick, WELL, WELL], simulated=False, limit_percent=10)
    assert found
    assert not found.is_off


def test_only_the_same_model_measured_by_the_same_program_is_a_fellow(world: World) -> None:
    others = [replace(WELL, model="Another CPU", cpu_ns=0.2), replace(WELL, program="p0", cpu_ns=0.2)]
    assert compare(WELL, others, simulated=False, limit_percent=10) is None
    world.shows = {"c1": [WELL], "c2": [others[0]], "c3": [others[1]]}
    found = calibration.calibrate(world.state, world.workers, 10)
    assert world.told == []
    assert calibration.table(found).count("no fellow") == 3


def test_table_shows_figures_and_what_was_done(world: World) -> None:
    world.shows["c2"] = [SLOW]
    lines = calibration.table(calibration.calibrate(world.state, world.workers, 10)).splitlines()
    assert lines[0].split() == ["node", "CPU", "cpu", "ns", "memory", "ns", "CPU", "share", "difference"]
    assert lines[2].split()[:9] == ["c2", "A", "CPU", "1.140", "80.0", "99", "%", "+14.0", "%"]
