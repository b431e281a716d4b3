"""Attack 8: what a caller has in the environment moves nobody else's process."""

from collections.abc import Iterator

import pytest

from live import LiveCluster

USER = "test_user1"

LIBRARY = r"""
#include <stdio.h>
#include <unistd.h>
#include <sys/types.h>
__attribute__((constructor)) static void loaded(void) {
    char host[64] = "?";
    gethostname(host, sizeof host);
    FILE *log = fopen("%s", "a");
    if (log) { fprintf(log, "%%d %%d %%s\n", getuid(), geteuid(), host); fclose(log); }
}
"""

CALL = """
from delegate_function import SandboxDelegate, SlurmDelegate

class Where:
    def run(self):
        import os
        named = ("LD_PRELOAD", "PYTHONPATH", "BASH_ENV", "SLURM_CONF", "DOCKER_HOST", "PYTHONSTARTUP")
        maps = open("/proc/self/maps").read()
        return os.getuid(), [name for name in named if name in os.environ], "evil" in maps

print(SlurmDelegate(SandboxDelegate()).invoke(Where(), "run"))
"""


@pytest.fixture
def traps(cluster: LiveCluster) -> Iterator[dict[str, str]]:
    """Lay traps in a user's home that say who walked into them; take them away afterwards."""
    folder = f"/home/{USER}/.traps"
    log = f"{folder}/log"
    cluster.user(f"mkdir -p {folder} && chmod 755 {folder} && : > {log} && chmod 666 {log}", USER).ok()
    cluster.user(f"gcc -shared -fPIC -x c -o {folder}/evil.so -", USER, input=LIBRARY % log).ok()
    cluster.user(f"cat > {folder}/env.sh", USER, input=f'echo "$(id -u) bash $(hostname)" >> {log}\n').ok()
    python = f"import os\nopen({log!r}, 'a').write(f'{{os.getuid()}} python {{os.uname().nodename}}\\n')\n"
    for name in ("sitecustomize", "pickle", "json", "socket", "agent"):
        cluster.user(f"cat > {folder}/{name}.py", USER, input=python).ok()
    yield {
        "LD_PRELOAD": f"{folder}/evil.so",
        "BASH_ENV": f"{folder}/env.sh",
        "ENV": f"{folder}/env.sh",
        "PYTHONSTARTUP": f"{folder}/sitecustomize.py",
        "DOCKER_HOST": "tcp://127.0.0.1:1",
    }
    cluster.user(f"rm -rf {folder}", USER).ok()


def _walked_in(cluster: LiveCluster) -> set[str]:
    return {line.split()[0] for line in cluster.user(f"cat /home/{USER}/.traps/log", USER).ok().splitlines()}


def test_traps_catch_the_caller_s_own_processes_only(cluster: LiveCluster, traps: dict[str, str]) -> None:
    uid = str(cluster.ids(USER)[0])
    cluster.user(["srun", "--export=ALL", "bash", "-c", "true"], USER, env=traps).ok()
    job = cluster.user(["sbatch", "--parsable", "-o", "/dev/null", "--export=ALL", "--wrap=true"], USER, env=traps).ok()
    cluster.wait_for_state(job.strip(), "COMPLETED")
    cluster.wait_until_idle()
    assert _walked_in(cluster) == {uid}, "the trap works, and on its owner alone"


def test_sandbox_gets_nothing_of_the_caller_s_environment(cluster: LiveCluster, traps: dict[str, str]) -> None:
    uid = str(cluster.ids(USER)[0])
    result = cluster.python(CALL, USER, env=traps)
    assert result.ok().splitlines()[-1] == "(65533, [], False)"
    cluster.wait_until_idle()
    assert _walked_in(cluster) <= {uid}


def test_python_path_of_the_caller_is_not_followed_on_its_way(cluster: LiveCluster, traps: dict[str, str]) -> None:
    # The caller's own interpreter is told to ignore it; what it starts here and on the worker must do so by itself.
    program = f"import os; os.environ['PYTHONPATH'] = '/home/{USER}/.traps'\n{CALL}"
    result = cluster.python(program, USER)
    assert _walked_in(cluster) == set()
    assert result.ok().splitlines()[-1] == "(65533, [], False)"


def test_slurm_conf_of_the_caller_changes_nobody_else_s_job(cluster: LiveCluster, traps: dict[str, str]) -> None:
    own = f"/home/{USER}/.traps/slurm.conf"
    cluster.user(f"printf 'ClusterName=mine\\nSlurmctldHost=127.0.0.1\\n' > {own}", USER).ok()
    assert cluster.user(["timeout", "20", "srun", "true"], USER, env={"SLURM_CONF": own}).exit_status != 0
    assert cluster.user(["srun", "true"], "test_user2").exit_status == 0
