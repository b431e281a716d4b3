"""Attack 1: a pickle that runs a command when it is opened: it runs inside the sandbox, and nowhere else."""

from live import LiveCluster

EVIL = """
import os, socket
from delegate_function import SandboxDelegate, SlurmDelegate

def opened():
    import os, socket
    roots = os.listdir("/")
    with open("/proc/self/mountinfo") as mounts:
        home = any(line.split()[4].startswith("/home") for line in mounts)
    try:
        open("/home/opened-here", "w").close()
    except OSError:
        pass
    print("opened by", os.getuid(), "on", socket.gethostname(), "home" if home else "no-home", flush=True)
    return Task()

class Task:
    def run(self):
        return os.getuid()

class Evil(Task):
    def __reduce__(self):
        return opened, ()

print("returned", SlurmDelegate(SandboxDelegate()).invoke(Evil(), "run"))
"""


def test_pickle_is_opened_in_the_sandbox_alone(cluster: LiveCluster) -> None:
    lines = cluster.python(EVIL).ok().splitlines()
    opened = [line.split() for line in lines if line.startswith("opened by")]
    assert len(opened) == 1, lines
    uid, host, home = opened[0][2], opened[0][4], opened[0][5]
    assert uid == "65533"
    assert host not in (*cluster.workers, "userhost")
    assert home == "no-home"
    assert "returned 65533" in lines
    assert not (cluster.config.home_root / "opened-here").exists()


def test_privileged_programs_do_not_know_pickle(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    program = (
        "import sys, importlib, pkgutil, agent; "
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(agent.__path__, 'agent.') "
        "if not m.name.endswith('__main__')]; "
        "print(sorted(set(sys.modules) & {'pickle', '_pickle', 'cloudpickle', 'shelve', 'dill'}))"
    )
    assert cluster.in_service("agent", f'python3 -c "{program}"', worker).ok().strip() == "[]"
    text = cluster.slurm("scontrol show config | grep -E '^(Prolog|Epilog)[[]'")
    scripts = [line.split("=", 1)[1].strip() for line in text.splitlines()]
    assert scripts
    for script in scripts:
        assert "python" not in cluster.in_service("slurmd", f"cat {script}", worker).ok().lower(), script
