"""A node dies under a job of cmrun: it is tried again as often as allowed, and what happened is said."""

import json

import pytest

from live import LiveCluster, wait_until

USER = "test_user1"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_job_whose_node_dies_is_tried_again_as_often_as_allowed(cluster: LiveCluster) -> None:
    program = "echo begun; sleep 1000"
    waiting = cluster.background(["cmrun", "--retries", "1", "--wait", "sh", "-c", program], USER)
    try:
        job = int(waiting.wait_for_line(r"^\d+$"))
        for number in (1, 2):
            output = f"cat ~/cmlogs/{job}.0.out"
            wait_until(
                lambda: cluster.user(output, USER).stdout.count("begun") == number,  # noqa: B023 (it is called here)
                timeout_s=180,
                what=f"try {number}",
            )
            node = cluster.slurm(f"squeue -h -j {job} -o %N").strip()
            cluster.on_worker(node, ["docker", "kill", cluster.container("slurmd", node)]).ok()
            if number == 1:
                line = waiting.wait_for_line("its node died", timeout_s=90)
                assert line == f"job {job}: its node died; 2nd try"
                [entry] = json.loads(cluster.user(["cminfo", "--json"], USER).ok())["jobs"]
                assert (entry["id"], entry["tries"]) == (str(job), 2)
        done = waiting.wait(timeout_s=90)
        assert done.exit_status == 1
        assert done.stdout.splitlines()[-1] == f"job {job}: its node died, 2nd try"
        assert cluster.wait_for_state(job, "NODE_FAIL")["user"] == USER
        log = cluster.user(f"cat ~/cmlogs/{job}.log", USER).ok()
        assert [line.partition(": ")[2].partition(" on ")[0] for line in log.splitlines() if f"job {job}:" in line] == [
            "try 1 of 2",
            "its node died",
            "try 2 of 2",
        ]
        table = " ".join(cluster.user(["cminfo"], USER).ok().split())
        assert "2nd try, its node died" in table
    finally:
        waiting.end()
        cluster.slurm(f"squeue -h -u {USER} -o %A | xargs -r scancel")
        cluster.user("rm -rf ~/cmlogs", USER)
