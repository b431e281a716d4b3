"""Each test here leaves the cluster idle, however it broke it."""

import pytest


@pytest.fixture(autouse=True)
def _left_idle(left_idle: None) -> None:
    """Have the fixture for every test of the directory."""
