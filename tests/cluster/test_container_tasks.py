"""The tasks as plain jobs of Slurm's: by the scripts of a new home, and by `cm … --slurm`, which waits."""

import re
from collections.abc import Iterator

import pytest

from live import LiveCluster

USER = "test_user2"
LOSS = r"epoch 1000, loss (\d\.\d+)\n"


@pytest.fixture(autouse=True)
def no_containers(cluster: LiveCluster) -> Iterator[None]:
    yield
    cluster.user("cm stop && cm delete; rm -rf task2-*.out task3-*.out", USER).ok()


def test_task2_as_a_job_prints_the_same(cluster: LiveCluster) -> None:
    here = cluster.user("cm task2 --seed 3", USER).ok()
    there = cluster.user("cm task2 --seed 3 --slurm", USER, timeout_s=120).ok()
    assert there == here
    assert len(re.findall(r"^result from container [1-4] : \{'container index': [0-3], 'sum': ", there, re.M)) == 4


@pytest.mark.slow
def test_scripts_of_a_new_home(cluster: LiveCluster) -> None:
    for task in ("task2", "task3"):
        cluster.user(f"sbatch --wait /etc/skel/{task}.sbatch --seed 3", USER, timeout_s=120).ok()
    printed = cluster.user("cat task2-*.out task3-*.out", USER).ok()
    assert printed.count("result from container") == 4
    assert float(re.search(LOSS, printed)[1]) < 0.3
    assert "saved result to ./data/result.png" in printed
    assert cluster.user("head -c 4 data/result.png | od -An -c", USER).ok().split() == ["211", "P", "N", "G"]
