"""Do in a job of Slurm's what was to be done here, as `task2.sbatch` and `task3.sbatch` of a new home do."""

import os
from collections.abc import Sequence
from typing import NoReturn

from container_manager.errors import ContainerError
from container_manager.room import PARTITION

OPTION = "--slurm"


def run_again(words: Sequence[str]) -> NoReturn:
    """Become srun, which waits for room, runs `cm` with these words, and passes on its output and its exit status.

    The job itself only asks for containers, each of which has a job of its own. It shares its CPU: else it could take
    the room that they wait for.

    Args:
        words: what `cm` was called with; OPTION is left out.
    """
    again = [word for word in words if word != OPTION]
    # One Ctrl-C ends the job, as it ends any command.
    options = ["--partition", PARTITION, "--oversubscribe", "--mem", "128M", "--time", "10", "--quit-on-interrupt"]
    try:
        os.execvp("srun", ["srun", "--job-name", again[0], *options, "cm", *again])
    except FileNotFoundError as error:
        raise ContainerError("there is no srun here", "run it on the cluster's users' node") from error
