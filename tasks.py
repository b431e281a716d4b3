"""The administrator's commands. `./invoke --list` shows them, `./invoke --help TASK` explains one."""

import functools
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from invoke import Context, task

from cfiddle_cluster import checks, images, info_json, logs, mpi, status, userhost
from cfiddle_cluster.cluster import Cluster
from cfiddle_cluster.errors import FOREIGN, ClusterError, explained

ROOT = Path(__file__).resolve().parent


def cluster_task(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Make a task of a function that takes the cluster: what goes wrong is one message and exit status 1."""
    if function is None:
        return functools.partial(cluster_task, **options)

    @functools.wraps(function)
    def run(_context: Context, *args: Any, **kwargs: Any) -> None:
        _hear_of_the_end()
        try:
            exit_status = function(Cluster.of(ROOT), *args, **kwargs)
        except ClusterError as error:
            sys.exit(f"error: {error}")
        except FOREIGN as error:
            sys.exit(f"error: {explained(error)}")
        except KeyboardInterrupt:
            sys.exit("interrupted; run the same command again and it goes on")
        if exit_status:
            sys.exit(exit_status)

    return task(run, **options)


def _hear_of_the_end() -> None:
    """Have a lost terminal, or `kill`, interrupt a command as Ctrl-C does: what it had drained or stopped goes on."""
    numbers = [number for number in (signal.SIGHUP, signal.SIGTERM) if signal.getsignal(number) is signal.SIG_DFL]

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:  # one may follow the other
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)


@cluster_task
def up(cluster):
    """Bring the whole cluster up, from whatever is there, until a job has run on each worker."""
    cluster.up()


@cluster_task(name="doctor", help={"json": "print the findings as JSON"})
def doctor_(cluster, json=False):
    """Check this machine and the cluster's; say how to mend what is wrong. Exit status 1 if something must be."""
    from cfiddle_cluster import doctor

    return doctor.main(cluster.config, cluster.state, as_json=json)


@cluster_task
def machines(cluster):
    """Make the simulated machines, or check the real ones by SSH and install Docker on them."""
    cluster.up(until="machines")


@cluster_task
def swarm(cluster):
    """Make the swarm and let every machine join it."""
    cluster.up(until="swarm")


@cluster_task
def label(cluster):
    """Label the machines with their roles."""
    cluster.up(until="labels")


@cluster_task
def nfs(cluster):
    """Make the home directories, and export them to real workers."""
    cluster.up(until="homes")


@cluster_task
def build(cluster):
    """Build the images; only what changed."""
    cluster.up(until="images")


@cluster_task
def task_image(cluster):
    """Build my_task_image for `python CM.py`: that needs an engine, and no cluster."""
    images.ensure_task_image(cluster.config)


@cluster_task
def distribute(cluster):
    """Bring the images to every machine; only the layers that are missing."""
    cluster.up(until="distribution")


@cluster_task
def deploy(cluster):
    """Deploy the stack: secrets, configuration, services."""
    cluster.up(until="stack")


@cluster_task(
    help={
        "drain-minutes": "how long a worker's jobs are waited for (default: the longest time limit)",
        "start-seconds": "how long what was replaced may take to be healthy (default: 180)",
    }
)
def upgrade(cluster, drain_minutes="1440", start_seconds="180"):
    """Roll new images out while jobs run: worker by worker, drained first; all goes back if one does not come up."""
    cluster.upgrade(drain_minutes=drain_minutes, start_seconds=start_seconds)


@cluster_task(help={"command": "what stands after ddocker, in quotes, as in 'ps -a'"})
def ddocker(cluster, command):
    """Run ddocker as the administrator, who sees the containers of all users."""
    return userhost.ddocker(shlex.split(command))


@cluster_task
def setup_containers(cluster):
    """Bring the images that policy.yaml names to all machines; name what is in users' containers' way there."""
    return cluster.set_up_containers()


@cluster_task
def free_images(cluster):
    """Free the space of images that users committed and removed."""
    cluster.free_images()


@cluster_task
def import_info(_cluster, file):
    """Print what an info.json of ddocker's comes to, for policy.yaml and config.sh."""
    print(info_json.section(Path(file)), end="")


@cluster_task
def add_user(cluster, name):
    """Add a user: home directory, uid and Slurm association."""
    cluster.add_user(name)


@cluster_task(help={"delete-home": "delete the home directory too"})
def remove_user(cluster, name, delete_home=False):
    """Remove a user and end their jobs; the home directory stays unless told otherwise."""
    cluster.remove_user(name, delete_home=delete_home)


@cluster_task
def import_users(cluster, file):
    """Add those in a CSV file (a column `name`, optionally `uid`) who are no users yet; none if one line is wrong."""
    cluster.import_users(Path(file))


@cluster_task
def scale(cluster, workers):
    """Have so many simulated workers, more or fewer than now, while jobs run."""
    cluster.scale(workers)


@cluster_task
def add_worker(cluster, address):
    """Add a real worker by its address, while jobs run."""
    cluster.add_worker(address)


@cluster_task
def remove_worker(cluster, name):
    """Drain a worker, wait for its jobs, and take it out of the cluster."""
    cluster.remove_worker(name)


@cluster_task(help={"json": "print the figures as JSON"})
def calibrate(cluster, json=False):
    """Measure how fast each idle worker is; one that is slower than its fellows takes no jobs until it no longer is."""
    return cluster.calibrate(as_json=json)


@cluster_task(help={"undo": "put back what it changed"})
def tune(cluster, undo=False):
    """Set on real workers what measurements vary with (TUNE in config.sh); say what could not be set, and why."""
    cluster.tune(undo=undo)


@cluster_task(
    name="firewall", help={"set_": "let only members of the cluster connect", "unset": "take away what --set has set"}
)
def firewall_(cluster, set_=False, unset=False):
    """Show who may connect to which ports of the machines; --set keeps strangers out but for SSH and JupyterLab."""
    return cluster.firewall(set_=set_, unset=unset)


@cluster_task(name="status", help={"json": "print it as JSON"})
def status_(cluster, json=False):
    """Show machines, services, nodes, queue, and images that differ from what was built."""
    return status.main(cluster.config, cluster.state, as_json=json)


@cluster_task(help={"user": "the user to be (default: jovyan)", "command": "run this instead of a shell"})
def shell(cluster, user="jovyan", command=None):
    """Open a shell on the user's node, or run a command there; its exit status is passed on."""
    return userhost.shell(cluster.config, user=user, command=command)


@cluster_task
def url(cluster):
    """Print the address of JupyterLab, with its token."""
    print(userhost.url(cluster.config, cluster.state))


@cluster_task(name="logs", help={"service": "one of those that `./invoke status` names; all if left out"})
def logs_(cluster, service=""):
    """Print the logs of a service, or of all."""
    logs.show(service)


@cluster_task
def export_logs(cluster, directory):
    """Write the logs of all services, and what the cluster looks like, into a directory."""
    logs.export(cluster.config, cluster.state, Path(directory))


@cluster_task
def save_images(cluster, file):
    """Write the images into one file, for a machine that cannot build them."""
    cluster.save_images(Path(file))


@cluster_task
def load_images(cluster, file):
    """Have the images of such a file here; `up` builds what it lacks."""
    cluster.load_images(Path(file))


@cluster_task
def backup(cluster, file):
    """Write accounting, Slurm's state, users and secrets into one file that only root can read."""
    cluster.backup(Path(file))


@cluster_task
def restore(cluster, file):
    """Bring up the cluster that a backup describes."""
    cluster.restore(Path(file))


@cluster_task
def machinefile(cluster):
    """Write /etc/machinefile on the users' node: the nodes that take jobs, with their slots, as they are now."""
    print(mpi.write_machinefile(), end="")


@cluster_task(help={"user": "who runs it (default: jovyan)", "picture": "where the heat map goes"})
def test_mpi(cluster, user="jovyan", picture="mpi.png"):  # noqa: PT028
    """Measure latency and bandwidth between all nodes, as a table and a heat map, and compute pi on all of them."""
    mpi.test(cluster.config, user=user, picture=Path(picture))


@cluster_task(help={"purge": "also its state, homes, secrets and images"})
def down(cluster, purge=False):
    """Take the cluster down; its state stays, unless purged."""
    cluster.down(purge=purge)


@cluster_task
def check(cluster):
    """Lint, types, shell scripts, lock files and the stack file."""
    return checks.main(cluster.config)


@cluster_task(
    help={
        "only": "paths or options for pytest; with --prove, numbers of attacks or parts of tests' names",
        "quick": "without those that take minutes, most of them waiting",
        "prove": "weaken the cluster, point by point, and see each test of tests/*/weakenings.yaml fail",
    }
)
def test(cluster, only="", quick=False, prove=False):  # noqa: PT028
    """Run all tests, on the cluster that is up."""
    words = shlex.split(only)
    return checks.prove(cluster.config, words) if prove else checks.test(cluster.config, words, quick=quick)


@cluster_task(help={"only": "paths or options for pytest"})
def test_machines(cluster, only=""):  # noqa: PT028
    """Run the tests of real machines on virtual ones, which are made for it; hours where they are emulated."""
    return checks.test_machines(cluster.config, only.split())


@cluster_task(help={"which": "latency, fidelity, mpi, containers, or cluster, which takes it down and up"})
def benchmark(cluster, which):
    """Measure how long things take; prints medians and writes them and a picture to benchmarks/results."""
    return checks.benchmark(cluster.config, which)
