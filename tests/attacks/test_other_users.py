"""Attack 11: what belongs to another user is not visible, not readable and not stoppable."""

from live import LiveCluster, wait_until

VICTIM, THIEF = "test_user1", "test_user2"

CALL = """
import time
from delegate_function import SandboxDelegate, SlurmDelegate

class Slow:
    def run(self):
        print("begun", flush=True)
        time.sleep(6)
        return "untouched"

print(SlurmDelegate(SandboxDelegate()).invoke(Slow(), "run"))
"""


def test_files_of_another_user_cannot_be_read(cluster: LiveCluster) -> None:
    cluster.user("umask 0; mkdir -p ~/.t; echo secret > ~/.t/file", VICTIM).ok()
    for command in (
        f"cat /home/{VICTIM}/.t/file",
        f"ls /home/{VICTIM}",
        f"touch /home/{VICTIM}/new",
        f"rm -rf /home/{VICTIM}/.t",
    ):
        assert cluster.user(command, THIEF).exit_status != 0, command
        assert cluster.user(["srun", "bash", "-c", command], THIEF).exit_status != 0, command
    assert cluster.user("cat ~/.t/file; rm -r ~/.t", VICTIM).ok() == "secret\n"


def test_job_and_its_output_of_another_user(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    job = cluster.sbatch(
        "echo secret; sleep 300",
        VICTIM,
        "-o",
        f"/home/{VICTIM}/.out-%j",
        "-p",
        "shared",
        "-c1",
        "--mem=16",
        "-w",
        worker,
    )
    cluster.wait_until_runs(job)
    for command in (
        "squeue -a -h -o %i",
        "sacct -a -X -n -P -o JobID",
        "squeue -a -h --json",
        "sstat -a -n -P -o JobID -j {job}",
    ):
        assert str(job) not in cluster.user(command.format(job=job), THIEF).stdout, command
    for command in (
        f"scancel {job}",
        f"scancel -s KILL {job}",
        f"scontrol update jobid={job} timelimit=1",
        f"scontrol requeue {job}",
        f"scontrol suspend {job}",
        f"scontrol show job {job}",
        f"sattach {job}.0",
        f"srun --overlap --jobid={job} -n1 cat /proc/self/environ",
        f"sbcast --force -j {job} /etc/hostname /tmp/planted",
        f"cat /home/{VICTIM}/.out-{job}",
    ):
        result = cluster.user(f"timeout 20 {command}", THIEF, timeout_s=40)
        assert result.exit_status != 0 or command.startswith("scancel"), command
        assert "secret" not in result.stdout
    assert f"{job} RUNNING" in cluster.queue()

    # a job of the thief's on the same machine, beside it
    beside = f"srun -p shared -n1 -c1 --mem=16 -w {worker} --immediate=20 bash -c "
    if int(cluster.slurm(f"sinfo -h -n {worker} -p shared -o %c")) > 1:
        look = f"pkill -9 -u {VICTIM}; kill -9 -1; cat /proc/[0-9]*/environ; ls -l /proc/[0-9]*/cwd/ /proc/[0-9]*/root/"
        seen = cluster.user(f"{beside} '{look}'", THIEF, timeout_s=60).stdout
        assert f"SLURM_JOB_ID={job}" not in seen
        assert VICTIM not in seen
        assert f"{job} RUNNING" in cluster.queue()
    cluster.user(f"scancel {job}; rm -f ~/.out-{job}", VICTIM).ok()


def test_sandbox_of_another_user_cannot_be_ended(cluster: LiveCluster) -> None:
    caller = cluster.background(["python3", "-c", CALL], VICTIM)
    caller.wait_for_line("begun")
    cluster.user("pkill -9 -u test_user1; pkill -9 srun; kill -9 -1; scancel -u test_user1; true", THIEF)
    result = caller.wait()
    assert result.exit_status == 0
    assert "untouched" in result.stdout


def test_processes_of_another_user_tell_nothing(cluster: LiveCluster) -> None:
    victim = cluster.background(["env", "SECRET=do-not-tell", "sleep", "30"], VICTIM)
    try:
        wait_until(
            lambda: "sleep" in cluster.user(f"cat /proc/{victim.pid}/cmdline", VICTIM).stdout,
            timeout_s=20,
            what="it runs",
        )
        look = "ls -L /proc/{0}/{1}/ 2>/dev/null || cat /proc/{0}/{1}"
        told = [
            name
            for name in ("environ", "maps", "mem", "fd/0", "root/home", "cwd/.")
            if cluster.user(look.format(victim.pid, name), THIEF).exit_status == 0
        ]
        assert told == []
        assert cluster.user(f"kill -9 {victim.pid}", THIEF).exit_status != 0
    finally:
        victim.end()


def test_job_beside_another_user_s_sandbox_is_never_placed(cluster: LiveCluster) -> None:
    caller = cluster.background(["python3", "-c", CALL], VICTIM)
    caller.wait_for_line("begun")
    call, node = cluster.slurm("squeue -h -u test_user1 -o '%i %N'").split()
    job = cluster.sbatch("true", THIEF, "-p", "shared", "-c1", "--mem=16", "-w", node)
    assert caller.wait().exit_status == 0
    cluster.wait_for_state(job, "COMPLETED")
    times = cluster.slurm(f"SLURM_TIME_FORMAT=%s sacct -X -n -P -j {call},{job} -o JobID,Start,End").split()
    seconds = {int(fields[0]): tuple(map(int, fields[1:])) for fields in (line.split("|") for line in times)}
    (_, call_ended), (job_began, _) = seconds[int(call)], seconds[job]
    assert job_began >= call_ended, "the job began before the call had ended"
