"""Do in a job of Slurm's what was to be done here, as `task2.sbatch` and `task3.sbatch` of a new home do."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from container_manager import interrupts
from container_manager.errors import ContainerError
from container_manager.room import PARTITION

OPTION = "--slurm"

_END_S = 30


def run_again(words: Sequence[str]) -> NoReturn:
    """Have srun wait for room and run `cm` with these words; end as that ends.

    The job itself only asks for containers, each of which has a job of its own. It shares its CPU: else it could take
    the room that they wait for.

    Args:
        words: what `cm` was called with; OPTION is left out.
    """
    if not shutil.which("srun"):
        raise ContainerError("there is no srun here", "run it on the cluster's users' node")
    again = [word for word in words if word != OPTION]
    options = ["--job-name", again[0], "--partition", PARTITION, "--mem", "128M", "--time", "10"]
    # With us, and apart from the terminal: what Ctrl-C does to srun itself leaves a command no time to tidy up.
    argv = ["setpriv", "--pdeathsig", "TERM", "srun", *options, "cm", *again]
    process = None
    try:
        with interrupts.put_off():  # what has begun is known here, and can be told
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
        sys.exit(process.wait())
    except interrupts.Interrupted:
        with interrupts.put_off():
            if process:
                _end(process)
        raise


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGUSR1)  # which srun passes on
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.terminate()
