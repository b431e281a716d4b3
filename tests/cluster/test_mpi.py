"""MPI between the workers: by srun, by mpirun in an allocation, and by mpirun over SSH with the list of nodes."""

import math
import re
from pathlib import Path

import pytest

from live import LiveCluster, Result, invoke, job_name, wait_until

# In one write: mpirun passes pieces on as they come.
HELLO = (
    "import sys; from mpi4py import MPI; w = MPI.COMM_WORLD; "
    r"sys.stdout.write(f'{w.rank} {MPI.Get_processor_name()} {w.allreduce(w.rank)}\n')"
)
USER = "test_user1"


def _check(done: Result, cluster: LiveCluster, processes: int) -> None:
    """See that every process ran, on all workers, and that each heard of all others."""
    assert done.exit_status == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert sorted(int(rank) for rank, _, _ in lines) == list(range(processes))
    assert {node for _, node, _ in lines} == set(cluster.workers)
    assert {int(total) for _, _, total in lines} == {sum(range(processes))}


def test_srun_starts_processes_that_reach_each_other(cluster: LiveCluster) -> None:
    count = len(cluster.workers)
    options = f"-p shared -N{count} --ntasks-per-node=2 -J {job_name()}"
    _check(cluster.user(f'srun --mpi=pmix {options} python3 -c "{HELLO}"', USER), cluster, 2 * count)


def test_processes_leave_mpi_init_together(cluster: LiveCluster) -> None:
    """Two nodes never show that a fence was left early; eight did in every fourth run (mpi.conf)."""
    assert re.search(r"^PMIxCollFence\s+= ring$", cluster.slurm("scontrol show config"), re.MULTILINE)


def test_mpirun_in_an_allocation_uses_its_nodes(cluster: LiveCluster) -> None:
    count = len(cluster.workers)
    command = (
        f'salloc -Q -p shared -N{count} --ntasks-per-node=2 -J {job_name()} mpirun python3 -c "{HELLO}" </dev/null'
    )
    _check(cluster.user(command, USER, timeout_s=120), cluster, 2 * count)


def test_mpirun_over_ssh_with_the_machinefile(cluster: LiveCluster) -> None:
    written = invoke("machinefile").ok()
    assert cluster.user("cat /etc/machinefile", USER).ok() == written
    assert re.findall(r"^(\S+) slots=[1-9]\d*$", written, re.MULTILINE) == cluster.workers
    count = len(cluster.workers)
    step = "srun --ntasks-per-node=1 sleep 300"
    job = cluster.sbatch(step, USER, "-p", "shared", f"-N{count}", "--ntasks-per-node=1", "--mem-per-cpu=16")
    cluster.wait_until_runs(job)
    for worker in cluster.workers:
        wait_until(
            lambda worker=worker: cluster.user(["ssh", worker, "true"], USER).exit_status == 0,
            timeout_s=20,
            what=f"a login on {worker}",
        )
    command = f'mpirun --hostfile /etc/machinefile --map-by node -n {2 * count} python3 -c "{HELLO}" </dev/null'
    try:
        _check(cluster.user(command, USER, timeout_s=120), cluster, 2 * count)
    finally:
        cluster.slurm(f"scancel {job}")


def test_samples_compile_and_run(cluster: LiveCluster) -> None:
    said = cluster.user("cd ~/mpi && make run 2>&1", USER, timeout_s=180).output
    assert "the token came back as 6" in said
    assert re.search(r"pi is 3\.14159265359", said)


@pytest.mark.timeout(300)
def test_all_pairs_are_measured_and_drawn(cluster: LiveCluster, tmp_path: Path) -> None:
    picture = tmp_path / "mpi.png"
    said = invoke("test-mpi", "--picture", str(picture), timeout_s=240).ok()
    count = len(cluster.workers)
    assert len(re.findall(r"µs +\d+ MB/s", said)) == count * (count - 1) // 2
    assert math.isclose(float(re.findall(r"pi, by \d+ processes: ([\d.]+)", said)[0]), math.pi, abs_tol=1e-9)
    assert picture.read_bytes().startswith(b"\x89PNG")
