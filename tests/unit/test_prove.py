"""The table of attacks and weakenings fits the tests and the sources, and a proof is judged by what the test said."""

import ast
from pathlib import Path

import pytest

import prove
from prove import ATTACKS, COUNT, Attack, Change, Weakening

TABLE = prove.load()
CHANGES = [(weakening, change) for attack in TABLE for weakening in attack.weakenings for change in weakening.change]


def _functions() -> set[str]:
    return {
        f"{path.name}::{node.name}"
        for path in ATTACKS.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_attack_has_a_test_and_a_weakening() -> None:
    assert [attack.number for attack in TABLE] == list(range(1, COUNT + 1))
    assert all(attack.title and attack.weakenings for attack in TABLE)
    assert all(
        weakening.name and weakening.change and weakening.seen for attack in TABLE for weakening in attack.weakenings
    )


def test_every_test_of_an_attack_is_proved_or_a_control() -> None:
    proved = {test for attack in TABLE for weakening in attack.weakenings for test in weakening.seen}
    controls = {test for attack in TABLE for test in attack.controls}
    assert not proved & controls
    assert {test.partition("[")[0] for test in proved | controls} == _functions()


@pytest.mark.parametrize(("weakening", "change"), CHANGES, ids=lambda value: getattr(value, "name", None))
def test_weakening_fits_the_sources(weakening: Weakening, change: Change) -> None:
    assert [bool(change.service), bool(change.where), change.checkout].count(True) == 1, weakening.name
    assert bool(change.run) == bool(change.undo) == bool(change.where)
    assert change.patch or change.update or change.run
    for path, replacements in change.patch.items():
        text = prove.patched(path, replacements)
        assert text != (prove.ROOT / path).read_text()
        if path.endswith(".py"):
            ast.parse(text)
        assert change.checkout or prove.place(path).startswith("/")


def test_what_is_not_there_exactly_once_is_not_replaced() -> None:
    for old in ("no such text stands there", "import"):
        with pytest.raises(prove.ProofError, match="times what shall be replaced"):
            prove.patched("tasks.py", {old: ""})


REPORT = """<testsuites><testsuite>
<testcase classname="tests.attacks.test_x" name="test_a">{}</testcase>
<testcase classname="tests.attacks.test_other" name="test_a"><failure message="AssertionError: wanted"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("inside", "outcome"),
    [
        ("", "repelled"),
        ('<failure message="AssertionError: assert 1 == 2">E   wanted</failure>', "succeeded"),
        ('<failure message="assert &apos;wanted&apos; == 2"/><error message="failed on teardown"/>', "succeeded"),
        ('<failure message="Failed: DID NOT RAISE wanted"/>', "succeeded"),
        ('<failure message="AssertionError: assert 1 == 2">assert "wanted" in text</failure>', "unclear"),
        ('<failure message="live.CommandFailed: wanted"/>', "unclear"),
        ('<failure message="subprocess.TimeoutExpired: wanted"/>', "unclear"),
        ('<failure message="Failed: Timeout (&gt;300.0s)">wanted</failure>', "unclear"),
        ('<error message="failed on setup with AssertionError: wanted"/>', "unclear"),
    ],
)
def test_attack_succeeded_if_its_own_assertion_said_so(tmp_path: Path, inside: str, outcome: str) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT.format(inside))
    assert prove.judged(report, "test_x.py::test_a", ["wanted"]).outcome == outcome


def test_test_that_did_not_run_proves_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT.format(""))
    assert prove.judged(report, "test_x.py::test_b", []).outcome == "unclear"


def test_selection_is_by_number_or_by_a_part_of_a_test_s_name() -> None:
    attacks = [
        Attack(number, "title", [Weakening(name, [], {f"test_{name}.py::test_{name}": ["x"]})])
        for number, name in ((1, "pickle"), (12, "yaml"))
    ]
    for wanted, names in {(): ["pickle", "yaml"], ("1",): ["pickle"], ("yaml",): ["yaml"], ("3",): []}.items():
        assert [weakening.name for _, weakening in prove.selected(attacks, wanted)] == names
