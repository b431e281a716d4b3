"""The tables of weakenings fit the tests and the sources, and a proof is judged by what the test said."""

import ast
from pathlib import Path

import pytest

import prove
from prove import COUNT, TABLES, TESTS, Change, Entry, Weakening

ENTRIES = [entry for directory in TABLES for entry in prove.load(directory)]
CHANGES = [(weakening, change) for entry in ENTRIES for weakening in entry.weakenings for change in weakening.change]
FILES = {
    "attacks": {path.name for path in TESTS.glob("attacks/test_*.py")},
    "cluster": {f"test_{name}.py" for name in ("cm_jobs", "container_tasks", "containers", "ddocker", "mpi")},
}
"""By directory, the files of which every test is in its table."""


def _functions(directory: str) -> set[str]:
    return {
        f"{directory}/{name}::{node.name}"
        for name in FILES[directory]
        for node in ast.parse((TESTS / directory / name).read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_attack_has_a_number() -> None:
    assert [entry.number for entry in prove.load("attacks")] == list(range(1, COUNT + 1))
    assert all(entry.number is None for entry in prove.load("cluster"))


def test_every_entry_has_a_test_and_a_weakening() -> None:
    assert all(entry.title and entry.weakenings for entry in ENTRIES)
    assert all(
        weakening.name and weakening.change and weakening.seen for entry in ENTRIES for weakening in entry.weakenings
    )


@pytest.mark.parametrize("directory", TABLES)
def test_every_test_is_proved_or_a_control(directory: str) -> None:
    table = prove.load(directory)
    proved = {test for entry in table for weakening in entry.weakenings for test in weakening.seen}
    controls = {test for entry in table for test in entry.controls}
    assert not proved & controls
    assert {test.partition("[")[0] for test in proved | controls} == _functions(directory)


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
def test_weakening_succeeded_if_its_test_s_own_assertion_said_so(tmp_path: Path, inside: str, outcome: str) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT.format(inside))
    assert prove.judged(report, "attacks/test_x.py::test_a", ["wanted"]).outcome == outcome


def test_test_that_did_not_run_proves_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT.format(""))
    assert prove.judged(report, "attacks/test_x.py::test_b", []).outcome == "unclear"


def test_selection_is_by_number_or_by_a_part_of_a_test_s_name() -> None:
    entries = [
        Entry(number, "title", [Weakening(name, [], {f"{directory}/test_{name}.py::test_{name}": ["x"]})])
        for number, directory, name in ((1, "attacks", "pickle"), (12, "attacks", "yaml"), (None, "cluster", "mpi"))
    ]
    for wanted, names in {
        (): ["pickle", "yaml", "mpi"],
        ("1",): ["pickle"],
        ("yaml",): ["yaml"],
        ("12", "cluster/"): ["yaml", "mpi"],
        ("3",): [],
    }.items():
        assert [weakening.name for _, weakening in prove.selected(entries, wanted)] == names
