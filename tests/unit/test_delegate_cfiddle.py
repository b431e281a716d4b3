"""What CFiddle's hooks are given, without CFiddle. What they do is tested with it, in the images and on the cluster."""

import copy

import pytest

from delegate_function import ConfigurationError, SubprocessDelegate
from delegate_function.cfiddle import COLUMNS, build_method, execution_method


def test_a_column_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"no column cpu, wall; there are: node, .*, counters"):
        execution_method(columns=["wall", "node", "cpu"])
    execution_method(columns=COLUMNS)
    execution_method(columns="node")


def test_cfiddle_copies_its_configuration_and_the_delegates_stay_the_same() -> None:
    for method in (execution_method(SubprocessDelegate()), build_method(SubprocessDelegate())):
        assert copy.deepcopy({"type": method})["type"] is method


def test_without_a_delegate_both_lead_into_a_sandbox_of_a_job() -> None:
    assert execution_method().delegate.compile() == [{"type": "slurm"}, {"type": "sandbox", "profile": "default"}]
    assert build_method().delegate.compile() == [
        {"type": "slurm", "options": {"partition": "shared"}},
        {"type": "sandbox", "profile": "build"},
    ]
