"""Fingerprints compared, and a node that says more of itself than it has."""

import pytest

from delegate_function.callinfo import CallInfo
from delegate_function.fingerprint import differences

NODE = {
    "name": "c1",
    "cpu_model": "Model A",
    "cores": 2,
    "cpus": "0-1",
    "governor": None,
    "boost": False,
    "smt": True,
    "kernel": "6.1",
    "image": "sha256:1",
    "counters": "available",
}


def test_a_node_is_like_itself_and_like_another_with_the_same_values() -> None:
    assert differences(NODE, NODE) == {}
    assert differences(NODE, {**NODE, "name": "c2", "cpus": "2-3", "counters": "kernel: no"}) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [("cpu_model", "Model B"), ("cores", 4), ("boost", True), ("smt", False), ("kernel", "6.2"), ("image", "sha256:2")],
)
def test_each_value_that_a_measurement_depends_on_makes_a_difference(name: str, value: object) -> None:
    assert differences(NODE, {**NODE, name: value}) == {name: (NODE[name], value)}


def test_what_a_node_does_not_say_is_not_compared() -> None:
    assert differences(NODE, {**NODE, "governor": "powersave", "boost": None}) == {}
    assert differences(NODE, {}) == {}


@pytest.mark.parametrize(("slurm_cpus", "cpus", "void"), [(4, 2, True), (2, 2, False), (1, 2, False), (None, 2, False)])
def test_a_node_with_fewer_cpus_than_it_says_makes_measurements_void(
    slurm_cpus: int | None, cpus: int, void: bool
) -> None:
    info = CallInfo()
    info.greet({"node": "c1", "slurm_cpus": slurm_cpus, "cpus": cpus})
    assert info.void == ("c1 has 2 CPUs and says to Slurm that it has 4" if void else "")
