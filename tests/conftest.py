"""What all tests share: their order, a time limit for each, and the live cluster with a short report on failure."""

import signal
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path

import pytest

from live import PATIENCE, SERVICES, LiveCluster, docker

ORDER = ("unit", "images", "cluster", "attacks", "faults", "machines")
"""The cheap ones first, those that break things last."""

TIMEOUT_S = 300
REPORT_LINES = 60

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let who expects tests to fail do without a look at the cluster at each."""
    parser.addoption("--no-report", action="store_true", help="do not look at the cluster when a test fails")
    parser.addoption("--real-machines", action="store_true", help="the workers are real machines, and may be attacked")


def pytest_configure(config: pytest.Config) -> None:
    """Name the markers, and be interruptible: what runs in the background may have been started to ignore that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "last: runs after all others of its directory")
    config.addinivalue_line("markers", "slow: takes half a minute or more; .ci/run leaves it out")


def _rank(item: pytest.Item) -> tuple[int, bool]:
    directory = item.path.relative_to(HERE).parts[0]
    return ORDER.index(directory) if directory in ORDER else len(ORDER), item.get_closest_marker("last") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests into order and give each a time limit, after which every thread's stack is printed."""
    items.sort(key=_rank)
    for item in items:
        marker = item.get_closest_marker("timeout")
        limit = marker.args[0] if marker else TIMEOUT_S
        item.add_marker(pytest.mark.timeout(limit * PATIENCE), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the cluster looks like to the report of a failed test."""
    report = yield
    cluster = item.funcargs.get("cluster") if hasattr(item, "funcargs") else None
    if report.failed and isinstance(cluster, LiveCluster) and not item.config.getoption("--no-report"):
        report.sections.append(("the cluster", "\n".join(islice(cluster.report(), REPORT_LINES))))
    return report


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> LiveCluster:
    """Return the live cluster, idle; fail, rather than skip, when none runs."""
    listing = docker("service", "ls", "--format", "{{.Name}} {{.Replicas}}", timeout_s=30)
    missing = [name for name in SERVICES if f"slurm-stack_{name} " not in listing.stdout]
    if missing:
        pytest.fail(f"no cluster runs here ({', '.join(missing)} missing): ./invoke up", pytrace=False)
    live = LiveCluster()
    if not (live.config.simulated or request.config.getoption("--real-machines")):
        pytest.fail("these tests look into simulated machines and break them; this cluster has none", pytrace=False)
    live.wait_until_idle(timeout_s=90)
    return live


@pytest.fixture
def left_idle(request: pytest.FixtureRequest, cluster: LiveCluster) -> Iterator[None]:
    """Prove that a test leaves the cluster idle; one that does not spoils no other: what it leaves is mended."""
    if cluster.is_lost:
        pytest.fail("an earlier test left a cluster that could not be mended", pytrace=False)
    failed_before = request.session.testsfailed
    yield
    try:
        if request.session.testsfailed > failed_before:
            cluster.cancel_all()
        cluster.wait_until_idle(timeout_s=120)
    except Exception as error:  # whatever is missing: an engine, a container, Slurm
        cluster.mend()
        raise AssertionError(f"the test left the cluster like this, before it was mended: {error}") from error
