"""What a user runs on the userhost to see that the cluster works."""

import pytest

from live import LiveCluster


@pytest.mark.parametrize("user", ["jovyan", "test_user1"])
def test_test_slurm_passes_as_an_ordinary_user(cluster: LiveCluster, user: str) -> None:
    result = cluster.user("cd ~ && ./test_slurm.sh", user, timeout_s=180)
    assert result.exit_status == 0, result.output[-3000:]
    assert "\x1b[" not in result.output, "plain lines where there is no terminal"


@pytest.mark.parametrize("user", ["jovyan", "test_user1"])
def test_test_cfiddle_passes(cluster: LiveCluster, user: str) -> None:
    result = cluster.user("cd ~ && ./test_cfiddle.py", user, timeout_s=240)
    assert result.exit_status == 0, result.output[-3000:]


def test_test_slurm_refuses_root(cluster: LiveCluster) -> None:
    assert cluster.user("/home/jovyan/test_slurm.sh", "root", timeout_s=60).exit_status != 0
