"""What is set on workers, what is remembered of before, and that it comes back."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cfiddle_cluster import tuning
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.facts import Facts
from cfiddle_cluster.machines import Machine, Silent
from cfiddle_cluster.slurm import Node
from cfiddle_cluster.state import State
from samples import config, machine

CPU = "/sys/devices/system/cpu"
FILES = {
    f"{CPU}/cpu0/cpufreq/scaling_governor": "powersave",
    f"{CPU}/cpu1/cpufreq/scaling_governor": "schedutil",
    f"{CPU}/cpufreq/boost": "1",
    f"{CPU}/smt/control": "on",
    "/proc/sys/kernel/perf_event_paranoid": "4",
}
TUNED = {
    f"{CPU}/cpu0/cpufreq/scaling_governor": "performance",
    f"{CPU}/cpu1/cpufreq/scaling_governor": "performance",
    f"{CPU}/cpufreq/boost": "0",
    f"{CPU}/smt/control": "off",
    "/proc/sys/kernel/perf_event_paranoid": "2",
}


class World:
    """Workers whose files are directories here, written by the real tune.sh."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = tmp_path / "root"
        self.state = State(tmp_path / "state")
        self.state.directory.mkdir()
        self.config = config(tmp_path, WORKER_ADDRS="10.0.0.2")
        self.said: list[str] = []
        self.told: list[str] = []
        self.node = Node("c1", "idle", True)
        self.others: dict[str, Node] = {}
        self.write(FILES)
        self.swap: list[str] = []
        monkeypatch.setattr(tuning.facts, "gather", self._gather)
        monkeypatch.setattr(Machine, "script", lambda _, text, args=(), **_options: self._script(text, args))
        monkeypatch.setattr(tuning.slurm, "is_answering", lambda: True)
        monkeypatch.setattr(tuning.slurm, "nodes", lambda: {"c1": self.node, **self.others})
        monkeypatch.setattr(tuning.slurm, "drain", self._drain)
        monkeypatch.setattr(tuning.slurm, "wait_until_empty", lambda names, **_: self.told.append(f"wait {names}"))
        monkeypatch.setattr(tuning.slurm, "resume", lambda names: self.told.append(f"resume {list(names)}"))
        monkeypatch.setattr(tuning.slurm, "delete_node", lambda name: self.told.append(f"delete {name}"))

    def _drain(self, names: Any, reason: str) -> None:
        names = list(names)
        if names:
            self.node = Node("c1", "drained", True, reason)
        self.told.append(f"drain {names}")

    def _gather(self, machines: list[Machine], **_: Any) -> list[Facts]:
        settings = {path: text for path, text in self.files.items() if text}
        settings |= {f"swap:{device}": "on" for device in self.swap}
        return [Facts(machine=found, values={"name": found.name}, settings=settings) for found in machines]

    def _script(self, text: str, args: Sequence[str]) -> str:
        if "docker stop" in text:
            self.told.append("stop slurmd, agent")
            return ""
        argv = ["bash", "-s", "--", str(self.root), *args[1:]]
        return subprocess.run(argv, input=text, capture_output=True, text=True, check=True, timeout=60).stdout

    def write(self, files: Mapping[str, str]) -> None:
        for path, text in files.items():
            file = self.root / path[1:]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    @property
    def files(self) -> dict[str, str]:
        return {path: (self.root / path[1:]).read_text().strip() for path in FILES}

    def tune(self) -> list[str]:
        return tuning.tune(self.config, self.state, [machine("c1")], self.said.append)

    def undo(self) -> list[str]:
        return tuning.undo(self.config, self.state, [machine("c1")], self.said.append)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_all_that_may_be_set_is_set_and_said(world: World) -> None:
    assert world.tune() == ["c1"]
    assert world.files == TUNED
    assert f"c1: {CPU}/cpufreq/boost: 1 → 0" in world.said
    assert len(world.said) == len(FILES)


def test_what_was_before_comes_back_also_after_a_second_time(world: World) -> None:
    world.tune()
    world.write({f"{CPU}/cpufreq/boost": "1"})  # as after a restart
    assert world.tune() == ["c1"]
    assert world.tune() == []
    assert world.undo() == ["c1"]
    assert world.files == FILES
    assert world.undo() == []


