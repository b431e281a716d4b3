"""Each test here finds the cluster idle and leaves it so."""

import pytest


@pytest.fixture(autouse=True)
def _left_as_found(left_as_found: None) -> None:
    """Have the fixture for every test of the directory."""
