"""Errors as a person reads them."""

from cfiddle_cluster.errors import ClusterError


def test_error_ends_with_what_to_do() -> None:
    assert str(ClusterError("port 8888 is in use", "set JUPYTER_PORT")) == "port 8888 is in use\n→ set JUPYTER_PORT"


def test_error_without_a_remedy_is_its_message() -> None:
    assert str(ClusterError("no")) == "no"