def test_what_somebody_else_changed_since_then_stays(world: World) -> None:
    world.tune()
    world.write({f"{CPU}/cpu0/cpufreq/scaling_governor": "ondemand"})
    world.undo()
    assert world.files == {**FILES, f"{CPU}/cpu0/cpufreq/scaling_governor": "ondemand"}


def test_only_what_config_sh_names_is_set(world: World) -> None:
    world.config = replace(world.config, tune=frozenset({"boost"}))
    world.tune()
    assert world.files == {**FILES, f"{CPU}/cpufreq/boost": "0"}
    assert "c1: SMT on, and stays: TUNE in config.sh does not name it" in world.said


def test_a_setting_that_the_kernel_refuses_stays_and_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = f"{CPU}/cpufreq/boost"

    def become_a_directory(_names: Any, **_options: Any) -> None:
        (world.root / refused[1:]).unlink()
        (world.root / refused[1:]).mkdir()

    monkeypatch.setattr(tuning.slurm, "wait_until_empty", become_a_directory)
    world.tune()
    assert f"c1: {refused} stays 1: Is a directory" in world.said
    assert (world.root / CPU[1:] / "smt/control").read_text() == "off\n"


def test_no_job_runs_while_a_machine_changes(world: World) -> None:
    world.config = replace(world.config, tune=frozenset({"boost"}))
    world.tune()
    assert world.told == ["drain ['c1']", "wait ['c1']", "resume ['c1']"]
    world.told.clear()
    world.tune()
    assert world.told == []


def test_a_worker_that_was_drained_before_stays_so(world: World) -> None:
    world.node = Node("c1", "drained", True, "a broken fan")
    world.config = replace(world.config, tune=frozenset({"boost"}))
    world.tune()
    assert world.told == ["wait ['c1']", "resume []"]


def test_workers_are_set_one_after_the_other_and_those_without_jobs_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.node = Node("c1", "allocated", True)
    world.others = {"c2": Node("c2", "idle", True)}

    def wait(names: list[str], say: Callable[[str], None], **_: Any) -> None:
        world.told.append(f"wait {names}")
        say("7 (ada)")

    monkeypatch.setattr(tuning.slurm, "drain", lambda names, _reason: world.told.append(f"drain {names}"))
    monkeypatch.setattr(tuning.slurm, "wait_until_empty", wait)
    monkeypatch.setattr(tuning, "_set", lambda *_args: {})
    world.config = replace(world.config, tune=frozenset({"boost"}))
    tuning.tune(world.config, world.state, [machine("c1"), machine("c2")], world.said.append)
    one_by_one = [f"{what} ['{name}']" for name in ("c2", "c1") for what in ("drain", "wait")]
    assert [told for told in world.told if not told.startswith("resume")] == one_by_one
    assert "7 (ada)" in world.said


def test_a_node_whose_cpus_went_registers_again(world: World) -> None:
    world.tune()
    assert world.told[-3:-1] == ["stop slurmd, agent", "delete c1"]
    world.told.clear()
    world.undo()
    assert world.told[-3:-1] == ["stop slurmd, agent", "delete c1"]


def test_swap_is_turned_off_only_if_what_is_in_it_fits_into_memory(world: World) -> None:
    world.write({"/proc/meminfo": "MemAvailable: 1000 kB"})
    world.swap = ["/dev/none"]
    (world.root / "proc/swaps").write_text("Filename Type Size Used Priority\n/dev/none partition 4096 600 -2\n")
    world.config = replace(world.config, tune=frozenset({"swap"}))
    world.tune()
    assert "c1: swap:/dev/none stays on: what is in it does not fit into memory" in world.said
    world.said.clear()
    world.write({"/proc/meminfo": "MemAvailable: 2000 kB"})
    world.tune()
    assert [line for line in world.said if "swapoff failed" in line or "No such file" in line], world.said


def test_a_worker_that_does_not_answer_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = Silent(machine("c1"), ClusterError("c1 cannot be reached"))
    monkeypatch.setattr(tuning.facts, "gather", lambda *_args, **_options: [silent])
    with pytest.raises(ClusterError, match="c1 cannot be reached"):
        world.tune()
    assert world.state.read_json(tuning.RECORDS, None) is None
