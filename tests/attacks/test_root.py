"""Attack 7: root submits no jobs, wherever it stands."""

import pytest

from live import LiveCluster


@pytest.mark.parametrize("command", ["srun true", "sbatch --wrap=true", "salloc true"])
def test_root_submits_no_job(cluster: LiveCluster, command: str) -> None:
    for result in (
        cluster.user(command, "root"),
        cluster.in_service("slurmctld", command),
        cluster.in_service("slurmd", command, cluster.workers[0]),
    ):
        assert result.exit_status != 0, result
    assert cluster.queue() == []


def test_user_does_not_submit_in_another_s_name(cluster: LiveCluster) -> None:
    for option in ("--uid=test_user2", "--uid=0", "--gid=0"):
        assert cluster.user(["sbatch", option, "--wrap=true"], "test_user1").exit_status != 0, option
    assert cluster.user(["sbatch", "-A", "root", "--wrap=true"], "test_user1").exit_status != 0


@pytest.mark.parametrize(
    "command",
    [
        "sacctmgr -i add user test_user1 account=root",
        "sacctmgr -i modify user test_user1 set adminlevel=Admin",
        "sacctmgr -i modify user test_user1 set fairshare=1000",
        "scontrol update nodename={worker} state=drain reason=mine",
        "scontrol update partitionname=normal state=down",
        "scontrol shutdown",
        "scontrol reconfigure",
        "scontrol delete nodename={worker}",
    ],
)
def test_user_administrates_nothing(cluster: LiveCluster, command: str) -> None:
    cluster.user(command.format(worker=cluster.workers[0]), "test_user1")
    assert cluster.is_idle() == ""
    show = "sacctmgr -n -P show"
    text = cluster.slurm(
        f"{show} assoc user=test_user1 format=Account,Fairshare; {show} user test_user1 format=AdminLevel"
    )
    assert "root" not in text
    assert "1000" not in text
    assert "None" in text
    assert cluster.slurm("scontrol show partition normal -o | grep -o 'State=[A-Z]*'").strip() == "State=UP"
