"""Each test here finds the cluster whole and leaves it so, by `up` where a test failed half-way."""

from collections.abc import Iterator

import pytest

from live import LiveCluster, invoke


@pytest.fixture(autouse=True)
def _whole_again(request: pytest.FixtureRequest, cluster: LiveCluster) -> Iterator[None]:
    """Mend the cluster after a test that did not."""
    cluster.wait_until_idle(timeout_s=120)
    yield
    try:
        cluster.wait_until_idle(timeout_s=120)
    except Exception as error:  # whatever is missing: an engine, a container, Slurm
        invoke("up", timeout_s=400)
        cluster.cancel_all()
        cluster.wait_until_idle(timeout_s=120)
        raise AssertionError(f"the test left the cluster like this, before `up` mended it: {error}") from error
